"""Chain of LoRA's properties: what a knot changes and what it must not."""

from __future__ import annotations

import pytest
import torch
from adapted_linear import adapt, base_of, leaf, move, noise, parameters
from peft import LoraConfig, get_peft_model
from tiny_models import make_tiny_llama
from transformers import Trainer, TrainingArguments

from headwater import HeadwaterError, make_config
from headwater.training import MethodCallback
from headwater.tuner import MethodLayer

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
d_in, d_out = 6, 7


def model_of(**fields):
    return adapt("cola", d_in, d_out, **{"r": 2, "lora_alpha": 6, "num_links": 3, "knots": [2, 4], **fields})


def branch_of(model):
    return model.base_model.model.layer.branch("default")


@pytest.mark.parametrize(
    "fields", [{}, {"link_ranks": [3, 2, 1], "alpha_mode": "fixed_alpha"}, {"train_factor": "A"}, {"train_factor": "B"}]
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
        s = 6 / ranks[link] if branch.config.alpha_mode == "fixed_alpha" else branch.scaling
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


def test_property_5_a_new_link_starts_fresh():
    branch = branch_of(move(model_of(), 3))
    first = branch.A.detach().clone()
    branch.tie()
    assert not branch.B.any()
    assert not torch.equal(branch.A, first)
    same = branch_of(model_of(reinit_a="same"))
    start = same.A.detach().clone()
    same.tie()
    assert torch.equal(same.A, start)


def test_smaller_links_leave_no_trace_in_the_ranks_they_lack():
    model = model_of(link_ranks=[3, 1, 1])
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


def run(method, folder, *, steps=6, seen=None, resume=None, **fields):
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["gate_proj"], "task_type": "CAUSAL_LM"}
    config = LoraConfig(**config) if method == "lora" else make_config(method, init_seed=1, **config, **fields)
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
        disable_tqdm=True, use_cpu=True, save_steps=3, logging_steps=1, seed=1, save_strategy="steps",
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=Rows(), callbacks=[MethodCallback(), *([seen] if seen else [])])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def fields_of(config):
    return {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": config.target_modules}


def weights(trainer):
    return {n: t.clone() for n, t in trainer.model.state_dict().items() if "_branch" in n}


def test_property_2_one_link_is_lora(tmp_path):
    losses = [
        [line["loss"] for line in run(method, tmp_path / method, **fields).state.log_history if "loss" in line]
        for method, fields in (("cola", {"num_links": 1}), ("lora", {}))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


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


def test_property_9_resuming_between_knots_is_exact(tmp_path):
    whole = weights(run("cola", tmp_path / "whole", num_links=3))
    again = weights(run("cola", tmp_path / "again", num_links=3, resume=str(tmp_path / "whole" / "checkpoint-3")))
    assert whole.keys() == again.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name]), name


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


def test_wrong_chains_are_refused():
    for fields in ({"num_links": 0}, {"link_ranks": [4]}, {"knots": [3, 2]}, {"knots": [1]}, {"train_factor": "C"}):
        with pytest.raises(HeadwaterError):
            make_config("cola", **fields)
