"""Token ids and labels of rows, and rows that do not fit."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from headwater.data.encode import IGNORED, DataSpec, encode_completion, encode_end, encode_prompt, encode_rows
from headwater.data.rows import Row
from headwater.errors import HeadwaterError

quick = settings(max_examples=60, deadline=None)

TINY = make_tiny_tokenizer()
SPEC = DataSpec()
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
completions = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


def make_sentencepiece_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """Like Llama 2's: a space is put before every text, spaces are ▁, unknown characters are bytes, bos comes first."""
    words = ["▁", "▁A", "▁B", "A", "B", "n", "s", "▁n", ":", "er", "we", *"abcdwe."]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    merges = [("▁", "A"), ("▁", "B"), ("▁", "n"), ("w", "e")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def encode(row: Row, tokenizer=TINY, spec: DataSpec = SPEC):
    (item,), _ = encode_rows([row], tokenizer, spec, 0)
    return item


def learned(item) -> list[int]:
    return [label for label in item.labels if label != IGNORED]


@quick
@given(texts, completions)
def test_prompt_and_completion_are_joined_verbatim_and_only_the_completion_is_learned(prompt, completion):
    item = encode(Row(prompt, completion))
    assert TINY.decode(item.input_ids) == prompt + completion + "<eos>"
    assert TINY.decode(learned(item)) == completion + "<eos>"
    assert item.labels[len(item) - len(learned(item)) :] == item.input_ids[len(item) - len(learned(item)) :]
    assert len(item.labels) == len(item)


@pytest.mark.parametrize("tokenizer", [TINY, make_sentencepiece_tokenizer()], ids=["bytes", "sentencepiece"])
@quick
@given(prompt=texts, completion=completions)
def test_scoring_sees_the_ids_of_training(tokenizer, prompt, completion):
    row = Row(prompt or ".", completion)
    spec = DataSpec(max_length=4096)
    together = encode_prompt(row, tokenizer, spec) + encode_completion(completion, tokenizer)
    assert encode(row, tokenizer, spec).input_ids == [*together, *encode_end(row, tokenizer, spec)]
    assert encode_end(row, tokenizer, spec) == [tokenizer.eos_token_id]


def test_sentencepiece_puts_no_space_into_the_middle():
    tokenizer = make_sentencepiece_tokenizer()
    item = encode(Row("Answer:", " B"), tokenizer)
    names = tokenizer.convert_ids_to_tokens(item.input_ids)
    assert names == ["<s>", "▁A", "n", "s", "we", *names[5:]]
    assert names[-2:] == ["▁B", "</s>"]
    glued = tokenizer.convert_ids_to_tokens(encode(Row("Answer:", "B"), tokenizer).input_ids)
    assert glued[-2:] == ["B", "</s>"]


@pytest.mark.parametrize("bos", [True, False])
def test_a_text_row_opens_like_any_text(bos):
    tokenizer = make_sentencepiece_tokenizer(bos)
    item = encode(Row("", "B A"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(item.input_ids) == ["<s>"] * bos + ["▁B", "▁A", "</s>"]
    assert item.labels == [IGNORED] * bos + item.input_ids[bos:]


def test_an_end_token_that_the_tokenizer_adds_does_not_stand_in_the_middle():
    tokenizer = make_sentencepiece_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", None, [("<s>", 1), ("</s>", 2)]
    )
    assert encode(Row("A", " B"), tokenizer).input_ids.count(2) == 1


def test_report_counts():
    rows = [Row("ab", "cd", source="x"), Row("", "efg", source="y")]
    items, report = encode_rows(rows, TINY, SPEC, 7)
    assert [item.task for item in items] == [7, 7]
    assert (report.rows, report.tokens, report.learned_tokens, report.longest) == (2, 9, 7, 5)
    assert (report.dropped, report.truncated) == ({}, {})


def test_rows_too_long_are_errors_with_file_and_line():
    rows = [Row("p" * n, "c", source="a.jsonl", line=n) for n in range(40)]
    with pytest.raises(HeadwaterError) as caught:
        encode_rows(rows, TINY, DataSpec(max_length=10), 0)
    first, *_, last = caught.value.problems
    assert str(first) == (
        "a.jsonl:9: the row has 11 tokens, more than max_length=10\n"
        "    raise data.max_length, or set data.on_too_long to drop or truncate_prompt"
    )
    assert str(last) == "a.jsonl: and 11 more problems"


def test_a_row_that_the_model_does_not_take_is_too_long_whatever_max_length_says(caplog):
    row = Row("abcdefgh", "ijk", source="a.jsonl", line=1)
    with pytest.raises(HeadwaterError) as caught:
        encode_rows([row], TINY, SPEC, 0, 10)
    assert str(caught.value) == (
        "a.jsonl:1: the row has 12 tokens, more than the model's 10\n"
        "    shorten it, or set data.on_too_long to drop or truncate_prompt"
    )
    with pytest.raises(HeadwaterError, match=r"more than max_length=8\n    raise data.max_length"):
        encode_rows([row], TINY, DataSpec(max_length=8), 0, 10)
    (item,), _ = encode_rows([row], TINY, DataSpec(on_too_long="truncate_prompt"), 0, 10)
    assert TINY.decode(item.input_ids) == "cdefghijk<eos>"
    with pytest.raises(HeadwaterError, match=r"does not fit the model's 3\n    shorten the completion"):
        encode_rows([row], TINY, DataSpec(on_too_long="truncate_prompt"), 0, 3)
    assert encode_rows([row], TINY, DataSpec(on_too_long="drop"), 0, 10)[0] == []
    assert "a.jsonl: 1 rows of more than 10 tokens left out" in caplog.text
    assert len(encode_rows([row], TINY, SPEC, 0, 12)[0]) == 1


def test_rows_too_long_are_left_out_only_when_asked_and_said(caplog):
    rows = [Row("p" * n, "c", source="ab"[n % 2], line=n) for n in range(12)]
    with caplog.at_level(logging.WARNING):
        items, report = encode_rows(rows, TINY, DataSpec(max_length=10, on_too_long="drop"), 0)
    assert len(items) == report.rows == 9
    assert report.dropped == {"a": 1, "b": 2}
    assert report.longest == 13
    assert "b: 2 rows of more than 10 tokens left out" in caplog.text


def test_prompts_are_cut_from_the_left_after_the_start_token(caplog):
    tokenizer = make_sentencepiece_tokenizer()
    spec = DataSpec(max_length=6, on_too_long="truncate_prompt")
    with caplog.at_level(logging.WARNING):
        (item,), report = encode_rows([Row("abcdabcd", "AB", source="f")], tokenizer, spec, 0)
    assert tokenizer.convert_ids_to_tokens(item.input_ids) == ["<s>", "c", "d", "A", "B", "</s>"]
    assert learned(item) == item.input_ids[3:]
    assert report.truncated == {"f": 1}
    assert "f: 1 rows of more than 6 tokens shortened from the left" in caplog.text


def test_neither_the_start_token_nor_what_is_learned_is_cut():
    tokenizer = make_sentencepiece_tokenizer()
    for max_length, fits in ((4, True), (3, False)):
        spec = DataSpec(max_length=max_length, on_too_long="truncate_prompt")
        if fits:
            item = encode(Row("abcd", "AB"), tokenizer, spec)
            assert tokenizer.convert_ids_to_tokens(item.input_ids) == ["<s>", "A", "B", "</s>"]
        else:
            with pytest.raises(HeadwaterError, match="what is learned of it does not fit"):
                encode(Row("abcd", "AB"), tokenizer, spec)


def test_what_is_learned_is_never_cut():
    spec = DataSpec(max_length=6, on_too_long="truncate_prompt")
    item = encode(Row("prompt", "12345"), spec=spec)
    assert TINY.decode(item.input_ids) == "12345<eos>"
    with pytest.raises(HeadwaterError, match="f:3: the row has 13 tokens; what is learned of it does not fit"):
        encode_rows([Row("prompt", "123456", source="f", line=3)], TINY, spec, 0)


@quick
@given(texts, completions, st.integers(2, 40))
def test_nothing_is_longer_than_it_may_be_and_cut_rows_end_alike(prompt, completion, max_length):
    whole = encode(Row(prompt, completion))
    spec = DataSpec(max_length=max_length, on_too_long="truncate_prompt")
    if len(learned(whole)) > max_length:
        with pytest.raises(HeadwaterError):
            encode(Row(prompt, completion), spec=spec)
    else:
        item = encode(Row(prompt, completion), spec=spec)
        assert len(item) == min(len(whole), max_length)
        assert item.input_ids == whole.input_ids[len(whole) - len(item) :]
        assert item.labels == whole.labels[len(whole) - len(item) :]


def test_a_tokenizer_without_an_end_token_is_refused():
    tokenizer = make_tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(HeadwaterError, match="no end token"):
        encode(Row("a", "b"), tokenizer)
