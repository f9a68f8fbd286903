"""`headwater serve` as people run it, with OpenAI's own client."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import signal
import threading
import time

import httpx
import openai
import pytest
import torch
from compose.pool_support import save_lora
from peft import PeftModel
from tiny_models import make_tiny_tokenizer
from tuner.helpers import adapt
from tuner.rows import BY_ID

from headwater.base_model import cache_dir
from headwater.compose import AdapterPool
from headwater.data.encode import DataSpec, encode_prompt
from headwater.data.rows import Row
from headwater.evaluation.generate import decode

from .engines import alone, endless_llama, sharp_llama
from .servers import process, save_base

TOKENIZER = make_tiny_tokenizer()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An R-LoRA adapter, served; its folder, the server and a client."""
    folder = tmp_path_factory.mktemp("serve")
    model = adapt(BY_ID["rlora"], sharp_llama())
    model.peft_config["default"].base_model_name_or_path = str(save_base(folder / "base"))
    model.save_pretrained(folder / "mine")
    with process(folder, folder / "mine", "--max-tokens", "300", HEADWATER_API_KEY="secret") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0, timeout=120)
        yield PeftModel.from_pretrained(sharp_llama(), folder / "mine").eval(), server, client


def expected(model, prompt: list[int], max_tokens: int) -> str:
    return decode(TOKENIZER, [t for t in alone(model, prompt, max_tokens) if t != 257])


def chat_ids(text: str) -> list[int]:
    row = Row(prompt=text, completion="", messages=({"role": "user", "content": text},))
    return encode_prompt(row, TOKENIZER, DataSpec())


def test_models(run):
    _, _, client = run
    assert [model.id for model in client.models.list()] == ["mine"]
    assert client.models.retrieve("mine").owned_by == "headwater"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_chat(run):
    model, _, client = run
    answer = client.chat.completions.create(
        model="mine", messages=[{"role": "user", "content": "how are you"}], max_tokens=9, temperature=0
    )
    ids = chat_ids("how are you")
    assert answer.choices[0].message.content == expected(model, ids, 9)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    tokens = len(alone(model, ids, 9))
    assert answer.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
        "prompt_tokens": len(ids),
        "completion_tokens": tokens,
        "total_tokens": len(ids) + tokens,
    }


def test_chat_in_a_stream_is_the_same(run):
    model, _, client = run
    stream = client.chat.completions.create(
        model="mine",
        messages=[{"role": "user", "content": [{"type": "text", "text": "how "}, {"type": "text", "text": "are you"}]}],
        max_completion_tokens=9,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected(model, chat_ids("how are you"), 9)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.prompt_tokens == len(chat_ids("how are you"))


def test_completions_of_texts_and_of_tokens_with_several_answers(run):
    model, _, client = run
    texts = ["the cat", "a longer prompt"]
    ids = [TOKENIZER(text)["input_ids"] for text in texts]
    for prompt in (texts, ids):
        answer = client.completions.create(model="mine", prompt=prompt, max_tokens=7, temperature=0, n=2)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert [choice.text for choice in answer.choices] == [expected(model, p, 7) for p in ids for _ in range(2)]
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    hot = {"model": "mine", "prompt": "x", "max_tokens": 12, "temperature": 1.5}
    drawn = client.completions.create(**hot, n=3, seed=5)
    again = client.completions.create(**hot, n=3, seed=5)
    assert [c.text for c in drawn.choices] == [c.text for c in again.choices]
    assert len({c.text for c in drawn.choices}) == 3


def test_stop_texts_end_an_answer(run):
    model, _, client = run
    ids = TOKENIZER("the cat")["input_ids"]
    whole = expected(model, ids, 40)
    stop = next(c for c in whole[2:] if c.isprintable() and c != "\ufffd")
    answer = client.completions.create(
        model="mine", prompt="the cat", max_tokens=40, temperature=0, stop=[stop, "zzzz"]
    )
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_gates_come_with_the_tokens_where_asked_for(run):
    _, _, client = run
    answer = client.completions.create(
        model="mine", prompt="the cat", max_tokens=5, temperature=0, extra_body={"headwater": {"gates": True}}
    )
    tokens = answer.choices[0].model_extra["headwater"]["tokens"]
    assert len(tokens) == answer.usage.completion_tokens
    for token in tokens:
        assert len(token["gates"]) == 3
        assert sum(token["gates"]) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("fields", "status", "message", "param"),
    [
        ({"model": "other"}, 404, "the model `other` does not exist here", "model"),
        ({"max_tokens": 301}, 400, "at most 300 tokens", "max_tokens"),
        ({"temperature": 3}, 400, "less than or equal to 2", "temperature"),
        ({"prompt": ""}, 400, "no tokens", "prompt"),
        ({"prompt": "x" * 500, "max_tokens": 50}, 400, "500 tokens of prompt and 50 of answer are more than 512", None),
        ({"prompt": [1, 999]}, 400, "token ids go from 0 to", "prompt"),
        ({"n": 17}, 400, "at most 16 answers", "n"),
        ({"logprobs": 3}, 400, "does not have logprobs", None),
        ({"stop": [""]}, 400, "none of them empty", None),
    ],
)
def test_mistakes_are_explained_in_openais_shape(run, fields, status, message, param):
    _, _, client = run
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(**{"model": "mine", "prompt": "x", "max_tokens": 3, **fields})
    assert caught.value.status_code == status
    assert message in caught.value.body["message"]
    assert caught.value.body["type"] == "invalid_request_error"
    assert param in (None, caught.value.body["param"])


