"""Which requests are taken, and what is said about the others."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
import torch
from tiny_models import make_tiny_tokenizer

from headwater.evaluation.generate import decode
from headwater.serve.app import Limits

from .engines import Plain, alone
from .servers import thread

TEXT = {"prompt": "the cat", "max_tokens": 3, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "temperature": 0}


@pytest.fixture(scope="module")
def url():
    with thread(max_batch=2, max_waiting=4) as (address, _):
        yield address


def post(url, body, **headers):
    """`body` is sent as it is if it is bytes, and to where it belongs."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    path = "/v1/chat/completions" if b'"messages"' in content else "/v1/completions"
    sent = {"Content-Type": "application/json", **headers}
    return httpx.post(f"{url}{path}", content=content, headers=sent, timeout=60)


def refusal(url, body, **headers):
    answer = post(url, body, **headers)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (TEXT, {"top_k": 1}),
        (TEXT, {"repetition_penalty": 1.5}),
        (TEXT, {"repetition_penalty": 0}),
        (TEXT, {"min_tokens": 4}),
        (TEXT, {"min_p": 0.1}),
        (TEXT, {"best_of": 3}),
        (TEXT, {"n": 2, "best_of": 1}),
        (TEXT, {"logprobs": True}),
        (TEXT, {"echo": True}),
        (TEXT, {"presence_penalty": 0.5}),
        (TEXT, {"logit_bias": {"5": 100}}),
        (CHAT, {"reasoning_effort": "high"}),
        (CHAT, {"verbosity": "low"}),
        (CHAT, {"tool_choice": "required"}),
        (CHAT, {"function_call": {"name": "f"}}),
        (CHAT, {"functions": [{"name": "f"}]}),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        (CHAT, {"logprobs": True}),
        (CHAT, {"response_format": {"type": "json_object"}}),
        (CHAT, {"modalities": ["text", "audio"]}),
        (CHAT, {"web_search_options": {}}),
    ],
    ids=str,
)
def test_what_would_change_an_answer_is_refused(url, body, fields):
    error = refusal(url, {**body, **fields})
    name = list(fields)[-1]
    assert f"this server does not have {name}" in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", name)


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (TEXT, {"top_k": -1, "min_p": 0, "repetition_penalty": 1.0, "min_tokens": 0, "best_of": None}),
        (TEXT, {"length_penalty": 1.0, "typical_p": 1, "stop_token_ids": [], "skip_special_tokens": True}),
        (TEXT, {"include_stop_str_in_output": False, "spaces_between_special_tokens": True, "priority": 0}),
        (TEXT, {"top_k": 0, "best_of": 1, "logprobs": False, "echo": False, "suffix": "", "logit_bias": {}}),
        (TEXT, {"n": 2, "best_of": 2, "frequency_penalty": 0, "presence_penalty": 0.0, "unheard_of": None}),
        (CHAT, {"user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "logprobs": False}),
        (CHAT, {"parallel_tool_calls": True, "tools": [], "tool_choice": "auto", "function_call": "none"}),
        (CHAT, {"reasoning_effort": "none", "verbosity": "medium", "modalities": ["text"], "safety_identifier": "x"}),
        (CHAT, {"response_format": {"type": "text"}, "prompt_cache_key": "k", "top_logprobs": 0}),
    ],
    ids=str,
)
def test_what_asks_for_nothing_is_taken(url, body, fields):
    plain, asked = post(url, body).json(), post(url, {**body, **fields})
    assert asked.status_code == 200, asked.text
    key = "message" if body is CHAT else "text"
    assert asked.json()["choices"][0][key] == plain["choices"][0][key]


def test_unknown_fields_are_refused_with_the_nearest_known_one(url):
    error = refusal(url, {**TEXT, "temprature": 0.5})
    assert error["message"] == "this server does not know temprature; did you mean temperature?"
    assert error["param"] == "temprature"
    error = refusal(url, {**TEXT, "zzz": 1, "top_k": 5})
    assert error["message"] == "this server does not know zzz; this server does not have top_k"
    assert "did you mean max_tokens" in refusal(url, {**TEXT, "max_completion_tokens": 2})["message"]
    assert refusal(url, {**CHAT, "prompt": "x"})["param"] == "prompt"


