"""Chain of LoRA's properties: what a knot changes and what it must not."""

from __future__ import annotations

import re
from copy import deepcopy
from itertools import repeat
from pathlib import Path

import pytest
import torch
from adapted_linear import adapt, base_of, leaf, move, noise, parameters
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import make_tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerState, TrainingArguments

from headwater import HeadwaterError, make_config
from headwater.training import MethodCallback
from headwater.tuner import MethodLayer

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
d_in, d_out = 6, 7
SMALL = {"r": 2, "target_modules": ["gate_proj"], "task_type": "CAUSAL_LM"}


def model_of(**fields):
    return adapt("cola", d_in, d_out, **{"r": 2, "lora_alpha": 6, "num_links": 3, "knots": [2, 4], **fields})


def branch_of(model):
    return model.base_model.model.layer.branch("default")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"r": 3, "link_ranks": [3, 2, 1]},
        {"r": 3, "link_ranks": [3, 2, 1], "alpha_mode": "fixed_alpha"},
        {"r": 3, "link_ranks": [3, 2, 1], "alpha_mode": "fixed_alpha", "use_rslora": True},
        {"train_factor": "A"},
        {"train_factor": "B"},
    ],
)
def test_fused_is_the_equation_and_properties_1_and_4(fields):
    model, x = model_of(**fields), noise(4, d_in)
    branch, links = branch_of(model), []
    ranks = branch.ranks
    torch.testing.assert_close(model(x), base_of(model)(x), **CLOSE)
    for link in range(3):
        generator = torch.Generator().manual_seed(link)
        with torch.no_grad():  # as training would move the link: only its own ranks
            for p in parameters(model).values():
                p[: ranks[link]] += torch.randn(p[: ranks[link]].shape, generator=generator, dtype=p.dtype)
        rank = ranks[link if branch.config.alpha_mode == "fixed_alpha" else 0]
        s = 6 / (rank**0.5 if branch.config.use_rslora else rank)
        links.append((s, leaf(branch.A[: ranks[link]]), leaf(branch.B[: ranks[link]])))
        expected = torch.stack(
            [base_of(model)(t) + sum(s_i * (B_i.T @ (A_i @ t)) for s_i, A_i, B_i in links) for t in x]
        )
        torch.testing.assert_close(model(x), expected, **CLOSE)
        if link < 2:
            assert branch.after_step(2 * link + 2, 6)
            assert not branch.after_step(2 * link + 2, 6), "a knot is tied once"
            torch.testing.assert_close(model(x), expected, **CLOSE)
    delta = branch.delta_weight()
    torch.testing.assert_close(delta, sum(s * (B.T @ A) for s, A, B in links), **CLOSE)
    assert torch.linalg.matrix_rank(delta) <= sum(ranks)


def test_gradients_reach_the_current_link_only():
    model, x, weight = move(model_of(), 1), noise(4, d_in), noise(4, d_out, seed=1)
    branch = branch_of(model)
    tied = (branch.scaling * branch.B.T @ branch.A).detach()
    branch.tie()
    move(model, 2)
    A, B = leaf(branch.A), leaf(branch.B)
    (model(x) * weight).sum().backward()
    expected = base_of(model)(x) + x @ tied.T + branch.scaling * (x @ A.T @ B)
    (expected * weight).sum().backward()
    torch.testing.assert_close(branch.A.grad, A.grad, **CLOSE)
    torch.testing.assert_close(branch.B.grad, B.grad, **CLOSE)
    assert set(parameters(model)) == {"A", "B"}


def test_dropout_is_on_the_input_of_the_current_link_alone():
    model, x = move(model_of(lora_dropout=0.5), 1), noise(30, d_in)
    branch_of(model).tie()  # the new link writes nothing yet
    expected = model(x)
    assert (expected - base_of(model)(x)).abs().max() > 0.1
    torch.testing.assert_close(model.train()(x), expected, **CLOSE)
    move(model, 2)
    assert (model(x) - model.eval()(x)).abs().max() > 0.1


