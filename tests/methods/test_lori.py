"""LoRI's properties: dense and sparse, its masks, learning on top of another task."""

from __future__ import annotations

import pytest
import torch
from adapted_linear import adapt, base_of, leaf, move, noise, parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tiny_models import make_tiny_llama

from headwater import HeadwaterError, make_config
from headwater.methods.files import pack_bits, unpack_bits, write_tensors
from headwater.methods.lori import calibrate
from headwater.tuner import MethodLayer

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
FIELDS = {"r": 4, "lora_alpha": 8, "target_modules": ["gate_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def tiny(**fields):
    return get_peft_model(make_tiny_llama(), make_config("lori", **{"init_seed": 1, **FIELDS, **fields}))


def branches(model):
    return {m.name: m.branch("default") for m in model.modules() if isinstance(m, MethodLayer)}


def train(model, steps=4, weight_decay=0.0, seed=0):
    model.train()
    x = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=weight_decay)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def dense():
    return train(tiny())


@pytest.fixture
def mask_file(dense, tmp_path):
    write_tensors(calibrate(branches(dense)), tmp_path / "mask.safetensors", {})
    return str(tmp_path / "mask.safetensors")


def test_fused_is_the_equation_values_and_gradients():
    model = move(adapt("lori", 5, 6, r=2, lora_alpha=3), 1)
    x, weight, A = noise(4, 5), noise(4, 6, seed=1), base_of(model).weight.new_tensor(branches(model)["layer"].A)
    (B,) = parameters(model).values()
    plain_B, x_fused, x_plain = leaf(B), leaf(x), leaf(x)
    fused = model(x_fused)
    expected = torch.stack([base_of(model)(t) + 3 / 2 * (plain_B.T @ (A @ t)) for t in x_plain])
    torch.testing.assert_close(fused, expected, **CLOSE)
    (fused * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x_fused.grad, x_plain.grad, **CLOSE)
    torch.testing.assert_close(B.grad, plain_B.grad, **CLOSE)


def test_property_1_the_down_projection_is_never_trained_and_differs_between_tasks(dense):
    fresh, other = branches(tiny()), branches(tiny(init_seed=2))
    for name, branch in branches(dense).items():
        assert torch.equal(branch.A, fresh[name].A)
        assert branch.A.abs().max() <= branch.A.shape[1] ** -0.5
        assert not torch.equal(branch.A, other[name].A)
    dense.set_adapter("default")  # PEFT turns the gradients of parameters on here
    assert not any(b.A.requires_grad for b in branches(dense).values())


def test_property_1_the_down_projection_is_uniform_and_the_up_projection_zero():
    branch = branches(adapt("lori", 2048, 8, r=8, dtype=torch.float32))["layer"]
    assert branch.A.std().item() == pytest.approx((3 * 2048) ** -0.5, rel=0.03)
    assert not branch.B.any()


def test_property_2_one_threshold_for_all_layers(dense, mask_file):
    sparse = tiny(mask=mask_file, init_seed=9)
    x = torch.tensor([[1, 2, 3]])
    assert torch.equal(sparse.eval()(x).logits, make_tiny_llama()(x).logits)
    trained, kept, dropped, total = train(sparse, weight_decay=0.5), [], [], 0
    for name, branch in branches(trained).items():
        B = branches(dense)[name].B.detach().abs().flatten()
        inside = torch.zeros(B.numel(), dtype=torch.bool)
        inside[branch.index.long()] = True
        kept.append(B[inside])
        dropped.append(B[~inside])
        total += B.numel()
        assert not branch.writes().flatten()[~inside].any()
        assert branch.writes().any()
        assert torch.equal(branch.A, branches(dense)[name].A)  # the A for which the mask was found
    assert torch.cat(kept).min() >= torch.cat(dropped).max()
    assert torch.cat(kept).numel() == round(0.1 * total) == trained.get_nb_trainable_parameters()[0]


def test_property_3_a_full_mask_is_the_dense_method_step_for_step(dense, tmp_path):
    tensors = calibrate(branches(dense), 0.5)
    for name in [key for key in tensors if key.endswith(".mask")]:
        tensors[name] = torch.full_like(tensors[name], 255)
    write_tensors(tensors, tmp_path / "full.safetensors", {})
    everything = train(tiny(mask=str(tmp_path / "full.safetensors")))
    for name, branch in branches(everything).items():
        torch.testing.assert_close(branch.writes(), branches(dense)[name].B, rtol=1e-5, atol=1e-7)


def test_property_4_it_is_lora_under_a_mask_on_the_gradient(dense, mask_file):
    """As the released code trains: PEFT's LoRA with A frozen, B from zero, and B's gradient zero outside the mask."""
    sparse = tiny(mask=mask_file, init_seed=9)
    lora = get_peft_model(make_tiny_llama(), LoraConfig(**FIELDS))
    masks = {}
    for name, branch in branches(dense).items():
        layer = lora.get_submodule(f"base_model.model.{name}")
        layer.lora_A["default"].weight = torch.nn.Parameter(branch.A.clone(), requires_grad=False)
        masks[name] = torch.zeros(branch.B.numel())
        masks[name][branches(sparse)[name].index.long()] = 1
        masks[name] = masks[name].view_as(branch.B)
        layer.lora_B["default"].weight.register_hook(lambda grad, mask=masks[name].T: grad * mask)
    train(sparse)
    train(lora)
    for name, branch in branches(sparse).items():
        B = lora.get_submodule(f"base_model.model.{name}").lora_B["default"].weight.T
        torch.testing.assert_close(branch.writes(), B, rtol=1e-4, atol=1e-7)
        assert torch.equal(B != 0, masks[name] != 0)


def test_property_8_on_top_of_another_task_only_the_mask_changes(dense, mask_file, tmp_path):
    dense.save_pretrained(tmp_path / "first")
    first = {name: branch.B.detach().clone() for name, branch in branches(dense).items()}
    second = tiny(mask=mask_file, continue_from=str(tmp_path / "first"), init_seed=5)
    x = torch.tensor([[4, 5, 6]])
    torch.testing.assert_close(second.eval()(x).logits, dense(x).logits)
    train(second, weight_decay=0.5, seed=3)
    for name, branch in branches(second).items():
        inside = torch.zeros(first[name].numel(), dtype=torch.bool)
        inside[branch.index.long()] = True
        now, before = branch.writes().flatten(), first[name].flatten()
        assert torch.equal(now[~inside], before[~inside])
        assert not torch.equal(now[inside], before[inside])
        assert torch.equal(branch.A, branches(dense)[name].A)
    second.save_pretrained(tmp_path / "second")
    again = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / "second")
    assert torch.equal(again(x).logits, second(x).logits)


