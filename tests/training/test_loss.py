"""The loss on completions against the plain one: all logits, then cross-entropy in transformers' own way."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from headwater.training.loss import CompletionHead, completion_losses, count_items, loss_positions

SMALL = {
    "vocab_size": 120,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "attn_implementation": "eager",
}


def gemma2():
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=0.3, query_pre_attn_scalar=8))


def gemma3():
    return Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, final_logit_softcapping=0.3, query_pre_attn_scalar=8))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=120, n_embd=16, n_layer=2, n_head=2, n_positions=64))


def batch(seed=0, vocabulary=120):
    """Five padded rows of prompt and completion; the last has no completion."""
    generator = torch.Generator().manual_seed(seed)
    prompts, completions = [3, 1, 7, 2, 5], [1, 6, 2, 9, 0]
    width = max(map(sum, zip(prompts, completions, strict=True)))
    ids = torch.randint(vocabulary, (5, width), generator=generator)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        labels[row, prompt : prompt + completion] = ids[row, prompt : prompt + completion]
        mask[row, : prompt + completion] = 1
    return {"input_ids": ids, "attention_mask": mask}, labels


def plain_loss(logits, labels, per_example):
    """Row by row, position by position."""
    rows = []
    for row_logits, row_labels in zip(logits, labels, strict=True):
        losses = [
            -F.log_softmax(row_logits[s - 1], -1)[row_labels[s]]
            for s in range(1, len(row_labels))
            if row_labels[s] >= 0
        ]
        if losses:
            rows.append(torch.stack(losses))
    if per_example:
        return torch.stack([row.mean() for row in rows]).mean()
    return torch.cat(rows).mean()


def selected_loss(model, inputs, labels, per_example):
    places = loss_positions(labels)
    index, lengths = places["completion_index"], places["completion_lengths"]
    head = CompletionHead(model)
    with head.at(index):
        logits = model(**inputs).logits
    head.remove()
    losses = completion_losses(head.rows(logits, index), labels, index, lengths, per_example=per_example)
    return losses.sum() / count_items(lengths, per_example=per_example).sum(), logits


@pytest.mark.parametrize("per_example", [True, False])
@pytest.mark.parametrize("make", [gemma2, gemma3, gpt2])
def test_loss_and_gradients_equal_those_of_full_logits(make, per_example):
    torch.manual_seed(0)
    model = make().double().eval()
    inputs, labels = batch()
    expected = plain_loss(model(**inputs).logits, labels, per_example)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss, logits = selected_loss(model, inputs, labels, per_example)
    loss.backward()
    assert logits.shape[:2] == (1, int((labels[:, 1:] != -100).sum()))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-8)


def test_token_mode_is_transformers_own_loss(tiny_llama):
    model = tiny_llama()
    inputs, labels = batch()
    loss, _ = selected_loss(model, inputs, labels, per_example=False)
    torch.testing.assert_close(loss, model(**inputs, labels=labels).loss, rtol=1e-6, atol=0)


def test_a_head_that_is_not_called_as_a_module_is_served_from_full_logits(tiny_llama, monkeypatch):
    model = tiny_llama()
    inputs, labels = batch()
    monkeypatch.setattr(model, "get_output_embeddings", lambda: torch.nn.Linear(32, 120))
    loss, logits = selected_loss(model, inputs, labels, per_example=False)
    assert logits.shape[:2] == labels.shape
    torch.testing.assert_close(loss, plain_loss(logits, labels, False), rtol=1e-6, atol=0)


def test_hook_leaves_other_forwards_alone_and_goes_away(tiny_llama):
    model = tiny_llama()
    inputs, labels = batch()
    expected = model(**inputs).logits
    head = CompletionHead(model)
    with head.at(loss_positions(labels)["completion_index"]):
        model(**inputs)
    assert torch.equal(model(**inputs).logits, expected)
    head.remove()
    assert not model.lm_head._forward_pre_hooks


def test_batch_without_completions_has_loss_zero_and_a_gradient(tiny_llama):
    model = tiny_llama()
    inputs, labels = batch()
    labels[:] = -100
    places = loss_positions(labels)
    head = CompletionHead(model)
    with head.at(places["completion_index"]):
        logits = model(**inputs).logits
    losses = completion_losses(
        head.rows(logits, places["completion_index"]),
        labels,
        places["completion_index"],
        places["completion_lengths"],
        per_example=True,
    )
    losses.sum().backward()
    assert losses.tolist() == [0.0] * 5
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=5))
def test_positions_are_those_before_each_label(rows):
    labels = torch.tensor([[7 if here else -100 for here in row] for row in rows])
    places = loss_positions(labels)
    expected = [r * 6 + s - 1 for r, row in enumerate(rows) for s in range(1, 6) if row[s]]
    assert places["completion_index"].tolist() == expected
    assert places["completion_lengths"].tolist() == [sum(row[1:]) for row in rows]
