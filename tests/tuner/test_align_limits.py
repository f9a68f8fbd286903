"""Which tasks of a batch the alignment loss compares: those of two rows and 4 r tokens, and no other has a say."""

from __future__ import annotations

import pytest
import torch

from headwater.methods.call import Call, State
from headwater.ops.alignment import kl_alignment, membership
from headwater.tuner import AlignLoss, AlignSpec

IDS = torch.tensor([0, 0, 1, 1, 2, 2])


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(spec, z, valid):
    """Of z `(rows, length, r)` where `valid` `(rows, length)` is True."""
    state = State(batch=len(IDS), length=z.shape[1], task_ids=IDS, valid=valid)
    return AlignLoss(spec, 1).loss(Call("layer", tuple(z.shape[:2]), state), z.flatten(0, 1))


@pytest.mark.parametrize("kind", ["kl", "mmd"])
def test_a_task_takes_part_from_4_r_tokens_on(kind):
    """r = 3; tasks 0 and 1 have 20 tokens each, task 2 has 12 or 11."""
    z, all_but_one = noise(6, 10, 3), torch.arange(10) < torch.tensor([10, 10, 10, 10, 6, 5]).unsqueeze(1)
    z[4:] += 3
    valid = torch.arange(10) < torch.tensor([10, 10, 10, 10, 6, 6]).unsqueeze(1)
    spec = AlignSpec(kind=kind)
    two = loss_of(spec, z, valid & (IDS < 2).unsqueeze(1))
    assert loss_of(spec, z, valid) > 1.2 * two
    torch.testing.assert_close(loss_of(spec, z, all_but_one), two)


def test_a_task_of_too_few_tokens_has_no_part_in_the_floor_under_variances():
    z = noise(6, 10, 3)
    z[:4, :, 2] *= 1e-4  # a nearly constant dimension, so that the floor matters
    z[2:4, :, 2] += 1e-3
    z[4:] *= 1e3
    valid = torch.arange(10) < torch.tensor([10, 10, 10, 10, 4, 4]).unsqueeze(1)
    member = membership(torch.arange(40) // 20, None, 2).double()
    torch.testing.assert_close(loss_of(AlignSpec(), z, valid), kl_alignment(z[:4].flatten(0, 1), member)[0, 1])
