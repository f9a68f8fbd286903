"""Every method on a GPU, where there is one: it computes what it computes on the CPU, and trains in bfloat16.

`HEADWATER_TEST_DEVICE=cpu` runs the same tests on the CPU, to see that they hold together.
"""

from __future__ import annotations

import os

import pytest
import torch
from peft import PeftModel, get_peft_model

import headwater
from headwater.base_model import load_to_run, own_device
from headwater.evaluation import generate_text
from headwater.evaluation.forward import evaluating
from headwater.evaluation.likelihood import choice_log_probs, completion_losses
from headwater.methods.lori import calibrate
from headwater.ops import dropout
from headwater.tuner import MethodLayer

from . import test_packed
from .helpers import adapt, assert_near, gradients, logits, stir, task_kwargs, tokens

DEVICE = os.environ.get("HEADWATER_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU")
STATIC = {"cache_implementation": "static", "disable_compile": True}
ALL_LINEAR = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


def gentle(row, alpha: float) -> dict[str, float]:
    """SMoRA's scale is alpha itself: a large one drives its sigmoids to 1, where rounding decides."""
    return {"lora_alpha": alpha if row.alpha_over_rank else 0.5}


def run(row, model, device: str):
    """Logits, loss and gradients of one training step under seeds that are the same on every device."""
    x = tokens(rows=3, length=11).to(device)
    torch.manual_seed(0)
    out = model.to(device).train()(input_ids=x, labels=x, **on(device, task_kwargs(row, 3)))
    model.zero_grad()
    out.loss.backward()
    found = {name: grad.cpu() for name, grad in gradients(model).items()}
    return out.logits.detach().cpu(), found


def on(device: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@pytest.mark.parametrize("ops", ["", "reference"])
def test_it_computes_what_it_computes_on_the_cpu(row, tiny_llama, monkeypatch, ops):
    monkeypatch.setenv("HEADWATER_OPS", ops)
    model = adapt(row, tiny_llama(), target_modules=ALL_LINEAR, **row.no_dropout, **row.smooth, **gentle(row, 8))
    expected, expected_gradients = run(row, model, "cpu")
    found, found_gradients = run(row, model, DEVICE)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert_near(found_gradients, expected_gradients, relative=1e-3)


def test_all_implementations_draw_the_same_dropout(row, tiny_llama, monkeypatch):
    model = adapt(row, tiny_llama(), target_modules=ALL_LINEAR, **row.smooth, **gentle(row, 8))
    # A GPU's seeds for the layers of a gated block, drawn at once, are others than one layer's after the other's.
    monkeypatch.setattr(dropout, "draw_seed", lambda device, count=1: torch.randint(2**62, (count,)).to(device))
    monkeypatch.setenv("HEADWATER_OPS", "reference")
    expected, expected_gradients = run(row, model, DEVICE)
    for ops in ("autograd", ""):
        monkeypatch.setenv("HEADWATER_OPS", ops)
        found, found_gradients = run(row, model, DEVICE)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        assert_near(found_gradients, expected_gradients, relative=1e-3)


def test_packed_rows_are_the_rows(row, tiny_llama):
    base = tiny_llama(attn_implementation="sdpa")
    test_packed.check(row, base, DEVICE, relative=1e-3, **row.smooth, **gentle(row, 8))


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_it_trains_in_bfloat16(row, tiny_llama, checkpointing):
    model = adapt(row, tiny_llama().bfloat16(), stirred=False, target_modules=ALL_LINEAR).to(DEVICE).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    x, losses = tokens(rows=3, length=11).to(DEVICE), []
    for _ in range(30):
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(input_ids=x, labels=x, use_cache=False, **on(DEVICE, task_kwargs(row, 3))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1, losses


def test_it_trains_in_float16_under_a_gradient_scaler(row, tiny_llama):
    model = adapt(row, tiny_llama(), stirred=False, target_modules=ALL_LINEAR).to(DEVICE).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
    x, losses = tokens(rows=3, length=11).to(DEVICE), []
    for _ in range(30):
        with torch.autocast(DEVICE, torch.float16):
            loss = model(input_ids=x, labels=x, use_cache=False, **on(DEVICE, task_kwargs(row, 3))).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1, losses
    assert scaler.get_scale() == 2.0**10  # never lowered: no gradient overflowed


def test_saved_and_loaded_it_is_the_same(row, tiny_llama, tmp_path):
    model = adapt(row, tiny_llama()).to(DEVICE).eval()
    expected = logits(row, model, tokens().to(DEVICE))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama().to(DEVICE), tmp_path)
    assert {p.device.type for p in loaded.parameters()} == {torch.device(DEVICE).type}
    assert torch.equal(logits(row, loaded, tokens().to(DEVICE)), expected)


@pytest.mark.parametrize("how", [{"do_sample": False}, {"num_beams": 3}, STATIC])
def test_it_writes_what_it_writes_on_the_cpu(row, tiny_llama, how):
    model = adapt(row, tiny_llama(), **gentle(row, 64), **row.no_dropout).eval()
    x, asked = tokens(rows=3), {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 258, **how}
    expected = model.generate(input_ids=x, **task_kwargs(row, 3), **asked)
    found = model.to(DEVICE).generate(input_ids=x.to(DEVICE), **on(DEVICE, task_kwargs(row, 3)), **asked)
    assert torch.equal(found.cpu(), expected)


def test_it_merges(row, tiny_llama):
    if not row.mergeable:
        pytest.skip("has no single weight")
    model = adapt(row, tiny_llama()).to(DEVICE).eval()
    expected = logits(row, model, tokens().to(DEVICE))
    found = logits(row, model.merge_and_unload(), tokens().to(DEVICE))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_static_cache_is_compiled_by_default(row, tiny_llama):
    if row.label or row.name not in ("rlora", "cond_mixlora"):
        pytest.skip("minutes of compiling; one of each kind will do")
    model = adapt(row, tiny_llama(), lora_alpha=64, **row.no_dropout).eval().to(DEVICE)
    asked = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 258, "do_sample": False}
    for seed in (0, 1):  # the second prompt in the first one's cache
        x = tokens(rows=3, seed=seed).to(DEVICE)
        found = model.generate(input_ids=x, cache_implementation="static", **asked)
        assert torch.equal(found, model.generate(input_ids=x, **asked))


