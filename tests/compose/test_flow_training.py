"""How LoRA-Flow's gates are trained: its schedule, and every step against Adam written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from pool_support import make_pool
from tiny_models import make_tiny_llama

from headwater.compose import PooledModel
from headwater.compose.flow import FlowGate, FlowSpec, _rate, train_gates
from headwater.data.encode import Encoded

NAMES = ["plain", "rs", "patterns"]


def test_a_fifth_of_the_steps_warm_up_and_the_rest_is_half_a_cosine():
    falling = [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert [_rate(step, 10) for step in range(10)] == pytest.approx([0.5, 1.0, *falling])
    assert [_rate(step, 12) for step in range(3)] == pytest.approx([0.5, 1.0, 1.0])  # round(2.4) steps
    assert _rate(0, 1) == 1.0


def test_it_is_trained_as_the_paper_does_unless_told_otherwise():
    spec = FlowSpec()
    assert (spec.examples, spec.epochs, spec.learning_rate, spec.batch_size) == (200, 5, 1e-3, 4)


def made_rows():
    """Rows of other prompts and of completions of 1 to 5 tokens."""
    generator, rows = torch.Generator().manual_seed(3), []
    for i in range(7):
        prompt, completion = torch.randint(0, 256, (i + 5,), generator=generator).split([4, i + 1])
        completion = completion[:5]
        rows.append(Encoded([*prompt.tolist(), *completion.tolist()], [-100] * 4 + completion.tolist(), 0))
    return rows


def test_every_step_is_adam_on_the_mean_over_the_batch_s_completion_tokens(tmp_path):
    pool, rows = make_pool(tmp_path), made_rows()
    spec = FlowSpec(epochs=3, learning_rate=0.05, batch_size=3)
    gate, twin = (FlowGate(PooledModel(make_tiny_llama(), pool.load), NAMES, "plain") for _ in range(2))
    for made in (gate, twin):
        made.pooled.model.lm_head.weight.data *= 8  # gradients that some steps clip
    drawn = []

    def batches(module, args):
        of_ids = {tuple(row.input_ids): i for i, row in enumerate(rows)}
        unpadded = [tuple(t for t in ids if t != 258) for ids in args[0].tolist()]
        drawn.append([of_ids[ids] for ids in unpadded])

    hook = gate.pooled.model.model.embed_tokens.register_forward_pre_hook(batches)
    losses = train_gates(gate, rows, 258, spec)
    hook.remove()
    epochs = [[row for batch in drawn[at : at + 3] for row in batch] for at in (0, 3, 6)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 3
    assert epochs[0] != epochs[1] != epochs[2]

    parameters, clipped = list(twin.parameters()), 0
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for step, batch in enumerate(drawn):
        total = []
        for row in (rows[i] for i in batch):
            with twin.on():
                logits = twin.pooled.model(torch.tensor([row.input_ids])).logits[0]
            total.append(F.cross_entropy(logits[3:-1], torch.tensor(row.input_ids[4:]), reduction="none"))
        loss = torch.cat(total).mean()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-4)
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        clipped += bool(norm > 1)
        warm = min(1.0, (step + 1) / 2)
        rate = 0.05 * (warm if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 7)))
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                g = g / max(1.0, norm.item())
                m.mul_(0.9).add_(g * 0.1)
                v.mul_(0.95).add_(g * g * 0.05)
                m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.95 ** (step + 1))
                p -= rate * m_hat / (v_hat.sqrt() + 1e-5)
    assert 0 < clipped < len(drawn)
    for mine, plain in zip(gate.parameters(), parameters, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-4)