def test_property_5_a_new_link_starts_fresh():
    branch = branch_of(move(model_of(), 3))
    first = branch.A.detach().clone()
    branch.tie()
    assert not branch.B.any()
    assert not torch.equal(branch.A, first)
    same = branch_of(model_of(reinit_a="same", init_seed=0))
    start = same.A.detach().clone()
    same.tie()
    assert torch.equal(same.A, start)


@pytest.mark.parametrize(("trained", "frozen", "bound"), [("A", "B", 2**-0.5), ("B", "A", d_in**-0.5)])
def test_of_one_trained_factor_the_other_is_random(trained, frozen, bound):
    """Both zero, or the trained one random, and the chain could never learn."""
    branch = branch_of(model_of(train_factor=trained))
    assert [name for name, _ in branch.named_parameters()] == [trained]
    for link in range(3):
        assert not getattr(branch, trained).any()
        assert 0.6 * bound < getattr(branch, frozen).abs().max() <= bound
        branch.after_step(2 * link + 2, 6)


def test_smaller_links_leave_no_trace_in_the_ranks_they_lack():
    model = model_of(r=3, link_ranks=[3, 1, 1])
    branch, x = branch_of(model), noise(8, d_in)
    branch.tie()
    optimizer = torch.optim.AdamW(parameters(model).values(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - noise(8, d_out, seed=4)).square().sum().backward()
        optimizer.step()
    assert branch.B[:1].any()
    assert not branch.A[1:].any()
    assert not branch.B[1:].any()


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, n):
        row = torch.randint(0, 250, (7,), generator=torch.Generator().manual_seed(n))
        return {"input_ids": row, "labels": row}


def run(method, folder, *, steps=6, seen=None, resume=None, arguments=None, **fields):
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["gate_proj"], "task_type": "CAUSAL_LM"}
    config = LoraConfig(**config) if method == "lora" else make_config(method, init_seed=1, **{**config, **fields})
    model = get_peft_model(make_tiny_llama(), config)
    if method == "lora":
        with torch.no_grad():  # the same start
            other = get_peft_model(
                make_tiny_llama(), make_config("cola", num_links=1, init_seed=1, **fields_of(config))
            )
            for name, module in other.named_modules():
                if isinstance(module, MethodLayer):
                    model.get_submodule(name).lora_A["default"].weight.copy_(module.branch("default").A)
    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        disable_tqdm=True, use_cpu=True, save_steps=1, logging_steps=1, seed=1, save_strategy="steps",
        **(arguments or {}),
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=Rows(), callbacks=[MethodCallback(), *([seen] if seen else [])])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def fields_of(config):
    return {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": config.target_modules}


def weights(trainer):
    return {n: t.clone() for n, t in trainer.model.state_dict().items() if "_branch" in n}


def logged(trainer, key):
    return [line[key] for line in trainer.state.log_history if key in line]


def test_property_2_one_link_is_lora(tmp_path):
    chain, lora = run("cola", tmp_path / "cola", num_links=1), run("lora", tmp_path / "lora")
    assert logged(chain, "loss") == pytest.approx(logged(lora, "loss"), rel=1e-5)
    layers = [m for m in chain.model.modules() if isinstance(m, MethodLayer)]
    assert layers
    for layer in layers:
        plain, branch = lora.model.get_submodule(f"base_model.model.{layer.name}"), layer.branch("default")
        torch.testing.assert_close(branch.A, plain.lora_A["default"].weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(branch.B.T, plain.lora_B["default"].weight, rtol=1e-5, atol=1e-6)


def test_knots_in_a_plain_trainer(tmp_path):
    from transformers import TrainerCallback

    class Seen(TrainerCallback):
        def __init__(self):
            self.links, self.empty = [], []

        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            layer = next(m for m in model.modules() if isinstance(m, MethodLayer))
            self.links.append(int(layer.branch("default").link))
            self.empty.append(not optimizer.state)

    seen = Seen()
    trainer = run("cola", tmp_path, seen=seen, num_links=3)
    assert seen.links == [0, 1, 1, 2, 2, 2]
    assert seen.empty == [False, True, False, True, False, False]
    assert trainer.state.global_step == 6  # property 10: no more steps than one LoRA


def test_a_link_that_would_never_train_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(HeadwaterError, match="knots: the last link would begin after step 6, but the run has 6 steps"):
        run("cola", tmp_path, num_links=3, knots=[2, 6])
    assert not list(tmp_path.glob("checkpoint-*"))
    run("cola", tmp_path, num_links=3, knots=[2, 5])


@pytest.mark.parametrize(
    "fields", [{}, {"mode": "fold"}, {"lr_policy": "restart", "link_warmup": 0.5}], ids=["stack", "fold", "restart"]
)
def test_property_9_resuming_between_knots_and_at_one_is_exact(tmp_path, fields):
    whole = run("cola", tmp_path / "whole", num_links=3, **fields)
    for step in (2, 3):  # the first knot is after step 2
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        again = run("cola", tmp_path / f"again{step}", num_links=3, resume=checkpoint, **fields)
        assert logged(again, "learning_rate") == logged(whole, "learning_rate")
        found, expected = weights(again), weights(whole)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), name


def test_property_3_folding_and_stacking_give_the_same_curve(tmp_path):
    fields = {"r": 3, "num_links": 3, "link_ranks": [3, 2, 1], "alpha_mode": "fixed_alpha"}
    stack, fold = (run("cola", tmp_path / mode, mode=mode, steps=9, **fields) for mode in ("stack", "fold"))
    assert logged(fold, "loss") == pytest.approx(logged(stack, "loss"), rel=1e-5)
    assert len(set(logged(fold, "loss"))) > 6
    found, expected = weights(fold), weights(stack)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)


