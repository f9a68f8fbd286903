"""Padding."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.data.collate import Collator
from headwater.data.encode import Encoded

quick = settings(max_examples=60, deadline=None)


def test_a_batch_by_hand():
    rows = [Encoded([5, 0, 6], [-100, 0, 6], 2), Encoded([0], [0], 1)]
    batch = Collator(pad_token_id=0)(rows)
    expected = {
        "input_ids": [[5, 0, 6], [0, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 0, 6], [0, -100, -100]],
        "headwater_task_ids": [2, 1],
    }
    assert {key: value.tolist() for key, value in batch.items()} == expected
    assert {value.dtype for value in batch.values()} == {torch.int64}


@quick
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.sampled_from([None, 1, 8, 64]), st.integers(0, 9))
def test_rows_come_back_whole_whatever_the_padding(lengths, multiple, pad):
    rows = [Encoded(list(range(n)), [-100] * (n - 1) + [n - 1], n) for n in lengths]
    batch = Collator(pad, multiple)(rows)
    width = batch["input_ids"].shape[1]
    assert width % (multiple or 1) == 0
    assert 0 <= width - max(lengths) < (multiple or 1)
    for i, row in enumerate(rows):
        kept = batch["attention_mask"][i].bool()
        assert kept.sum() == len(row)
        assert batch["input_ids"][i, kept].tolist() == row.input_ids
        assert batch["labels"][i, kept].tolist() == row.labels
        assert (batch["labels"][i, ~kept] == -100).all()
        assert (batch["input_ids"][i, ~kept] == pad).all()