def test_continuing_takes_the_whole_adapter_under_the_same_scaling(dense, tmp_path):
    dense.save_pretrained(tmp_path / "first")
    first = str(tmp_path / "first")
    x = torch.tensor([[4, 5, 6]])
    torch.testing.assert_close(tiny(continue_from=first, init_seed=5).eval()(x).logits, dense(x).logits)
    with pytest.raises(HeadwaterError, match="continue_from: it has lora_alpha 8, this one 16"):
        tiny(continue_from=first, lora_alpha=16)
    with pytest.raises(HeadwaterError, match=r"it has alpha_pattern {}, this one {'down_proj': 4}"):
        tiny(continue_from=first, alpha_pattern={"down_proj": 4})
    with pytest.raises(HeadwaterError, match=r"layers that this adapter has not.* model\.layers\.0\.mlp\.down_proj"):
        tiny(continue_from=first, target_modules=["gate_proj"])
    with pytest.raises(HeadwaterError, match=r"layer model\.layers\.0\.mlp\.up_proj is missing there"):
        tiny(continue_from=first, target_modules=["gate_proj", "up_proj", "down_proj"])
    with pytest.raises(HeadwaterError, match="cannot be read"):
        tiny(continue_from=str(tmp_path / "nothing"))
    tiny(modules_to_save=["lm_head"]).save_pretrained(tmp_path / "more")
    with pytest.raises(HeadwaterError, match="modules trained in whole, which would be lost; the first is lm_head"):
        tiny(continue_from=str(tmp_path / "more"), modules_to_save=["lm_head"])