@pytest.mark.slow
def test_it_compiles(row, tiny_llama):
    if row.label or row.name not in ("rlora", "mlora", "moe_lora"):
        pytest.skip("minutes of compiling; one of each kind will do")
    model = adapt(row, tiny_llama(), target_modules=["up_proj", "down_proj"], **row.no_dropout, **row.smooth)
    stir(model, seed=1)
    expected, expected_gradients = run(row, model, DEVICE)
    found, found_gradients = run(row, torch.compile(model), DEVICE)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    plain = {name.replace("_orig_mod.", ""): grad for name, grad in found_gradients.items()}
    assert_near(plain, expected_gradients, relative=1e-3)


def test_a_mask_is_calibrated_where_the_adapter_was_trained(tiny_llama):
    model = get_peft_model(tiny_llama(), headwater.make_config("lori", target_modules=["up_proj"], init_seed=0))
    stir(model)
    expected = calibrate({m.name: m.branch("default") for m in model.modules() if isinstance(m, MethodLayer)}, 0.9)
    model.to(DEVICE)
    found = calibrate({m.name: m.branch("default") for m in model.modules() if isinstance(m, MethodLayer)}, 0.9)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_commands_run_their_models_here(tiny_llama, tiny_tokenizer, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_to_run(str(tmp_path), own_device(use_cpu=DEVICE == "cpu"))
    assert {p.device.type for p in model.parameters()} == {torch.device(DEVICE).type}
    (text,) = generate_text(model, tokenizer, ["one"], max_new_tokens=4, temperature=1.0)
    assert isinstance(text, str)
    with evaluating(model):
        choices = choice_log_probs(model, [[1, 2, 3], [4]], [[[5, 6], [5, 7]], [[8], [9, 10]]], fill=0)
        losses = completion_losses(model, [[1, 2, 3], [4, 5]], [[-100, 2, 3], [-100, 5]], fill=0)
        model.cpu()
        assert_lists(choices, choice_log_probs(model, [[1, 2, 3], [4]], [[[5, 6], [5, 7]], [[8], [9, 10]]], fill=0))
        assert_lists(losses, completion_losses(model, [[1, 2, 3], [4, 5]], [[-100, 2, 3], [-100, 5]], fill=0))


def assert_lists(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-3)
