"""Conversations through chat templates of the kinds that models bring."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_tiny_tokenizer

from headwater.data.encode import IGNORED, DataSpec, encode_completion, encode_prompt, encode_rows
from headwater.data.rows import Row
from headwater.errors import HeadwaterError

quick = settings(max_examples=60, deadline=None)

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<bos>{% for m in messages %}<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
GEMMA = (
    "<bos>{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
)
MISTRAL = (
    "<bos>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} <eos>{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}"
)
UNCLOSED = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
LAST_ONLY = "{{ messages[-1]['content'] }}<eos>"
TWICE = "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}<eos>{% endfor %}"

CLOSING = {
    "chatml": "<|im_end|>",
    "llama3": "<eos>",
    "gemma": "<|im_end|>",
    "mistral": " <eos>",
    "thinking": "<|im_end|>",
}
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL, "thinking": THINKING}
SPEC = DataSpec()


def make_tokenizer(template: str | None):
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def conversation(*contents: str, system: str | None = None) -> Row:
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": c} for i, c in enumerate(contents)]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    return Row(contents[0], contents[-1], messages=tuple(turns), source="f", line=4)


def encode(row: Row, tokenizer, spec: DataSpec = SPEC):
    (item,), _ = encode_rows([row], tokenizer, spec, 0)
    return item


def runs_of_learned(item, tokenizer) -> list[str]:
    """The text of each unbroken run of learned tokens."""
    runs: list[list[int]] = [[]]
    for token, label in zip(item.input_ids, item.labels, strict=True):
        assert label in (token, IGNORED)
        if label != IGNORED:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_assistant_turn_and_what_closes_it_is_learned_and_nothing_else(name):
    tokenizer = make_tokenizer(TEMPLATES[name])
    row = conversation("Hi", "Hello", "How are you?", "Hi, Hello", "Bye", "Hello")
    item = encode(row, tokenizer)
    assert tokenizer.decode(item.input_ids) == tokenizer.apply_chat_template(row.messages, tokenize=False).rstrip("\n")
    assert runs_of_learned(item, tokenizer) == [c + CLOSING[name] for c in ("Hello", "Hi, Hello", "Hello")]


@pytest.mark.parametrize("name", TEMPLATES)
@quick
@given(contents=st.lists(st.text("ab \n?é", min_size=1, max_size=8), min_size=2, max_size=6))
def test_the_prompt_of_the_last_turn_is_that_of_training(name, contents):
    tokenizer = make_tokenizer(TEMPLATES[name])
    row = conversation(*contents[: len(contents) // 2 * 2])
    together = encode_prompt(row, tokenizer, SPEC) + encode_completion(row.completion, tokenizer)
    ids = encode(row, tokenizer).input_ids
    assert ids[: len(together)] == together
    assert tokenizer.decode(ids[len(together) :]) == CLOSING[name]


def test_a_turn_is_closed_by_the_first_special_token_behind_it():
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|><eos>{% endfor %}")
    item = encode(conversation("Hi", "Hello", "And?", "Yes"), tokenizer)
    assert runs_of_learned(item, tokenizer) == ["Hello<|im_end|>", "Yes<|im_end|>"]


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_a_question_without_an_answer_ends_where_the_assistant_begins(name):
    tokenizer = make_tokenizer(TEMPLATES[name])
    for row in (conversation("Hi"), conversation("Hi", "Hello", "And?")):
        expected = tokenizer.apply_chat_template(row.messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(encode_prompt(row, tokenizer, SPEC)) == expected


def test_system_message():
    tokenizer = make_tokenizer(CHATML)
    item = encode(conversation("Hi", "Hello", system="Be brief"), tokenizer)
    assert tokenizer.decode(item.input_ids).startswith("<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user")


def test_without_a_closing_token_the_end_token_closes_the_last_turn():
    tokenizer = make_tokenizer(UNCLOSED)
    item = encode(conversation("Hi", "Hello", "How?", "Well"), tokenizer)
    assert tokenizer.decode(item.input_ids) == "user: Hi\nassistant: Hello\nuser: How?\nassistant: Well<eos>"
    assert runs_of_learned(item, tokenizer) == ["Hello", "Well<eos>"]


def test_text_that_closes_a_turn_is_learned_where_the_template_writes_it():
    marked = make_tokenizer("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n## End\n{% endfor %}")
    item = encode(conversation("Hi", "Hello", "How?", "Well"), marked)
    assert runs_of_learned(item, marked) == ["Hello\n## End", "Well\n## End<eos>"]
    last_only = make_tokenizer(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ '<eos>' if loop.last else ' ' }}{% endfor %}"
    )
    item = encode(conversation("Hi", "Hello", "How?", "Well"), last_only)
    assert last_only.decode(item.input_ids) == "user: Hi assistant: Hello user: How? assistant: Well<eos>"
    assert runs_of_learned(item, last_only) == ["Hello", "Well<eos>"]


def test_always_puts_plain_rows_through_the_template():
    tokenizer = make_tokenizer(CHATML)
    item = encode(Row("2 + 3 =", " 5"), tokenizer, DataSpec(chat_template="always"))
    assert tokenizer.decode(item.input_ids).endswith("user\n2 + 3 =<|im_end|>\n<|im_start|>assistant\n 5<|im_end|>")
    assert runs_of_learned(item, tokenizer) == [" 5<|im_end|>"]
    plain = encode(Row("2 + 3 =", " 5"), tokenizer)
    assert tokenizer.decode(plain.input_ids) == "2 + 3 = 5<eos>"


@pytest.mark.parametrize(
    ("template", "row", "spec", "said"),
    [
        (CHATML, conversation("Hi", "Hello"), DataSpec(chat_template="never"), "the row is a conversation"),
        (None, conversation("Hi", "Hello"), SPEC, "the tokenizer has no chat template"),
        (GEMMA, conversation("Hi", "Hello", system="x"), SPEC, "System role not supported"),
        (LAST_ONLY, conversation("Hi", "Hello", "a", "b"), SPEC, "does not show assistant turn 1 once"),
        (TWICE, conversation("Hi", "Hello"), SPEC, "does not show assistant turn 1 once"),
    ],
)
def test_conversations_that_cannot_be_encoded(template, row, spec, said):
    with pytest.raises(HeadwaterError, match=f"^f:4: .*{said}") as caught:
        encode_rows([row, row], make_tokenizer(template), spec, 0)
    assert len(caught.value.problems) == 2


def test_earlier_turns_are_not_cut_away():
    tokenizer = make_tokenizer(UNCLOSED)
    row = conversation("Hi", "Hello", "How?", "Well")
    length = len(encode(row, tokenizer))
    context = len("user: Hi\nassistant: ")
    spec = DataSpec(max_length=length - context, on_too_long="truncate_prompt")
    assert runs_of_learned(encode(row, tokenizer, spec), tokenizer) == ["Hello", "Well<eos>"]
    with pytest.raises(HeadwaterError, match="does not fit"):
        encode(row, tokenizer, spec.model_copy(update={"max_length": length - context - 1}))