def test_unknown_options_of_a_stream_are_refused_and_harmless_ones_taken(url):
    error = refusal(url, {**TEXT, "stream": True, "stream_options": {"inclde_usage": True}})
    assert error["message"] == "stream_options.inclde_usage: Extra inputs are not permitted"
    options = {"include_usage": True, "include_obfuscation": True, "continuous_usage_stats": False}
    asked = post(url, {**TEXT, "stream": True, "stream_options": options})
    assert asked.status_code == 200
    assert '"usage"' in asked.text


def test_calls_of_tools_in_a_conversation_are_refused(url):
    called = {"role": "assistant", "content": "a", "tool_calls": [{"id": "1", "type": "function"}]}
    error = refusal(url, {**CHAT, "messages": [called, *CHAT["messages"]]})
    assert "tool_calls" in error["message"]
    silent = {"role": "assistant", "content": "a", "tool_calls": [], "refusal": None, "name": "it"}
    assert post(url, {**CHAT, "messages": [silent, *CHAT["messages"]]}).status_code == 200


def test_the_official_client_passes(url):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
    assert client.chat.completions.create(model="plain", **CHAT).choices
    fields = {"user": "me", "store": False, "metadata": {}, "service_tier": "auto", "n": 1, "seed": 3, "top_p": 0.5}
    assert client.chat.completions.create(model="plain", **CHAT, **fields).choices
    assert list(client.chat.completions.create(model="plain", **CHAT, stream=True))
    assert client.completions.create(model="plain", **TEXT, best_of=1, echo=False).choices


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_logprobs_0_gives_those_of_the_answer_s_tokens(url, temperature):
    """Oracle: a forward over the whole text."""
    client, tokenizer, model = openai.OpenAI(base_url=f"{url}/v1", api_key="-"), make_tiny_tokenizer(), Plain().model
    fields = {**TEXT, "model": "plain", "max_tokens": 12, "temperature": temperature, "seed": 3, "logprobs": 0}
    choice = client.completions.create(**fields).choices[0]
    found = choice.logprobs
    prompt = tokenizer("the cat")["input_ids"]
    if temperature == 0:
        tokens = alone(model, prompt, 12)
        assert found.tokens == [tokenizer.decode([token]) for token in tokens]
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].double()
        expected = logits.log_softmax(-1).gather(1, torch.tensor([tokens]).T).flatten()
        torch.testing.assert_close(torch.tensor(found.token_logprobs).double(), expected, atol=1e-4, rtol=1e-3)
        whole = [decode(tokenizer, tokens[:i]).rstrip("\ufffd") for i in range(len(tokens))]
        assert found.text_offset == list(map(len, whole))
    assert found.top_logprobs is None
    assert all(value <= 0 for value in found.token_logprobs)
    chunks = [chunk.choices[0] for chunk in client.completions.create(**fields, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == choice.text
    for name in ("tokens", "token_logprobs", "text_offset"):
        pieces = [piece for chunk in chunks if chunk.logprobs for piece in getattr(chunk.logprobs, name)]
        assert pieces == getattr(found, name)
    assert post(url, {**TEXT, "logprobs": None}).json()["choices"][0]["logprobs"] is None
    assert "does not have logprobs" in refusal(url, {**TEXT, "logprobs": 5})["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (rb'{"prompt": "\ud800 x", "max_tokens": 2}', "prompt"),
        (rb'{"prompt": ["a", "\udfff"], "max_tokens": 2}', "prompt"),
        (rb'{"model": "\ud800", "prompt": "a"}', "model"),
        (rb'{"prompt": "a", "stop": "\ud800"}', "stop"),
        (rb'{"\ud800": 1, "prompt": "a"}', None),
        (rb'{"headwater": {"\ud800": 1}, "prompt": "a"}', "headwater"),
        (rb'{"messages": [{"role": "user", "content": "\ud83d"}]}', "messages"),
        (rb'{"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}]}', "messages"),
    ],
)
def test_half_characters_are_refused(url, body, param):
    error = refusal(url, body)
    assert "half of a character" in error["message"]
    assert error["param"] == param


def test_deep_bodies_are_refused(url):
    for depth in range(900, 1000):  # where exactly Python gives up depends on what called it
        body = b'{"prompt": "a", "zzz": ' + b"[" * depth + b"]" * depth + b"}"
        assert post(url, body).status_code == 400


def test_whole_characters_from_two_halves_are_taken(url):
    assert post(url, rb'{"prompt": "\ud83d\ude00", "max_tokens": 2}').status_code == 200


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        (b'{"prompt": "a"', "the body is not JSON: Expecting ',' delimiter, at character 15", None),
        (b"", "the request has no body", None),
        (b"[]", "the body is not a JSON object", None),
        (b"null", "the body is not a JSON object", None),
        (b'{"prompt": "\xff"}', "the body is not JSON", None),
        (b'{"prompt": "a", "stop": ["a","b","c","d","e"]}', "stop takes at most 4 texts, none of them empty", "stop"),
        (b'{"prompt": []}', "there is no prompt", "prompt"),
        (b'{"prompt": [true, false]}', "prompt", "prompt"),
        (b'{"prompt": [5.5]}', "prompt", "prompt"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "the last message must be the user's", "messages"),
    ],
)
def test_mistakes_are_named(url, body, message, param):
    error = refusal(url, body)
    assert error["message"].startswith(message)
    assert error["param"] == param


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": [0] * 3000}, "the body has 3,000 mistakes"),
        ({"prompt": "a", "headwater": dict.fromkeys(map(str, range(3000)), 1)}, "the body has 3,000 mistakes"),
        ({"messages": [0] * 9}, "messages.0: Input should be"),
        ({"prompt": [None] * 3000}, "prompt is a text, token ids"),
        ({"prompt": "a", **dict.fromkeys(map(str, range(3000)), 1)}, "this server does not know 0"),
        ({"prompt": "a", "z" * 3000: 1}, "this server does not know zzz"),
    ],
    ids=["messages", "extras", "few", "prompt", "names", "name"],
)
def test_what_is_said_about_many_mistakes_stays_short(url, body, message):
    answer = post(url, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(message)
    assert len(answer.content) < 800


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"headwater": {"z" * 100_000: 1}}, 400),
        ({"stream": True, "stream_options": {"z" * 100_000: 1}}, 400),
        ({"z" * 100_000 + "\ud800": 1}, 400),
        ({"model": "m" * 100_000}, 404),
    ],
    ids=["headwater", "stream_options", "half a pair", "model"],
)
def test_a_long_name_is_not_sent_back_whole(url, fields, status):
    answer = post(url, {**TEXT, **fields})
    assert answer.status_code == status
    assert len(answer.content) < 1500


