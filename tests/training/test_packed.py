"""Rows packed end to end: the model computes, and learns, what it does from each row by itself."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    Lfm2Config,
    Ministral3Config,
    MistralConfig,
    PhimoeConfig,
    Qwen2Config,
    TrainerCallback,
)

import headwater
from headwater.data.encode import Encoded
from headwater.errors import HeadwaterError
from headwater.evaluation.scores import TaskScore
from headwater.training.loss import CompletionCollator, completion_losses
from headwater.training.packed import pack, rows_apart, why_not

from .common import adapted, make_rows, make_tasks, make_trainer
from .test_trainer import Gradients, plain_gradients

SMALL = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "attn_implementation": "sdpa",
}
PREFIX = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
ALORA = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5])
WINDOW = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}


def fused(tiny_llama, **fields):
    return tiny_llama(attn_implementation="sdpa", **fields)


def small(config, **fields):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**{**SMALL, **fields})).eval()


def inputs_of(rows, *, task_ids=False):
    batch = pack(rows)
    del batch["labels"]
    if not task_ids:
        del batch["headwater_task_ids"]
    return batch


def alone(model, row):
    return model(input_ids=torch.tensor([row.input_ids])).logits[0]


def test_a_packed_batch_holds_the_rows_and_what_is_learned_of_them():
    first, second = Encoded([5, 6, 7], [-100, 6, 7], 1), Encoded([8, 9], [8, 9], 0)
    batch = CompletionCollator(pack)([first, second])
    assert {key: value if isinstance(value, tuple) else value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "labels": [[-100, 6, 7, 8, 9]],
        "headwater_task_ids": [1, 0],
        "headwater_row_lengths": (3, 2),
        "completion_index": [0, 1, 3],  # 8 begins a row: nothing predicts it
        "completion_lengths": [2, 1],
    }


@pytest.mark.parametrize("per_example", [True, False])
def test_each_row_has_its_own_loss(per_example):
    rows = [*make_rows(0, 3), *make_rows(1, 3, longest=12), Encoded([1, 2], [-100, -100], 0)]
    batch = CompletionCollator(pack)(rows)
    logits = torch.randn(batch["labels"].numel(), 300)
    index, lengths = batch["completion_index"], batch["completion_lengths"]
    found = completion_losses(logits[index], batch["labels"], index, lengths, per_example=per_example)
    begin = 0
    for row, loss in zip(rows, found, strict=True):
        own = logits[begin : begin + len(row)]
        each = [-own[i - 1].log_softmax(0)[label] for i, label in enumerate(row.labels) if i and label != -100]
        expected = sum(each, torch.zeros(())) / (max(len(each), 1) if per_example else 1)
        torch.testing.assert_close(loss, expected)
        begin += len(row)


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (MistralConfig, {"sliding_window": 3}),
        (Qwen2Config, WINDOW | {"use_sliding_window": True}),
        (Gemma3TextConfig, WINDOW | {"head_dim": 8}),
        (GPT2Config, {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_inner": 24}),
    ],
)
def test_rows_are_apart_in_every_kind_of_attention(config, fields):
    model = small(config, **fields)
    rows = [*make_rows(0, 3, longest=12), Encoded([4], [4], 0)]
    assert why_not(model) is None
    with torch.no_grad(), rows_apart(model):
        found = model(**inputs_of(rows)).logits[0]
    expected = torch.cat([alone(model, row) for row in rows])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_model_that_mixes_rows_is_found_out(tiny_llama):
    model = fused(tiny_llama)
    assert why_not(model) is None
    assert model.config._attn_implementation == "sdpa"
    assert not model.training

    def shift(module, args, output):  # as a convolution over positions would
        return output + output.roll(1, dims=1)

    hook = model.model.layers[1].mlp.register_forward_hook(shift)
    assert "depends on the rows before" in why_not(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = float("nan")
    assert "depends on the rows before" in why_not(model)
    hook.remove()
    model.model.layers[0].self_attn.is_causal = False
    assert "cannot keep packed rows apart" in why_not(model)
    model.forward = lambda **kwargs: kwargs["attention_mask"].long()
    assert "KeyError" in why_not(model)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: small(MistralConfig, attn_implementation="eager"), "its attention is 'eager'"),
        (lambda: small(Lfm2Config, layer_types=["conv", "full_attention"]), "its layers are conv"),
        (lambda: torch.nn.Linear(2, 2), "not one of transformers' models"),
        (lambda: small(PhimoeConfig, sliding_window=3), "has its sliding window in the mask alone"),
        (lambda: small(Ministral3Config, head_dim=8), "scale its queries by their place"),
        (lambda: get_peft_model(small(MistralConfig), PREFIX), "its adapter treats a row by where it begins"),
        (lambda: get_peft_model(small(MistralConfig), ALORA), "its adapter treats a row by where it begins"),
    ],
)
def test_why_a_model_cannot(model, reason):
    assert reason in why_not(model())


FIELDS = {
    "mtl_lora": {"num_tasks": 2, "lora_dropout": 0.0},
    "moe_lora": {"router": "task", "num_tasks": 2, "top_k": 2, "lora_dropout": 0.0},
    "cond_mixlora": {"lora_dropout": 0.0, "router_grad": "scored"},
    "hydralora": {"lora_dropout": 0.0, "balance_loss_weight": 0.0},
}


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["kept", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("method", ["lora", "rlora", *FIELDS])
def test_training_on_packed_rows_is_training_on_each_row(tiny_llama, tmp_path, method, checkpointing):
    text = [Encoded(row.input_ids, row.input_ids, 0) for row in make_rows(0, 2, seed=1)]  # learned from the first token
    tasks = {"a": make_rows(0, 3, longest=2) + text, "b": make_rows(1, 4, longest=20)}
    rows = tasks["a"] + tasks["b"]
    model = adapted(fused(tiny_llama), method, **FIELDS.get(method, {}))
    seen, forwards = Gradients(), []
    trainer = make_trainer(
        model,
        tmp_path,
        tasks=tasks,
        callbacks=[seen],
        max_steps=1,
        per_device_train_batch_size=9,
        max_grad_norm=0.0,
        gradient_checkpointing=checkpointing is not None,
        gradient_checkpointing_kwargs={"use_reentrant": checkpointing},
    )
    model.register_forward_pre_hook(lambda m, args, kwargs: forwards.append((m.training, kwargs)), with_kwargs=True)
    trainer.train()
    shapes = [kwargs["input_ids"].shape for training, kwargs in forwards if training]
    assert shapes == [(1, sum(map(len, rows)))]
    assert trainer.accounts.slots == trainer.accounts.tokens == sum(map(len, rows))

    def given(row):
        ids = {"headwater_task_ids": torch.tensor([row.task]), "headwater_labels": torch.tensor([row.labels])}
        return {} if method == "lora" else ids

    by_row = adapted(fused(tiny_llama), method, **FIELDS.get(method, {}))
    of_a, _ = plain_gradients(by_row, tasks["a"], True, given)
    loss, expected = plain_gradients(by_row, rows, True, given)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert trainer.state.log_history[0]["task_loss/a"] == pytest.approx(of_a, rel=1e-5)
    assert seen.steps[0].keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(seen.steps[0][name], gradient, rtol=1e-4, atol=1e-7)


LOSSES = {
    "moe_lora": {"num_tasks": 2, "balance_loss": "localized", "task_types": [0, 1], "balance_loss_weight": 0.5},
    "hydralora": {"balance_loss_weight": 0.5},
    "smora": {"top_k": 2, "balance": "loss_free"},
    "align": {},
    "answers": {},
}


@pytest.mark.parametrize("case", LOSSES)
def test_losses_over_a_batch_are_those_of_the_padded_batch(tiny_llama, tmp_path, case):
    text = [Encoded(row.input_ids, row.input_ids, 0) for row in make_rows(0, 3, longest=20, seed=1)]
    tasks = {"a": make_rows(0, 3, longest=20) + text, "b": make_rows(1, 6, longest=30)}
    found = []
    for padding_free in (False, True):
        method = case if case not in ("align", "answers") else "rlora"
        dropout = {} if method == "rlora" else {"lora_dropout": 0.0}
        model = adapted(fused(tiny_llama), method, **dropout, **LOSSES[case])
        if method == "rlora":
            headwater.align(model, weight=0.5, tokens="answer" if case == "answers" else "all")
        seen = Gradients()
        settings = {"max_steps": 1, "per_device_train_batch_size": 12, "max_grad_norm": 0.0, "callbacks": [seen]}
        trainer = make_trainer(model, tmp_path, tasks=tasks, padding_free=padding_free, **settings)
        trainer.train()
        found.append((seen.steps[0], {k: v for k, v in trainer.state.log_history[0].items() if "loss" in k}))
    (padded, log), (packed, same) = found
    assert log == pytest.approx(same, rel=1e-5)
    for name, gradient in padded.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-3, atol=1e-6)


def test_scores_in_between_are_those_of_padded_batches(tiny_llama, tmp_path):
    model = adapted(fused(tiny_llama))
    used = []

    def evaluator(module, step):
        used.append(module.get_base_model().config._attn_implementation)
        return {"a": TaskScore("a", "loss", 1.0, 1, None, [1.0])}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            used.append(model.get_base_model().config._attn_implementation)

    run = make_trainer(model, tmp_path, evaluator=evaluator, eval_steps=1, max_steps=1, callbacks=[Watch()])
    run.train()
    assert used == ["sdpa", "sdpa"]  # when the backward is done, and when the model is scored


def test_padding_free_is_a_wish_that_can_be_refused(tiny_llama, tmp_path):
    tasks = make_tasks()
    with pytest.raises(HeadwaterError, match=r"padding_free: .*its attention is 'eager'"):
        make_trainer(adapted(tiny_llama()), tmp_path, padding_free=True)
    with pytest.raises(HeadwaterError, match=r"padding_free: .*torch_compile"):
        make_trainer(adapted(fused(tiny_llama)), tmp_path, padding_free=True, torch_compile=True)
    for no in ({"neftune_noise_alpha": 5.0}, {"torch_compile": True}):
        run = make_trainer(adapted(fused(tiny_llama)), tmp_path, **no)
        assert "attention_mask" in next(iter(run.get_train_dataloader()))
    for nonsense in ("auto", 0):
        with pytest.raises(HeadwaterError, match=r"training\.padding_free: .*true or false"):
            make_trainer(adapted(fused(tiny_llama)), tmp_path, padding_free=nonsense)
    for padding_free in (None, False):
        base = fused(tiny_llama) if padding_free is False else tiny_llama()
        run = make_trainer(adapted(base), tmp_path, tasks=tasks, padding_free=padding_free)
        assert "attention_mask" in next(iter(run.get_train_dataloader()))
    model = adapted(fused(tiny_llama))
    headwater.align(model, token_mode="per_position")
    with pytest.raises(HeadwaterError, match="per_position"):
        make_trainer(model, tmp_path, padding_free=True).train()
    assert "attention_mask" in next(iter(make_trainer(model, tmp_path).get_train_dataloader()))


def test_autocast_trains(tiny_llama, tmp_path):
    losses = []
    for padding_free in (True, False):
        run = make_trainer(
            adapted(fused(tiny_llama)), tmp_path, padding_free=padding_free, bf16=True, learning_rate=1e-2
        )
        run.train()
        losses.append([log["loss"] for log in run.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0]
