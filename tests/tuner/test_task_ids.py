"""Task ids on their way to the layers. Oracle throughout: each row run alone, under its own id."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers import CLIPConfig, CLIPModel

import headwater
from headwater.tuner import context_of, needs_task_ids

from .helpers import adapt, assert_near, assert_same, gradients, tokens
from .rows import BY_ID, ROWS

CONDITIONED = [row for row in ROWS if row.needs_task_ids]


@pytest.fixture(params=CONDITIONED, ids=[row.id for row in CONDITIONED])
def model(request, tiny_llama):
    return adapt(request.param, tiny_llama())


def one_by_one(model, x, ids, **kwargs):
    with torch.no_grad():
        rows = []
        for n, task in enumerate(ids):
            part = {name: value[n : n + 1] for name, value in kwargs.items()}
            rows.append(model(input_ids=x[n : n + 1], headwater_task_ids=torch.tensor([task]), **part).logits)
    return torch.cat(rows)


def test_each_row_goes_by_its_own_task(model):
    x, ids = tokens(rows=4), [0, 2, 1, 2]
    expected = one_by_one(model, x, ids)
    assert not torch.allclose(expected, one_by_one(model, x, [1, 1, 1, 1]), atol=1e-3)
    with torch.no_grad():
        by_keyword = model(input_ids=x, headwater_task_ids=torch.tensor(ids)).logits
        with headwater.task_ids(model, ids):
            by_context = model(input_ids=x).logits
            by_position = model(x).logits
            embedded = model(inputs_embeds=model.get_input_embeddings()(x)).logits
            keyword_wins = model(input_ids=x, headwater_task_ids=torch.tensor([1, 1, 1, 1])).logits
        with headwater.task_ids(model, 2):
            one_for_all = model(input_ids=x).logits
    torch.testing.assert_close(by_keyword, expected, atol=1e-5, rtol=1e-5)
    for other in (by_context, by_position, embedded):
        assert torch.equal(other, by_keyword)
    torch.testing.assert_close(keyword_wins, one_by_one(model, x, [1, 1, 1, 1]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one_for_all, one_by_one(model, x, [2, 2, 2, 2]), atol=1e-5, rtol=1e-5)


def test_contexts_nest_and_end(model):
    x = tokens()
    with torch.no_grad(), headwater.task_ids(model, [0, 1]):
        outer = model(input_ids=x).logits
        with headwater.task_ids(model, [1, 0]):
            assert not torch.equal(model(input_ids=x).logits, outer)
        assert torch.equal(model(input_ids=x).logits, outer)
    with pytest.raises(headwater.HeadwaterError, match="none was given"):
        model(input_ids=x)


def test_a_failed_forward_leaves_no_ids_behind(model):
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((2, 3), 10_000), headwater_task_ids=torch.tensor([0, 1]))
    with pytest.raises(headwater.HeadwaterError, match="none was given"):
        model(input_ids=tokens())


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, r"needs the task of every row, and none was given.*\n.*headwater_task_ids=LongTensor\[batch\]"),
        ([0, 1, 2], "3 task ids do not fit a batch of 2 rows"),
        ([[0], [1]], r"one integer per row, shape \(batch,\), not \(2, 1\)"),
        ([0.0, 1.0], "not .* of torch.float32"),
        ([True, False], "of torch.bool"),
        ([], "one integer per row"),
        ([0, 3], "task id 3 is out of range: the adapter knows 3 tasks, 0 to 2"),
        ([-1, 0], "task id -1 is out of range"),
    ],
)
def test_wrong_ids_are_named(model, ids, message):
    with pytest.raises(headwater.HeadwaterError, match=message):
        model(input_ids=tokens(), headwater_task_ids=None if ids is None else torch.tensor(ids))
    if ids is not None:
        with pytest.raises(headwater.HeadwaterError, match=message), headwater.task_ids(model, ids):
            model(input_ids=tokens())


def test_fewer_ids_than_rows_are_not_guessed_outside_generation(model):
    """Chosen and rejected answers one below the other would need 0, 1, 0, 1, and beams 0, 0, 1, 1."""
    with pytest.raises(headwater.HeadwaterError, match="2 task ids do not fit a batch of 4 rows"):
        model(input_ids=tokens(rows=4), headwater_task_ids=torch.tensor([0, 1]))
    alone = model(input_ids=tokens(rows=4), headwater_task_ids=torch.tensor([1])).logits
    assert torch.equal(alone, model(input_ids=tokens(rows=4), headwater_task_ids=torch.ones(4).long()).logits)


@pytest.mark.parametrize("kind", [CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT])
def test_layers_that_pytorch_checkpoints_know_their_forward(model, kind):
    """As FSDP's users wrap them. Oracle: without checkpoints."""
    train_without_dropout(model)

    def loss():
        ids = torch.tensor([0, 2])
        return model(input_ids=tokens(), labels=tokens(), headwater_task_ids=ids, use_cache=False).loss

    loss().backward()
    expected = gradients(model)
    model.zero_grad()
    model.enable_input_require_grads()
    wrapper = functools.partial(checkpoint_wrapper, checkpoint_impl=kind)
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=wrapper, check_fn=lambda m: type(m).__name__.endswith("DecoderLayer")
    )
    context_of(model)._checkpointing = None  # wrapped before the first step
    loss().backward()
    found = gradients(model)
    assert_near({name.replace("_checkpoint_wrapped_module.", ""): g for name, g in found.items()}, expected)


