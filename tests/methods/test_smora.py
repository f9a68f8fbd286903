"""SMoRA's properties, numbered as in its specification, against loops over tokens and ranks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
from adapted_linear import adapt, base_of, leaf, move, noise, parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from stock_trainer import train
from torch.nn.parallel import DistributedDataParallel

from headwater import HeadwaterError, NotMergeable, make_config, merge_with_gates, observe

quick = settings(max_examples=25, deadline=None)
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
d_in, d_out = 9, 10


def model_of(r=8, top_k=3, **fields):
    return adapt("smora", d_in, d_out, **{"r": r, "top_k": top_k, "lora_alpha": 3, **fields})


def branch_of(model):
    return model.base_model.model.layer.branches["default"]


def set_bias(model, values) -> None:
    branch_of(model).bias.copy_(torch.as_tensor(values))


def plain_layer(x, base, A, B, R, b, alpha, k, block, *, softmax=False, bias_in_gate=True):
    """A `(r, d_in)`, B `(r, d_out)`; R `(r / block, d_in)` and b `(r / block,)` are per block; k counts ranks."""
    rows = []
    for token in x:
        logit = [(R[j] * token).sum() for j in range(len(R))]
        score = logit if softmax else [1 / (1 + torch.exp(-z)) for z in logit]
        biased = [score[j] + b[j] for j in range(len(R))]
        chosen = sorted(range(len(R)), key=lambda j, q=biased: -float(q[j].detach()))[: k // block]
        value = {j: (biased if bias_in_gate else score)[j] for j in chosen}
        if softmax:
            value = {j: torch.exp(v) for j, v in value.items()}
        else:
            value = {j: v if v > 1e-6 else torch.tensor(1e-6) for j, v in value.items()}
        total = sum(value.values()) * block
        y = base(token)
        for j in chosen:
            gate = value[j] / (total.detach() if len(chosen) == 1 else total)
            for rank in range(j * block, (j + 1) * block):
                y = y + alpha * gate * (A[rank] @ token) * B[rank]
        rows.append(y)
    return torch.stack(rows)


@quick
@given(
    k=st.sampled_from([2, 4, 8]),
    block=st.sampled_from([1, 2]),
    gate=st.sampled_from(["sigmoid", "softmax"]),
    bias_in_gate=st.booleans(),
    lead=st.sampled_from([(6,), (2, 3), (2, 1, 3)]),
)
def test_property_3_dense_is_the_loop_in_value_and_every_gradient(k, block, gate, bias_in_gate, lead):
    model = move(model_of(top_k=k, rank_block=block, gate=gate, bias_in_gate=bias_in_gate), 1)
    set_bias(model, 0.2 * noise(8 // block, seed=5))
    A, B, R = (leaf(parameters(model)[name]) for name in ("A", "B", "router"))
    x, weight = noise(*lead, d_in), noise(*lead, d_out, seed=1)
    x_fused, x_plain = leaf(x), leaf(x.flatten(0, -2))
    how = {"softmax": gate == "softmax", "bias_in_gate": bias_in_gate}
    expected = plain_layer(x_plain, base_of(model), A, B, R, branch_of(model).bias, 3, k, block, **how)
    found = model(x_fused)
    torch.testing.assert_close(found.flatten(0, -2), expected, **CLOSE)
    (found * weight).sum().backward()
    (expected * weight.flatten(0, -2)).sum().backward()
    torch.testing.assert_close(x_fused.grad.flatten(0, -2), x_plain.grad, **CLOSE)
    for name, own in (("A", A), ("B", B), ("router", R)):
        torch.testing.assert_close(parameters(model)[name].grad, own.grad, **CLOSE)


def gates_of(model, x):
    seen = []
    with observe(model, lambda name, gate: seen.append(gate)):
        model(x)
    return seen[0]


@pytest.mark.parametrize("bias", [0.0, -2.0])
@pytest.mark.parametrize("fields", [{}, {"gate": "softmax"}, {"rank_block": 2, "top_k": 4}, {"bias_in_gate": False}])
def test_property_1_starts_at_the_base_and_gates_are_k_shares(fields, bias):
    """Also where the bias is below all scores: a sum of them near or under zero must not blow the gates up."""
    model, x = model_of(**fields), noise(2, 7, d_in)
    set_bias(model, torch.full_like(branch_of(model).bias, bias))
    assert torch.equal(model.train()(x), base_of(model)(x))
    gate = gates_of(model, x)
    torch.testing.assert_close(gate.sum(-1), torch.ones(2, 7))
    assert torch.all((gate > 0).sum(-1) == fields.get("top_k", 3) // fields.get("rank_block", 1))
    assert gate.min() >= 0


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_property_2_all_ranks_with_an_even_router_are_a_lora(gate):
    model, x = move(model_of(top_k=8, gate=gate), 2), noise(9, d_in)
    with torch.no_grad():
        parameters(model)["router"].zero_()
    A, B = parameters(model)["A"], parameters(model)["B"]
    torch.testing.assert_close(model(x), base_of(model)(x) + 3 / 8 * x @ A.T @ B, **CLOSE)


@pytest.mark.parametrize("k", [1, 3])
def test_property_4_unchosen_ranks_get_no_gradient(k):
    model, x = move(model_of(top_k=k), 3), noise(2, d_in)
    used = (gates_of(model, x) > 0).any(0)
    assert 0 < used.sum() < 8
    model(x).square().sum().backward()
    for name in ("A", "B", "router"):
        assert torch.equal(parameters(model)[name].grad.any(-1), used), name  # top-1 routers learn, too


def test_property_5_blocks_are_experts_of_moe_lora():
    """The same two matmuls: MoE-LoRA, top-2 of 4 experts, has softmax gates renormalised over the chosen."""
    model, x = move(model_of(rank_block=2, top_k=4, gate="softmax"), 4), noise(9, d_in)
    moe = adapt("moe_lora", d_in, d_out, r=2, lora_alpha=3, lora_dropout=0.0, num_experts=4, top_k=2)
    with torch.no_grad():
        parameters(moe)["A"].copy_(parameters(model)["A"].view(4, 2, d_in))
        parameters(moe)["B"].copy_(parameters(model)["B"].view(4, 2, d_out))
        parameters(moe)["router"].copy_(parameters(model)["router"])
    # its scale is alpha over an expert's rank, as is one rank's share of a block here
    torch.testing.assert_close(model(x), moe(x), **CLOSE)


def skewed(**fields):
    """A float32 model, in training, whose ranks 0 to 2 take every token but those without a first coordinate."""
    model = move(model_of(**{"bias_update_rate": 0.01, "dtype": torch.float32, **fields}), 5, size=0.1).train()
    with torch.no_grad():
        parameters(model)["router"].zero_()
        parameters(model)["router"][:3, 0] = torch.tensor([3.0, 2.0, 1.0])
    return model, torch.optim.SGD([parameters(model)["B"]], lr=0.1)


def positive(*shape):
    return noise(*shape, dtype=torch.float32).abs()


UP_DOWN = torch.tensor([-0.01] * 3 + [0.01] * 5)


def test_property_6_one_sign_step_per_optimiser_step_whatever_the_accumulation():
    model, optimiser = skewed()
    bias, x = branch_of(model).bias, positive(2, 4, d_in)
    assert not bias.requires_grad
    for _ in range(3):  # three micro-batches
        model(x).square().sum().backward()
        assert not bias.any()
    assert branch_of(model).counts.tolist() == [24] * 3 + [0] * 5
    optimiser.step()
    assert not bias.any()
    model(x)
    torch.testing.assert_close(bias, UP_DOWN)
    assert branch_of(model).counts.sum() == 2 * 4 * 3  # of the new step alone
    model(x)
    torch.testing.assert_close(bias, UP_DOWN)


def test_property_6_evaluation_does_not_count():
    model, optimiser = skewed()
    x = positive(2, 4, d_in)
    model(x).square().sum().backward()
    counts = branch_of(model).counts.clone()
    with torch.no_grad():
        model(x)  # in training mode, as when a trainer generates
    assert torch.equal(branch_of(model).counts, counts)
    optimiser.step()
    model.eval()(x)
    with torch.no_grad():
        model(x)
    assert torch.equal(branch_of(model).counts, counts)
    assert not branch_of(model).bias.any()
    model.train()(x)
    torch.testing.assert_close(branch_of(model).bias, UP_DOWN)


def test_property_6_half_precision_rounds_neither_counts_nor_nudges():
    """In bfloat16 a count stops at 256, and a nudge of 1e-5 is lost on a bias of 0.3."""
    model, optimiser = skewed(bias_update_rate=1e-5)
    set_bias(model, torch.full((8,), 0.3))
    start = branch_of(model).bias.clone()
    model.to(torch.bfloat16)
    assert torch.equal(branch_of(model).bias, start)
    for _ in range(300):
        model(positive(1, 1, d_in).bfloat16()).square().sum().backward()
    assert branch_of(model).counts.tolist() == [300] * 3 + [0] * 5
    optimiser.step()
    model(positive(1, 1, d_in).bfloat16())
    torch.testing.assert_close(branch_of(model).bias, start + UP_DOWN / 1000, rtol=0, atol=1e-7)


def test_property_6_padding_does_not_count():
    model, _ = skewed()
    model(positive(2, 4, d_in), attention_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]]))
    assert branch_of(model).counts.tolist() == [5] * 3 + [0] * 5


def test_property_6_no_balance_leaves_the_bias_alone():
    model, optimiser = skewed(balance="none")
    for _ in range(3):
        model(positive(2, 4, d_in)).square().sum().backward()
        optimiser.step()
    assert not branch_of(model).bias.any()
    assert not branch_of(model).counts.any()


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_property_6_recomputation_neither_counts_nor_moves(tiny_llama, mode):
    def run(checkpointed):
        config = make_config("smora", r=8, top_k=2, target_modules=["up_proj"], init_seed=0, bias_update_rate=0.01)
        model = move(get_peft_model(tiny_llama(), config), 1, size=0.1).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
            model.enable_input_require_grads()
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        ids = torch.arange(20).view(2, 10)
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        return {name: b.clone() for name, b in model.named_buffers() if name.endswith((".bias", ".counts"))}

    expected, found = run(False), run(True)
    assert len(expected) == 4
    for name, buffer in expected.items():
        assert torch.equal(found[name], buffer)
        assert buffer.any()
        assert not name.endswith("counts") or buffer.sum() == 20 * 2


def test_property_6_the_load_evens_out():
    model = adapt("smora", d_in, d_out, r=8, top_k=2, lora_alpha=1, bias_update_rate=0.01).train()
    optimiser = torch.optim.SGD([parameters(model)["B"]], lr=1e-3)
    with torch.no_grad():
        parameters(model)["router"].mul_(0.3)
        parameters(model)["router"][:, 0] += torch.linspace(0, 1, 8)

    def violation(seed):
        x = noise(200, d_in, seed=seed)
        x[:, 0] = 1
        load = (gates_of(model, x) > 0).double().sum(0)
        return (load.max() / load.mean() - 1).item(), x

    before, _ = violation(0)
    for step in range(150):
        _, x = violation(step)
        (model(x) - 1).square().mean().backward()
        optimiser.step()
    assert violation(1000)[0] < before / 3


def test_property_6_moves_when_compiled():
    model, optimiser = skewed()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        compiled(positive(2, 4, d_in)).square().sum().backward()
        optimiser.step()
    torch.testing.assert_close(branch_of(model).bias, UP_DOWN)


def _one_of_two_ranks(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model, optimiser = skewed()
    parallel = DistributedDataParallel(model)  # which copies the first rank's buffers before each forward
    x = positive(1, 2, d_in) * (1 if rank == 0 else -1)  # on rank 1, another three ranks win
    for length in (2, 1):
        parallel(x[:, :length]).square().sum().backward()
    counts = branch_of(model).counts.clone()
    optimiser.step()
    parallel(x)
    torch.save({"counts": counts, "bias": branch_of(model).bias}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_property_6_ranks_count_together(tmp_path):
    torch.multiprocessing.start_processes(_one_of_two_ranks, args=(str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["counts"][:3].tolist() == [3, 3, 3]
    assert first["counts"].sum() == 2 * 3 * 3
    for name in first:
        assert torch.equal(first[name], second[name])
    mean = first["counts"].mean()
    torch.testing.assert_close(first["bias"], 0.01 * torch.sign(mean - first["counts"]))


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_property_7_a_constant_on_every_bias_chooses_the_same(gate):
    x, outputs, chosen = noise(9, d_in), [], []
    for constant in (0.0, 0.3):
        model = move(model_of(gate=gate, bias_in_gate=False), 6)
        set_bias(model, constant + 0.1 * noise(8, seed=2))
        outputs.append(model(x))
        chosen.append(gates_of(model, x) > 0)
    assert torch.equal(*chosen)
    torch.testing.assert_close(*outputs, **CLOSE)


def test_property_8_order_of_ranks_batching_and_padding_do_not_matter():
    model, x = move(model_of(), 7), noise(3, 4, d_in)
    set_bias(model, 0.1 * noise(8, seed=2))
    expected, order = model(x), [3, 1, 7, 0, 2, 6, 5, 4]
    torch.testing.assert_close(torch.stack([model(row) for row in x.flatten(0, 1)]), expected.flatten(0, 1), **CLOSE)
    padded = torch.cat([torch.ones(3, 2, d_in, dtype=torch.float64), x], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]] * 3)
    torch.testing.assert_close(model(padded, attention_mask=mask)[:, 2:], expected, **CLOSE)
    with torch.no_grad():
        for p in (*parameters(model).values(), branch_of(model).bias):
            p.copy_(p[order].clone())
    torch.testing.assert_close(model(x), expected, **CLOSE)


@pytest.mark.parametrize("block", [1, 2])
def test_merging_only_with_fixed_gates(block):
    model, x = move(model_of(top_k=8, rank_block=block), 8), noise(7, d_in)
    with pytest.raises(NotMergeable, match="merge_with_gates"):
        model.merge_and_unload()
    with pytest.raises(HeadwaterError, match="one number per head"):
        merge_with_gates(model, {"layer": torch.ones(3)})
    with torch.no_grad():
        parameters(model)["router"].zero_()  # even gates, so merging is exact
    expected = model(x)
    by_hand = copy.deepcopy(model)
    even = {"layer": gates_of(model, x)[0]}
    torch.testing.assert_close(merge_with_gates(model, "uniform")(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merge_with_gates(by_hand, even)(x), expected, rtol=1e-5, atol=1e-5)


def test_starts_as_released():
    model = adapt("smora", 2048, 8, r=8, dtype=torch.float32)
    for name in ("A", "router"):
        p = parameters(model)[name]
        assert p.abs().max() <= 2048**-0.5
        assert p.std().item() == pytest.approx((3 * 2048) ** -0.5, rel=0.05)
    assert branch_of(model).scaling == 16  # alpha itself: alpha / k on gates that add up to k
    assert set(parameters(model)) == {"A", "B", "router"}


@pytest.mark.parametrize("accumulation", [1, 4])
def test_plain_trainer_moves_every_tensor_and_the_bias_once_a_step(tiny_llama, tmp_path, accumulation):
    """No callback, nothing overridden; each of 30 steps but the last has been followed by a forward."""
    u = 2.0**-12
    model, losses, still = train(
        tiny_llama(), tmp_path, "smora", accumulation=accumulation, r=8, top_k=2, bias_update_rate=u
    )
    assert sum(losses[-4:]) / 4 < losses[0] - 0.2
    assert not still
    biases = [b / u for name, b in model.named_buffers() if name.endswith(".bias")]
    assert len(biases) == 6
    for b in biases:
        assert torch.equal(b, b.round())
        assert 5 < b.abs().max() <= 29


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"r": 4}, "top_k"),
        ({"top_k": 0}, "top_k"),
        ({"gate": "x"}, "gate"),
        ({"balance": "x"}, "balance"),
        ({"bias_update_rate": -1.0}, "bias_update_rate"),
        ({"bias_update_rate": math.nan}, "bias_update_rate"),
        ({"rank_block": 0}, "rank_block"),
        ({"rank_block": 3}, "rank_block"),
        ({"rank_block": 4, "rank_pattern": {"up_proj": 6}}, "rank_block"),
        ({"use_rslora": True}, "use_rslora"),
    ],
)
def test_a_bad_value_is_one_problem_that_names_its_field(fields, where):
    with pytest.raises(HeadwaterError) as refused:
        make_config("smora", **fields)
    assert [problem.where for problem in refused.value.problems] == [where]