def test_folding_leaves_the_base_weight_alone_and_saves_the_chain(tmp_path):
    """Property 7, for fold: whatever is asked of the base, it is as it was."""
    untouched = make_tiny_llama()
    model = run("cola", tmp_path, num_links=3, mode="fold").model.eval()
    x = torch.tensor([[5, 6, 7]])
    layer = next(m for m in model.modules() if isinstance(m, MethodLayer))
    branch, W = layer.branch("default"), layer.get_base_layer().weight
    tied = branch.scaling * branch.B_tied.T @ branch.A_tied
    assert tied.abs().max() > 1e-3
    torch.testing.assert_close(branch.folded_weight(W, transposed=False), W + tied)
    assert torch.equal(W, untouched.get_submodule(layer.name).weight)
    expected = model(x).logits
    with model.disable_adapter():
        assert torch.equal(model(x).logits, untouched(x).logits)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / "adapter")
    torch.testing.assert_close(again(x).logits, expected, rtol=1e-5, atol=1e-5)
    half = PeftModel.from_pretrained(make_tiny_llama().bfloat16(), tmp_path / "adapter")  # loaded, it is stacked
    assert next(m for m in half.modules() if isinstance(m, MethodLayer)).branch("default").reads()[1]
    torch.testing.assert_close(model.merge_and_unload()(x).logits, expected, rtol=1e-5, atol=1e-5)


def test_folding_reads_no_tied_link():
    model, x = move(model_of(mode="fold"), 1), noise(4, d_in)
    branch, base = branch_of(model), base_of(model)
    branch.tie()
    move(model, 2)
    expected = torch.nn.functional.linear(
        x, base.weight + branch.scaling * (branch.B_tied.T @ branch.A_tied), base.bias
    ) + branch.scaling * (x @ branch.A.T @ branch.B)
    torch.testing.assert_close(model(x), expected, **CLOSE)
    assert [w.shape for w in branch.reads()[0] + branch.reads()[1]] == [(2, d_in)]
    other = move(model_of(mode="fold"), 5)
    branch_of(other).tie()
    other(x)  # folds links of its own, which loading must forget
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), expected, **CLOSE)


def test_a_fold_made_in_inference_mode_can_be_trained_under():
    model, x = move(model_of(mode="fold"), 1), noise(4, d_in)
    branch_of(model).tie()
    move(model, 2)
    with torch.inference_mode():
        expected = model(x)
    found = model.train()(x.requires_grad_())  # through the folded weight
    torch.testing.assert_close(found, expected.clone(), **CLOSE)
    found.sum().backward()
    assert branch_of(model).A.grad.any()
    assert x.grad.any()


