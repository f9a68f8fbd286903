"""Row formats, and what a malformed row is told."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.data.rows import Row, RowTemplate, one_screen, parse_row, read_rows
from headwater.errors import HeadwaterError, Problem

quick = settings(max_examples=60, deadline=None)

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


def wrong_with(fields) -> str:
    row, problems = parse_row(fields)
    assert row is None
    return "\n".join(map(str, problems))


@quick
@given(texts, texts)
def test_prompt_and_completion_are_kept_verbatim(prompt, completion):
    row, problems = parse_row({"prompt": prompt, "completion": completion, "id": 3})
    assert (row, problems) == (Row(prompt, completion), [])


def test_choices():
    fields = {"prompt": "Answer:", "completion": " B", "choices": [" A", " B"]}
    assert parse_row(fields)[0] == Row("Answer:", " B", (" A", " B"))
    as_in_a_csv = {**fields, "choices": '[" A", " B"]'}
    assert parse_row(as_in_a_csv)[0] == parse_row(fields)[0]
    assert parse_row({**fields, "choices": None})[0] == Row("Answer:", " B")
    assert parse_row({**fields, "choices": ""})[0] == Row("Answer:", " B")


def test_alpaca():
    row, _ = parse_row({"instruction": "Add.", "input": "2 + 3", "output": "5", "text": "another rendering"})
    assert row == Row("### Instruction:\nAdd.\n\n### Input:\n2 + 3\n\n### Response:\n", "5")
    for nothing in ({}, {"input": ""}, {"input": None}):
        row, _ = parse_row({"instruction": "Sing.", "output": "La", **nothing})
        assert row == Row("### Instruction:\nSing.\n\n### Response:\n", "La")


def test_text():
    assert parse_row({"text": "Once upon a time"})[0] == Row("", "Once upon a time")


def test_messages():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Ciao"},
    ]
    row, _ = parse_row({"messages": messages, "prompt": "Hi"})
    assert row == Row("Bye", "Ciao", messages=tuple(messages))
    padded_by_a_table = [{**m, "name": None} for m in messages]
    assert parse_row({"messages": padded_by_a_table})[0] == parse_row({"messages": json.dumps(messages)})[0]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "the row has no fields"),
        ({"question": "q", " answer": "a"}, "the row has 'question', ' answer'"),
        ({str(n): "" for n in range(999)}, "33', '34..."),
        ({"prompt": "p", "answer": "a"}, "field 'completion' is missing; the row has 'prompt', 'answer'"),
        ({"completion": "p"}, "field 'prompt' is missing"),
        ({"prompt": "p", "text": "t"}, "field 'completion' is missing"),
        ({"prompt": 3, "completion": "c"}, "field 'prompt' is a number, not text"),
        ({"prompt": None, "completion": "c"}, "field 'prompt' is null, not text"),
        ({"prompt": "p", "completion": ["c"]}, "field 'completion' is a list, not text"),
        ({"prompt": "p", "completion": True}, "field 'completion' is true or false, not text"),
        ({"prompt": "p", "completion": ""}, "field 'completion' is empty"),
        ({"prompt": "p", "completion": "\ud83d"}, "half of a surrogate pair"),
        ({"prompt": "p", "completion": "b", "choices": [" b", "c"]}, "did you mean ' b'?"),
        ({"prompt": "p", "completion": "b", "choices": ["b"]}, "two or more different texts"),
        ({"prompt": "p", "completion": "b", "choices": ["b", "b"]}, "two or more different texts"),
        ({"prompt": "p", "completion": "b", "choices": ["b", 1]}, "not text"),
        ({"prompt": "p", "completion": "b", "choices": "b|c"}, "field 'choices' is text, not a list"),
        ({"prompt": "p", "completion": "b", "choice": ["b", "c"]}, "did you mean 'choices'?"),
        ({"instruction": "i"}, "field 'output' is missing"),
        ({"instruction": "i", "output": "o", "inputs": "x"}, "did you mean 'input'?"),
        ({"text": ""}, "field 'text' is empty"),
        ({"messages": "hello"}, "field 'messages' is text, not a list"),
        ({"messages": []}, "the last message is not an assistant's"),
        ({"messages": [{"role": "user", "content": "x"}]}, "the last message is not an assistant's"),
        ({"messages": ["x"]}, "message 1 is text, not an object"),
        ({"messages": [{"role": "assistant"}]}, "message 1: field 'content' is missing"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "message 1: field 'content' is empty"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, "not read: tool_calls"),
    ],
)
def test_malformed(fields, said):
    assert said in wrong_with(fields)


def test_every_problem_of_a_row_is_reported():
    said = wrong_with({"prompt": 1, "completion": 2, "choices": 3})
    assert all(f"'{name}' is a number" in said for name in ("prompt", "completion", "choices"))


def test_all_malformed_rows_with_file_and_line(tmp_path):
    file = tmp_path / "train.jsonl"
    lines = [json.dumps({"prompt": "p"} if i % 2 else {"prompt": "p", "completion": "c"}) for i in range(1, 101)]
    file.write_text("\n".join(lines))
    with pytest.raises(HeadwaterError) as caught:
        read_rows(file)
    problems = caught.value.problems
    assert [p.where for p in problems[:20]] == [f"{file}:{line}" for line in range(1, 40, 2)]
    assert "and 30 more problems" in str(problems[20])
    assert len(problems) == 21


def test_problems_come_in_the_order_of_the_lines(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text('{"prompt": 1}\n{\n{"text": ""}\n[]\n{"text": 3}')
    with pytest.raises(HeadwaterError) as caught:
        read_rows(file)
    assert [p.where for p in caught.value.problems] == [f"{file}:{line}" for line in (1, 1, 2, 3, 4, 5)]


def test_one_screen_shares_the_room_and_gives_an_advice_once():
    problems = {str(s): [Problem("bad", f"{s}:{i}", "do this") for i in range(100)] for s in range(4)}
    shown = one_screen(problems)
    assert len(str(HeadwaterError(*shown)).splitlines()) <= 25
    assert sum(bool(p.fix) for p in shown) == 1
    assert [sum(p.where.startswith(f"{s}:") for p in shown) for s in range(4)] == [5] * 4
    assert sum("95 more" in p.what for p in shown) == 4
    assert len(one_screen({str(s): [Problem("bad", str(s))] for s in range(100)})) == 21
    assert one_screen({"a": []}) == []


def test_template():
    template = RowTemplate("Q: {question}\nA:", " {answer[0]}", (" {answer[0]}", " {answer[1]}"))
    fields = template.fill({"question": "{why}?", "answer": ["x", "y"]})
    assert parse_row(fields)[0] == Row("Q: {why}?\nA:", " x", (" x", " y"))


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"q": "x", "answer": "y"}, "asks for field 'question'; the row has 'q', 'answer'"),
        ({"question": None, "answer": "y"}, "field 'question' is null"),
        ({"question": "x", "answer": []}, "does not fit"),
    ],
)
def test_records_that_do_not_fit_the_template(tmp_path, record, said):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(record))
    with pytest.raises(HeadwaterError, match=f"rows.jsonl:1: .*{said}"):
        read_rows(file, template=RowTemplate("{question}", "{answer[0]}"))