@pytest.mark.parametrize(("kind", "named"), [("text/plain", "is text/plain"), ("", "is missing")])
def test_another_content_type_is_named(url, kind, named):
    error = refusal(url, TEXT, **{"Content-Type": kind})
    assert f"the Content-Type {named}" in error["message"]
    assert "application/json" in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({**TEXT, "prompt": [5] * 600}, "prompt"),
        ({**TEXT, "prompt": [5] * 512, "max_tokens": None}, "prompt"),
        ({**TEXT, "prompt": [5] * 508, "max_tokens": 50}, "max_tokens"),
        ({**CHAT, "messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
    ],
    ids=["prompt", "prompt alone", "answer", "chat"],
)
def test_what_is_too_long_is_named(url, body, param):
    error = refusal(url, body)
    assert "are more than 512" in error["message"]
    assert error["param"] == param


def test_requests_that_never_fit_are_a_mistake_and_not_told_to_come_back(url):
    assert post(url, {**TEXT, "n": 6}).status_code == 200
    error = refusal(url, {**TEXT, "n": 7})
    assert error["message"] == "a request has at most 6 answers here: prompts times n"
    assert error["param"] == "n"
    assert refusal(url, {**TEXT, "prompt": ["a"] * 7})["param"] == "prompt"
    with thread(limits=Limits(max_answers=3)) as (other, _):
        assert "at most 3 answers" in refusal(other, {**TEXT, "n": 4})["message"]


def test_the_key_is_a_bearer_s():
    with thread(api_key="secret") as (url, _):
        for given, status in (("Bearer secret", 200), ("bearer  secret", 200), ("Basic secret", 401), ("secret", 401)):
            assert httpx.get(f"{url}/v1/models", headers={"Authorization": given}, timeout=60).status_code == status
        counted = httpx.get(f"{url}/metrics", headers={"Authorization": "Bearer secret"}, timeout=60).text
        assert 'headwater_refused_requests_total{status="401"} 2.0' in counted