@pytest.mark.parametrize("place", [torch.no_grad, torch.inference_mode])
def test_a_fold_follows_its_base_weight(place):
    model, x = move(model_of(mode="fold"), 1), noise(4, d_in)
    branch_of(model).tie()
    with place():
        before = model(x) - base_of(model)(x)
    base = base_of(model)
    with torch.no_grad():
        base.weight.mul_(2)
    with place():
        torch.testing.assert_close(model(x) - base(x), before, **CLOSE)
    base.weight.data = base.weight.data * 2
    with place():
        torch.testing.assert_close(model(x) - base(x), before, **CLOSE)
        held = branch_of(model)._folded
        model(x)
    assert branch_of(model)._folded is held, "one that fits is kept"


def test_a_base_that_was_made_in_inference_mode_folds_too():
    with torch.inference_mode():
        model, x = move(model_of(mode="fold"), 1), noise(4, d_in)
        branch_of(model).tie()
        expected = model(x)
        torch.testing.assert_close(model(x), expected, **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, **CLOSE)


def test_folding_works_on_transposed_weights():
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 300, "n_positions": 64}
    base = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    fields = {"r": 2, "target_modules": ["c_attn"], "task_type": "CAUSAL_LM", "init_seed": 1}
    models = [get_peft_model(deepcopy(base), make_config("cola", mode=mode, **fields)) for mode in ("stack", "fold")]
    for model in models:
        move(model, 1)
        next(m for m in model.modules() if isinstance(m, MethodLayer)).branch("default").tie()
    x = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(models[1].eval()(x).logits, models[0].eval()(x).logits, rtol=1e-4, atol=1e-5)
    assert (models[0](x).logits - base(x).logits).abs().max() > 0.01


def test_folding_into_half_precision_is_refused():
    config = make_config("cola", mode="fold", **SMALL)
    with pytest.raises(HeadwaterError, match=r"gate_proj: its weight is bfloat16.*\n.*mode: stack"):
        get_peft_model(make_tiny_llama().bfloat16(), config)


def test_a_folding_adapter_can_be_looked_at_without_its_base(tmp_path):
    """As `headwater inspect` does, whatever the dtype in the base model's config."""
    model = move(get_peft_model(make_tiny_llama(), make_config("cola", mode="fold", **SMALL)), 1)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        base = make_tiny_llama().bfloat16()
    PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True, is_trainable=True)


def test_a_folding_chain_is_alone():
    model = move(model_of(mode="fold"), 1)
    model.add_adapter("second", make_config("cola", target_modules=["layer"], r=2))
    model.base_model.set_adapter(["default", "second"])
    model.double()(noise(2, d_in))  # nothing is tied yet
    branch_of(model).tie()
    with pytest.raises(HeadwaterError, match="cannot be active together"):
        model(noise(2, d_in))


def test_each_link_has_its_own_decay(tmp_path):
    """Oracle: transformers' linear schedule, once for each link."""
    from transformers import get_linear_schedule_with_warmup

    def linear(steps, warmup):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
        schedule, rates = get_linear_schedule_with_warmup(optimizer, warmup, steps), []
        for _ in range(steps):
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return rates

    fields = {"num_links": 3, "knots": [3, 5], "lr_policy": "restart"}
    plain = run("cola", tmp_path / "plain", steps=9, arguments={"warmup_steps": 4}, **fields)
    first = load_file(tmp_path / "plain" / "checkpoint-1" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in first.items() if name.endswith(".B")), "the trainer's warm-up was used"
    assert logged(plain, "learning_rate") == pytest.approx(linear(3, 0) + linear(2, 0) + linear(4, 0))
    warm = run("cola", tmp_path / "warm", steps=9, link_warmup=0.5, arguments={"lr_scheduler_type": "cosine"}, **fields)
    assert logged(warm, "learning_rate") == pytest.approx(linear(3, 2) + linear(2, 1) + linear(4, 2))
    going_on = run("cola", tmp_path / "on", steps=9, num_links=3)
    assert logged(going_on, "learning_rate") == pytest.approx(linear(9, 0))