@pytest.mark.parametrize("kind", [CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT])
def test_wrapped_layers_take_gradients_in_eval_mode_too(model, kind):
    model.enable_input_require_grads()
    wrapper = functools.partial(checkpoint_wrapper, checkpoint_impl=kind)
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=wrapper, check_fn=lambda m: type(m).__name__.endswith("DecoderLayer")
    )
    model(input_ids=tokens(), headwater_task_ids=torch.tensor([0, 2]), use_cache=False).logits.sum().backward()
    assert all(g.isfinite().all() for g in gradients(model).values())


def test_a_checkpoint_that_nobody_knows_is_named(model):
    train_without_dropout(model)
    for layer in model.get_base_model().model.layers:
        layer.forward = functools.partial(torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False)
    ids = torch.tensor([0, 2])
    loss = model(input_ids=tokens(), labels=tokens(), headwater_task_ids=ids, use_cache=False).loss
    unknown = "runs again in backward, by a checkpoint that headwater does not"
    with ThreadPoolExecutor(1) as other, pytest.raises(headwater.HeadwaterError, match=unknown):
        other.submit(loss.backward).result()  # as on a GPU, whose backward has a thread of its own


def train_without_dropout(model):
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout = 0.0
            module.penalty = 0.0
    model.train()


@pytest.mark.parametrize("mode", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_several_forwards_then_one_backward_keep_their_own_ids(model, mode):
    """Oracle: a backward of its own after each forward, without checkpointing."""

    def loss(n, ids):
        x = tokens(seed=n)
        return model(input_ids=x, labels=x, headwater_task_ids=torch.tensor(ids)).loss

    batches = [(0, [0, 1]), (1, [2, 0]), (2, [1, 1])]
    for n, ids in batches:  # in eval mode, where there is no dropout
        loss(n, ids).backward()
    expected = gradients(model)
    model.zero_grad()

    train_without_dropout(model)
    if mode is not None:
        model.gradient_checkpointing_enable({"use_reentrant": mode})
        model.enable_input_require_grads()
    total = sum(loss(n, ids) for n, ids in batches)
    with headwater.task_ids(model, [2, 2]):  # what holds at the time of the backward must not matter
        total.backward()
    assert_same(gradients(model), expected, atol=1e-6, rtol=1e-4)


def test_padding_side_and_masks_do_not_move_ids(model):
    x, ids = tokens(rows=3), [2, 0, 1]
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    mask[2, :1] = 0
    with torch.no_grad():
        found = model(input_ids=x, attention_mask=mask, headwater_task_ids=torch.tensor(ids)).logits
    expected = one_by_one(model, x, ids, attention_mask=mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_batch_of_tasks(data):
    from tiny_models import make_tiny_llama

    model = adapt(BY_ID["taskprobe"], make_tiny_llama())
    ids = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=5))
    x = tokens(rows=len(ids), length=data.draw(st.integers(1, 6)))
    with torch.no_grad():
        found = model(input_ids=x, headwater_task_ids=torch.tensor(ids)).logits
    torch.testing.assert_close(found, one_by_one(model, x, ids), atol=1e-5, rtol=1e-5)


def test_who_needs_ids(row, tiny_llama):
    base = tiny_llama()
    assert not needs_task_ids(base)
    assert needs_task_ids(adapt(row, base)) == row.needs_task_ids


def test_ids_are_welcome_where_nobody_needs_them(row, tiny_llama):
    """One data pipeline serves every method."""
    model = adapt(row, tiny_llama())
    with torch.no_grad():
        found = model(input_ids=tokens(), headwater_task_ids=torch.tensor([0, 1])).logits
        if not row.needs_task_ids:
            assert torch.equal(found, model(input_ids=tokens()).logits)


def test_a_model_without_an_adapter_is_told_so(tiny_llama):
    with pytest.raises(headwater.HeadwaterError, match="no headwater adapter"), headwater.task_ids(tiny_llama(), [0]):
        pass


def test_a_part_of_the_model_that_runs_by_itself_goes_by_the_ids_around_it():
    """CLIP's features of images, whose forward is not the model's."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**sizes, "image_size": 16, "patch_size": 8}, projection_dim=16,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = CLIPModel(config).eval()
    model = adapt(BY_ID["mtl_lora"], base, target_modules=["fc1", "fc2"], task_type=None)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def features(images, ids):
        with headwater.task_ids(model, ids):
            return model.get_image_features(pixel_values=images).pooler_output

    both = features(images, [0, 2])
    assert not torch.allclose(both, features(images, 1), atol=1e-3)
    for row, task in enumerate((0, 2)):
        torch.testing.assert_close(features(images[row : row + 1], task)[0], both[row], atol=1e-5, rtol=1e-5)
    with pytest.raises(headwater.HeadwaterError, match="3 task ids do not fit a batch of 2"):
        features(images, [0, 1, 2])
    with pytest.raises(headwater.HeadwaterError, match="none was given"):
        model.get_image_features(pixel_values=images)


@pytest.mark.parametrize("ids", [["first", "second"], "0", {"a": 1}, None])
def test_ids_that_are_no_numbers_are_named(model, ids):
    message = r"one integer per row, shape \(batch,\), not "
    with pytest.raises(headwater.HeadwaterError, match=message), headwater.task_ids(model, ids):
        pass
    if ids is not None:
        with pytest.raises(headwater.HeadwaterError, match=message):
            model(input_ids=tokens(), headwater_task_ids=ids)


def test_the_active_adapter_decides_whether_ids_are_needed(tiny_llama):
    base = tiny_llama()
    for name, method in (("with", "mtl_lora"), ("without", "rlora")):
        targets = ["up_proj"] if name == "with" else ["q_proj"]
        extra = {"num_tasks": 3} if name == "with" else {}
        base.add_adapter(headwater.make_config(method, target_modules=targets, **extra), name)
    for name in ("with", "without"):
        base.set_adapter(name)
        assert needs_task_ids(base) == (name == "with")