def test_the_key_is_asked_for(run):
    _, server, _ = run
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        assert httpx.get(f"{server.url}/v1/models", headers=headers, timeout=60).status_code == 401
    assert httpx.get(f"{server.url}/metrics", timeout=60).status_code == 401
    assert httpx.get(f"{server.url}/health", timeout=60).json()["status"] == "ok"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong").models.list()


def test_many_at_once_are_each_answered_as_alone(run):
    model, server, _ = run
    prompts = [f"prompt {i} " * (1 + i % 4) for i in range(60)]

    async def ask_all():
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="secret", max_retries=0, timeout=120
        ) as client:

            async def ask(i, prompt):
                fields = {"model": "mine", "prompt": prompt, "max_tokens": 3 + i % 5, "temperature": 0}
                if i % 2:
                    return (await client.completions.create(**fields)).choices[0].text
                stream = await client.completions.create(**fields, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(ask(i, prompt) for i, prompt in enumerate(prompts)))

    answers = asyncio.run(ask_all())
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert answer == expected(model, TOKENIZER(prompt)["input_ids"], 3 + i % 5)


def test_a_connection_outlasts_those_that_clients_keep(run):
    """httpx closes its own after 5 seconds: a server that does so at that moment would lose the request."""
    _, server, _ = run
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    for pause in (0, 7):
        time.sleep(pause)
        connection.request("GET", "/health")
        assert connection.getresponse().read()
    connection.close()


def test_a_second_signal_stops_at_once_and_without_tracebacks(tmp_path):
    base = save_base(tmp_path / "base", endless_llama())
    pool = AdapterPool.create(tmp_path / "pool", str(base))
    with process(tmp_path, pool.path, "--max-tokens", "20000", "--timeout", "1000") as server:
        # minutes of answers, so that they are cut off however late this process comes to it
        fields = {"model": "base", "prompt": "the cat", "max_tokens": 20_000, "n": 16, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=fields, timeout=120) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.popen.send_signal(signal.SIGINT)
            with contextlib.suppress(httpx.HTTPError):  # until it takes no more
                while httpx.get(f"{server.url}/health", timeout=120):
                    pass
            server.popen.send_signal(signal.SIGINT)
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        assert server.popen.wait(120) == 0
        assert "Traceback" not in server.log.read_text()


