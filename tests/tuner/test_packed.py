"""Rows packed into one without padding: every method computes and learns what it does from a padded batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from headwater.training.packed import rows_apart

from .helpers import adapt, assert_near, gradients, tokens

LENGTHS = (10, 1, 6, 4)


def batches(row):
    """Four rows, padded and packed, as keywords of a forward; and which positions of the first are no padding."""
    x = tokens(rows=4, length=10)
    mask = (torch.arange(10) < torch.tensor(LENGTHS)[:, None]).long()
    labels = x.masked_fill(mask == 0, -100)
    labels[:3, ::2] = -100  # the last row is learned from its first token, so nothing of it is a prompt
    real = mask.bool()
    ids = {"headwater_task_ids": torch.tensor([0, 1, 2, 1])} if row.needs_task_ids else {}
    padded = {"input_ids": x.masked_fill(mask == 0, 258), "attention_mask": mask, "headwater_labels": labels}
    packed = {
        "input_ids": x[real][None],
        "position_ids": torch.arange(10).expand(4, -1)[real][None],
        "headwater_labels": labels[real][None],
        "headwater_row_lengths": LENGTHS,
    }
    return {**padded, **ids}, {**packed, **ids}, real


def check(row, base, device: str = "cpu", *, relative: float = 1e-4, **fields):
    """A padded and a packed batch give the same logits and gradients, in eval mode and in training."""
    model = adapt(row, base, **row.no_dropout, **fields).to(device)
    padded, packed, real = batches(row)
    padded, packed = ({k: v.to(device) if torch.is_tensor(v) else v for k, v in b.items()} for b in (padded, packed))
    target = torch.randint(0, 250, (sum(LENGTHS),)).to(device)
    for mode in (model.eval, model.train):
        mode()
        expected = model(**padded).logits[real.to(device)]
        F.cross_entropy(expected, target).backward()
        wanted = gradients(model)
        model.zero_grad()
        with rows_apart(model):
            found = model(**packed).logits[0]
            F.cross_entropy(found, target).backward()
        torch.testing.assert_close(found, expected, rtol=relative, atol=relative / 10)
        assert_near(gradients(model), wanted, relative=relative)
        model.zero_grad()


def test_packed_rows_are_the_rows(row, tiny_llama):
    check(row, tiny_llama(attn_implementation="sdpa"))
