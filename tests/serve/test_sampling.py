"""Tokens are drawn from the right distribution, and text is sent when it is sure and not before."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_tiny_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from headwater.errors import HeadwaterError
from headwater.evaluation.generate import decode
from headwater.serve.sampling import Sampling, Text, pick

TOKENIZER = make_tiny_tokenizer()


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("field", [{"max_tokens": 0}, {"temperature": -1.0}, {"temperature": math.nan}, {"top_p": 0.0}])
def test_numbers_out_of_range_are_refused(field):
    ((name, value),) = field.items()
    with pytest.raises(HeadwaterError, match=f"{name}: {value} is out of range"):
        Sampling(**field)


def test_draws_follow_temperature_and_top_p():
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, 1.9])
    p = torch.softmax(logits.double() / 0.7, -1)  # in order of size: 0, 4, 1, 2, 3
    kept = torch.zeros(5, dtype=torch.float64)
    kept[[0, 4]] = p[[0, 4]]
    assert p[0] < 0.6 < p[0] + p[4]
    for top_p, expected in ((1.0, p), (0.6, kept / kept.sum())):
        sampling = Sampling(temperature=0.7, top_p=top_p, seed=1)
        generator = sampling.generator()
        counts = torch.bincount(torch.tensor([pick(logits, sampling, generator) for _ in range(4000)]), minlength=5)
        assert (counts / 4000 - expected).abs().max() < 0.03
        assert not counts[expected == 0].any()
    assert pick(logits, Sampling(temperature=0), sampling.generator()) == 0
    assert pick(logits, Sampling(temperature=1, top_p=1e-9), sampling.generator()) == 0


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_a_seed_draws_the_token_that_its_number_falls_on(top_p):
    logits, sampling = torch.randn(400), Sampling(temperature=1.3, top_p=top_p, seed=3)
    logits[[0, 7, 399]] = -torch.inf
    weights = [math.exp(z / 1.3) for z in logits.tolist()]
    left = list(enumerate(weights))
    if top_p < 1:
        left, made_up = [], 0.0
        for i, weight in sorted(enumerate(weights), key=lambda pair: -pair[1]):
            if made_up < top_p * sum(weights):
                left.append((i, weight))
            made_up += weight
        assert 10 < len(left) < 390
    ours, theirs, seen = sampling.generator(), sampling.generator(), set()
    for _ in range(100):
        place = float(torch.rand((), dtype=torch.float64, generator=theirs)) * sum(weight for _, weight in left)
        passed = 0.0
        for i, weight in left:
            passed += weight
            if passed > place:
                seen.add(i)
                assert pick(logits, sampling, ours) == i
                break
    assert len(seen) > 10


@pytest.mark.parametrize(("u", "token"), [(0.0, 1), (1 - 2**-53, 3)])
@pytest.mark.parametrize("top_p", [1.0, 0.999])
def test_the_ends_of_what_can_be_drawn_are_tokens_that_can_be_had(monkeypatch, u, token, top_p):
    monkeypatch.setattr(torch, "rand", lambda *_, dtype, **__: torch.tensor(u, dtype=dtype))
    logits = torch.tensor([-torch.inf, 0.3, 0.2, 0.1, -torch.inf])
    assert pick(logits, Sampling(temperature=1.0, top_p=top_p), torch.Generator()) == token


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_a_token_costs_one_random_number_whatever_the_vocabulary(top_p):
    """A number for every token of a large vocabulary takes longer to draw than all the rest."""
    after = []
    for size in (1, 10, 5000):
        generator = Sampling(seed=5).generator()
        pick(torch.randn(size), Sampling(temperature=1.0, top_p=top_p), generator)
        after.append(torch.rand((), dtype=torch.float64, generator=generator))
    generator = Sampling(seed=5).generator()
    torch.rand((), dtype=torch.float64, generator=generator)
    assert after == [torch.rand((), dtype=torch.float64, generator=generator)] * 3


def feed(tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[str, list[str], bool]:
    text, pieces = Text(TOKENIZER, stop), []
    for token in tokens:
        pieces.append(text.add(token))
        if text.stopped:
            break
    pieces.append(text.finish())
    return "".join(pieces), pieces, text.stopped


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 258), max_size=30))
def test_the_pieces_are_the_text(tokens):
    assert feed(tokens)[0] == decode(TOKENIZER, tokens)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="abé€", max_size=20), st.lists(st.text(alphabet="abé€", min_size=1, max_size=4), max_size=3))
def test_stop_texts_cut_where_they_first_occur(text, stop):
    """Oracle: cut as soon as the text so far, character by character, holds one of them."""
    expected = text
    for end in range(len(text) + 1):
        found = [text[:end].find(s) for s in stop if s in text[:end]]
        if found:
            expected = text[: min(found)]
            break
    got, pieces, stopped = feed(ids(text), tuple(stop))
    assert got == expected
    assert stopped == any(s in text for s in stop)
    assert all("\ufffd" not in piece for piece in pieces)


def test_nothing_is_held_that_cannot_become_a_stop_text():
    _, pieces, _ = feed(ids("abcde"), ("cx",))
    assert pieces == ["a", "b", "", "cd", "e", ""]
    _, pieces, _ = feed(ids("a€b"))
    assert pieces == ["a", "", "", "€", "b", ""]


@pytest.mark.parametrize("tokens", [[0xE2, 0x82], [0xFF]])
def test_bytes_that_never_become_a_character_come_at_the_end(tokens):
    tokens = [TOKENIZER.convert_tokens_to_ids(c) for c in ("â", "Ĥ")][: len(tokens)]
    got, pieces, _ = feed(tokens)
    assert got == decode(TOKENIZER, tokens)
    assert pieces[-1] == got


def test_a_token_by_itself_keeps_the_space_that_it_begins_with():
    """As in Llama 2, whose decoder drops a text's first space."""
    words = ["▁the", "▁cat", "s", "a", "▁", "</s>"]
    plain = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    plain.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    text = Text(PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>"), ())
    spelled = []
    for token in (0, 1, 2, 4, 0, 5):
        spelled.append(text.spelled(token))
        text.add(token)
    assert spelled == ["the", " cat", "s", " ", " the", "</s>"]