def test_a_schedule_that_cannot_be_replaced_is_refused(tmp_path):
    model = model_of(lr_policy="restart")
    schedule = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), lr=0.1), 1)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(HeadwaterError, match="restart sets the learning rate itself and cannot with a StepLR"):
        MethodCallback().on_train_begin(args, TrainerState(max_steps=9), None, model=model, lr_scheduler=schedule)


def test_property_8_a_chain_reaches_ranks_that_one_link_cannot():
    target = noise(d_out, 4) @ noise(4, d_in, seed=1)
    x = noise(64, d_in, seed=2)

    def loss_of(links):
        model = model_of(num_links=links, knots=[], r=2)
        optimizer = torch.optim.Adam(parameters(model).values(), lr=0.05)
        for step in range(1, 601):
            optimizer.zero_grad()
            loss = (model(x) - base_of(model)(x) - x @ target.T).square().mean()
            loss.backward()
            optimizer.step()
            if branch_of(model).after_step(step, 600):
                optimizer.state.clear()
        return loss.item()

    assert loss_of(2) < 0.2 * loss_of(1)


def test_a_run_that_links_do_not_divide_is_split_at_the_nearest_steps():
    assert make_config("cola", num_links=3).knots_of(10) == [3, 7]


def test_wrong_chains_are_refused():
    wrong = [{"num_links": 0}, {"link_ranks": [4]}, {"knots": [3, 2]}, {"knots": [1]}, {"train_factor": "C"}]
    for fields in [*wrong, {"mode": "merge"}, {"lr_policy": "again"}, {"link_warmup": 1.0}]:
        with pytest.raises(HeadwaterError):
            make_config("cola", **fields)


def test_the_first_link_s_rank_is_r_by_which_the_scaling_divides():
    with pytest.raises(HeadwaterError, match="link_ranks starts with 4 and r is 8") as caught:
        make_config("cola", r=8, num_links=2, link_ranks=[4, 2])
    assert [problem.where for problem in caught.value.problems] == ["link_ranks"]
    assert branch_of(model_of(r=3, link_ranks=[3, 2, 1])).scaling == 6 / 3


def test_no_link_s_rank_is_larger_than_its_layer():
    assert branch_of(model_of(r=2, link_ranks=[2, d_in, 1])).ranks == [2, d_in, 1]
    with pytest.raises(HeadwaterError, match=r"link_ranks has 7, 9, larger than layer layer \(6 -> 7\) allows"):
        model_of(r=2, link_ranks=[2, 7, 9], num_links=3)


def test_the_last_link_cannot_be_tied():
    branch = branch_of(move(model_of(), 1))
    branch.tie()
    branch.tie()
    before = {name: tensor.clone() for name, tensor in branch.state_dict().items()}
    with pytest.raises(HeadwaterError, match=r"link 3 of 3 is the last"):
        branch.tie()
    assert all(torch.equal(before[name], tensor) for name, tensor in branch.state_dict().items())


@pytest.mark.parametrize("lr_policy", ["continue", "restart"])
def test_the_pages_loop_ties_the_knots(lr_policy):
    page = (Path(__file__).parents[2] / "docs" / "methods" / "cola.md").read_text(encoding="utf-8")
    (loop,) = re.findall(r"```python\n(.*?)```", page, re.S)
    config = make_config("cola", **{**SMALL, "num_links": 3, "init_seed": 0, "lr_policy": lr_policy})
    model = get_peft_model(make_tiny_llama(), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(0, 256, (2, 6), generator=torch.Generator().manual_seed(0))
    held = {
        "model": model,
        "optimizer": optimizer,
        "total_steps": 6,
        "batches": repeat({"input_ids": ids, "labels": ids}),
    }
    exec(loop, held)
    branches = held["branches"]
    assert len(branches) == 2
    assert all(branch.tied == 2 and branch.A_tied.any(1).all() and branch.B_tied.any(1).all() for branch in branches)
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}, "the optimiser was not cleared"
    if lr_policy == "restart":
        assert [branches[0].learning_rate_factor(step, 6) for step in range(6)] == pytest.approx([1, 0.5] * 3)