def test_an_adapter_of_a_float64_base_is_taken_over_without_rounding(tmp_path):
    def double(**fields):
        config = make_config("lori", **{"init_seed": 1, **FIELDS, **fields})
        return get_peft_model(make_tiny_llama().double(), config)

    x = torch.tensor([[4, 5, 6]])
    first = train(double())
    write_tensors(calibrate(branches(first), 0.5), tmp_path / "mask.safetensors", {})
    mask = str(tmp_path / "mask.safetensors")
    A = {name: branch.A for name, branch in branches(first).items()}
    assert all(torch.equal(branch.A, A[name]) for name, branch in branches(double(mask=mask, init_seed=2)).items())
    for number, before in enumerate((first, train(double(mask=mask)))):  # dense, and sparse
        before.save_pretrained(tmp_path / str(number))
        second = double(continue_from=str(tmp_path / str(number)), init_seed=5).eval()
        assert torch.equal(second(x).logits, before(x).logits)


def test_without_its_file_a_sparse_adapter_computes_nothing(mask_file, tmp_path):
    sparse = tiny(mask=mask_file)
    sparse.save_pretrained(tmp_path / "sparse")
    saved = PeftConfig.from_pretrained(tmp_path / "sparse")
    assert saved.mask is None
    assert len(saved.mask_sha256) == 64
    assert get_peft_model(make_tiny_llama(), saved)(torch.tensor([[1]])).logits.isnan().all()
    sparse.add_adapter("second", sparse.peft_config["default"])  # the same config again reads the file again


def test_property_7_updates_of_two_tasks_are_nearly_orthogonal_unless_they_share_a():
    wide = 512
    models = [move(adapt("lori", wide, 6, r=4, init_seed=seed), 1) for seed in (0, 1, 0)]
    first, second, same_a = (branches(model)["layer"].delta_weight().flatten() for model in models)
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(first, second, dim=0).abs() <= 5 / wide**0.5
    assert cosine(first, same_a, dim=0) > 0.99  # B is the same in all three


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 11), seed=st.integers(0, 99))
def test_property_9_packed_bits_come_back(rows, columns, seed):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.3
    packed = pack_bits(mask)
    assert packed.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpack_bits(packed, (rows, columns)), mask)


def test_the_sparse_adapter_needs_no_mask_file_to_load(mask_file, tmp_path):
    sparse = train(tiny(mask=mask_file))
    sparse.save_pretrained(tmp_path / "sparse")
    again = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / "sparse")
    x = torch.tensor([[7, 8, 9]])
    assert torch.equal(again(x).logits, sparse(x).logits)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(x).logits, sparse(x).logits, rtol=1e-5, atol=1e-5)


def test_property_10_masks_of_another_layout_are_refused(mask_file, tmp_path):
    with pytest.raises(
        HeadwaterError, match=r"another layout: layer model\.layers\.0\.mlp\.gate_proj needs .* \(2, 48, 32\)"
    ):
        tiny(mask=mask_file, r=2)
    with pytest.raises(HeadwaterError, match="layers that this adapter has not"):
        tiny(mask=mask_file, target_modules=["gate_proj"])
    with pytest.raises(HeadwaterError, match="no such layer"):
        tiny(mask=mask_file, target_modules=["gate_proj", "down_proj", "up_proj"])
    with pytest.raises(HeadwaterError, match="no such file"):
        tiny(mask=str(tmp_path / "none.safetensors"))
    (tmp_path / "text.safetensors").write_text("not tensors at all")
    with pytest.raises(HeadwaterError, match="not a readable safetensors file"):
        tiny(mask=str(tmp_path / "text.safetensors"))


def test_calibration_refuses_what_was_not_trained(dense):
    with pytest.raises(HeadwaterError, match="all zero"):
        calibrate(branches(tiny()))
    with pytest.raises(HeadwaterError, match="between 0 and 1"):
        calibrate(branches(dense), 1.0)
    with pytest.raises(HeadwaterError, match="LoRI-D"):
        calibrate({})