def test_sigterm_finishes_what_is_being_answered(tmp_path):
    model = adapt(BY_ID["mtl_lora"], sharp_llama())
    model.peft_config["default"].base_model_name_or_path = str(save_base(tmp_path / "model"))
    model.save_pretrained(tmp_path / "run" / "adapter")
    (tmp_path / "x.jsonl").write_text('{"prompt": "x", "completion": "y"}\n')
    tasks = "".join(f"  - {{name: {name}, train: ../x.jsonl}}\n" for name in ("first", "second", "third"))
    config = (
        f"model_name_or_path: {tmp_path}/model\nmethod: {{name: mtl_lora}}\ntasks:\n{tasks}output_dir: {tmp_path}/run\n"
    )
    (tmp_path / "run" / "config.yaml").write_text(config)
    ids = TOKENIZER("the cat")["input_ids"]
    with process(tmp_path, tmp_path / "run") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=120)
        assert [m.id for m in client.models.list()] == ["first", "second", "third"]
        fields = {"prompt": "the cat", "max_tokens": 150, "temperature": 0}
        streams = {name: client.completions.create(model=name, **fields, stream=True) for name in ("first", "third")}
        texts = {name: next(stream).choices[0].text for name, stream in streams.items()}
        code: list[int] = []
        stopping = threading.Thread(target=lambda: code.append(server.terminate()))
        stopping.start()
        for name, stream in streams.items():
            texts[name] += "".join(chunk.choices[0].text for chunk in stream)
        stopping.join(60)
        assert code == [0]
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
    for name, task in (("first", 0), ("third", 2)):
        tokens = alone(model, ids, 150, headwater_task_ids=torch.tensor([task]))
        assert texts[name] == decode(TOKENIZER, [t for t in tokens if t != 257])
    assert "Traceback" not in server.log.read_text()


def test_a_pool_serves_each_of_its_adapters(tmp_path):
    base = save_base(tmp_path / "base")
    pool = AdapterPool.create(tmp_path / "pool", str(base))
    for seed, name in enumerate(("news", "tweets")):
        pool.add(save_lora(tmp_path / name, base, seed, size=0.6), name)
    with process(tmp_path, tmp_path / "pool") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=120)
        assert [m.id for m in client.models.list()] == ["news", "tweets", "base"]
        ids = TOKENIZER("hello there")["input_ids"]
        texts = {}
        for name in ("news", "tweets", "base"):
            answer = client.completions.create(model=name, prompt="hello there", max_tokens=8, temperature=0)
            about = answer.choices[0].model_extra["headwater"]
            assert about["adapters"] == ({} if name == "base" else {name: 1.0})
            model = sharp_llama() if name == "base" else PeftModel.from_pretrained(sharp_llama(), pool.folder(name))
            texts[name] = answer.choices[0].text
            assert texts[name] == expected(model.eval(), ids, 8)
        assert len(set(texts.values())) == 3


MINILM = cache_dir() / "encoders" / "all-MiniLM-L6-v2" / "modules.json"


@pytest.mark.skipif(not MINILM.is_file(), reason="the packaged encoder was not fetched yet")
def test_auto_finds_adapters_with_the_packaged_encoder(tmp_path):
    texts = {
        "news": ["The central bank raised interest rates on Monday.", "Oil prices fell after the talks failed."],
        "cooking": ["Simmer the onions in butter until soft.", "Bake the bread for forty minutes."],
        "sport": ["The striker scored twice in the second half.", "She won the final in three sets."],
    }
    base = save_base(tmp_path / "base")
    pool = AdapterPool.create(tmp_path / "pool", str(base))
    for seed, (name, samples) in enumerate(texts.items()):
        pool.add(save_lora(tmp_path / name, base, seed, size=0.6), name, samples=samples)
    prompts = {
        "news": "Shares and oil prices rose as the bank cut its rates.",
        "cooking": "Fry the garlic gently in olive oil, then add butter.",
        "sport": "Their goalkeeper saved a penalty in the final.",
    }
    with process(tmp_path, tmp_path / "pool", "--top", "1") as server:

        async def ask_all():
            async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-", timeout=120) as client:
                asked = [(model, p) for name, p in prompts.items() for model in ("auto", name)]
                fields = {"max_tokens": 6, "temperature": 0}
                return await asyncio.gather(*(client.completions.create(model=m, prompt=p, **fields) for m, p in asked))

        answers = asyncio.run(ask_all())  # all in one batch
    for name, auto, named in zip(prompts, answers[::2], answers[1::2], strict=True):
        assert auto.choices[0].model_extra["headwater"]["adapters"] == {name: 1.0}
        assert auto.choices[0].text == named.choices[0].text
    assert len({answer.choices[0].text for answer in answers}) == 3
    assert (tmp_path / "pool" / "keys.safetensors").is_file()
