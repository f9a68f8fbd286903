"""HeadwaterTrainer against the plain arithmetic: one big batch, all logits, PyTorch's own cross-entropy."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Trainer, TrainerCallback, TrainingArguments

from headwater.data.collate import Collator
from headwater.data.mixture import MixtureSpec
from headwater.errors import HeadwaterError
from headwater.evaluation import TaskScore
from headwater.training import trainer as trainer_module
from headwater.tuner import context_of

from .common import CPU, adapted, make_rows, make_tasks, make_trainer, trained


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimiser step, as the optimiser sees them."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def plain_gradients(model, rows, per_example, given=lambda row: {}):
    """Gradients of the loss of all `rows` as one batch, computed row by row from full logits; `given(row)` are further
    keywords of a row's forward."""
    losses = []
    for row in rows:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor(row.labels)
        logits = model(input_ids=ids, **given(row)).logits[0]
        losses.append(F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="none")[labels[1:] != -100])
    loss = torch.stack([x.mean() for x in losses]).mean() if per_example else torch.cat(losses).mean()
    model.zero_grad()
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), gradients


@pytest.mark.parametrize("method", ["rlora", "lora"])
@pytest.mark.parametrize("normalization", ["example", "token"])
@pytest.mark.parametrize("pass_cost", [0, 10**6], ids=["in parts", "whole"])
def test_accumulated_gradients_equal_those_of_one_big_batch(
    tiny_llama, tmp_path, monkeypatch, normalization, method, pass_cost
):
    monkeypatch.setitem(trainer_module.PASS_COST, "cpu", pass_cost)
    tasks = {"a": make_rows(0, 5, longest=2), "b": make_rows(1, 4, longest=20)}
    model = adapted(tiny_llama(), method)
    loss, expected = plain_gradients(model, tasks["a"] + tasks["b"], normalization == "example")
    seen = Gradients()
    trainer = make_trainer(
        model,
        tmp_path,
        tasks=tasks,
        callbacks=[seen],
        max_steps=1,
        per_device_train_batch_size=2,  # 5 batches, the last with one row
        gradient_accumulation_steps=5,
        loss_normalization=normalization,
        max_grad_norm=0.0,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(seen.steps[0][name], gradient, rtol=1e-4, atol=1e-7)


def test_token_mode_is_transformers_trainer(tiny_llama, tmp_path):
    """Same batches, same model: the weights after three steps with accumulation are those of transformers' Trainer."""
    tasks = make_tasks(8, 8)
    ours, theirs = adapted(tiny_llama(), "lora"), adapted(tiny_llama(), "lora")
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "max_grad_norm": 1.0,
    }
    trainer = make_trainer(ours, tmp_path / "a", tasks=tasks, loss_normalization="token", warmup_steps=0, **settings)
    sampler = trainer.get_train_dataloader().batch_sampler
    rows = [*tasks["a"], *tasks["b"]]
    order = [rows[i] for batch in sampler for i in batch]

    class InOrder(Trainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(order)

    def collate(rows):
        batch = Collator(258)(rows)
        return {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}

    plain = TrainingArguments(output_dir=str(tmp_path / "b"), remove_unused_columns=False, **CPU, **settings)
    InOrder(theirs, plain, train_dataset=order, data_collator=collate).train()
    trainer.train()
    expected = trained(theirs)
    for name, weight in trained(ours).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)


def test_soft_capped_logits_and_checkpointing_train_as_full_logits(tmp_path):
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.3,
        attn_implementation="eager",
    )
    model = adapted(Gemma3ForCausalLM(config))
    tasks = make_tasks(3, 3)
    _, expected = plain_gradients(model, tasks["a"] + tasks["b"], True)
    for kwargs in ({"use_reentrant": False}, {"use_reentrant": True}):
        seen = Gradients()
        make_trainer(
            model,
            tmp_path,
            tasks=tasks,
            callbacks=[seen],
            max_steps=1,
            per_device_train_batch_size=6,
            learning_rate=0.0,
            max_grad_norm=0.0,
            activation_checkpointing=True,
            activation_checkpointing_kwargs=kwargs,
        ).train()
        for name, gradient in expected.items():
            torch.testing.assert_close(seen.steps[0][name], gradient, rtol=1e-4, atol=1e-7)


def test_task_losses_are_the_mean_over_each_tasks_rows(tiny_llama, tmp_path):
    """With a learning rate of 0 every log of an epoch must be the plain loss of the rows it saw."""
    tasks = make_tasks(6, 4)
    model = adapted(tiny_llama())
    trainer = make_trainer(
        model, tmp_path, tasks=tasks, learning_rate=0.0, per_device_train_batch_size=2, max_steps=5, logging_steps=5
    )
    trainer.train()
    log = trainer.state.log_history[0]
    model.eval()
    for name, rows in tasks.items():
        assert log[f"task_loss/{name}"] == pytest.approx(plain_gradients(model, rows, True)[0], rel=1e-5)
    assert trainer.accounts.tokens == sum(len(row) for rows in tasks.values() for row in rows)
    assert trainer.accounts.slots > trainer.accounts.tokens
    assert log["tokens_per_second"] > 0


def test_task_ids_reach_headwater_methods_and_no_others(tiny_llama, tmp_path, monkeypatch):
    seen = []
    model = adapted(tiny_llama())
    model.get_base_model().model.register_forward_hook(
        lambda module, args, output: seen.append(context_of(model).state.task_ids.tolist())
    )
    tasks = {"a": make_rows(0, 2), "b": make_rows(1, 2)}
    make_trainer(model, tmp_path, tasks=tasks, max_steps=1, per_device_train_batch_size=4).train()
    assert sorted(seen[0]) == [0, 0, 1, 1]
    make_trainer(adapted(tiny_llama(), "lora"), tmp_path, tasks=tasks, max_steps=1).train()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_non_finite_values_stop_the_run_before_the_weights_change(tiny_llama, tmp_path, what):
    """One row of task b holds token 299, whose embedding is made bad."""
    tasks = make_tasks(4, 4)
    tasks["b"][0].input_ids[0] = 299
    model = adapted(tiny_llama())
    if what == "loss":
        with torch.no_grad():
            model.get_input_embeddings().weight[299] = math.nan
    else:
        down = model.get_base_model().model.layers[0].mlp.down_proj
        down.register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * math.inf,))
    trainer = make_trainer(
        model,
        tmp_path,
        tasks=tasks,
        max_steps=8,
        per_device_train_batch_size=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
    )
    (tmp_path / "checkpoint-9").mkdir()  # of a process that was killed as it wrote
    with pytest.raises(HeadwaterError) as error:
        trainer.train()
    step = trainer.state.global_step
    message = str(error.value)
    assert f"the {what} became non-finite at step {step + 1}" in message
    if what == "loss":
        assert "in task b\n" in message
    assert all(torch.isfinite(weight).all() for weight in trained(model).values())
    kept = [p.parent.name for p in tmp_path.glob("checkpoint-*/trainer_state.json")]
    assert kept == ([f"checkpoint-{step}"] if step else [])
    assert "checkpoint-9" not in message
    assert (f"checkpoint-{step}" in message) if step else ("no checkpoint" in message)


def test_loss_scale_of_auxiliary_losses_sums_to_one_over_a_step(tiny_llama, tmp_path):
    model = adapted(tiny_llama())
    scales = []
    model.get_base_model().model.register_forward_hook(
        lambda module, args, output: scales.append(float(context_of(model).state.loss_scale))
    )
    tasks = {"a": make_rows(0, 5)}
    make_trainer(
        model, tmp_path, tasks=tasks, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=3
    ).train()
    assert sorted(scales) == pytest.approx([1 / 5, 2 / 5, 2 / 5])


def test_auxiliary_losses_are_logged_as_the_mean_over_a_step(tiny_llama, tmp_path):
    """HydraLoRA's balance loss of every batch, weighted by its share of the rows, by hand."""
    model = adapted(tiny_llama(), "hydralora", balance_loss_weight=0.1, lora_dropout=0.0)
    tasks = {"a": make_rows(0, 5)}
    expected, context = 0.0, context_of(model)
    settings = {"tasks": tasks, "max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    trainer = make_trainer(model, tmp_path, **settings)
    for batch in trainer.get_train_dataloader():
        with torch.no_grad():
            model.train()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        expected += float(context.last_losses["balance"]) * len(batch["input_ids"]) / 5
    trainer.train()
    assert trainer.state.log_history[0]["auxiliary_loss/balance"] == pytest.approx(expected, rel=1e-5)


def test_auxiliary_losses_are_logged_as_the_mean_over_the_steps_since_the_last_log(tiny_llama, tmp_path):
    model = adapted(tiny_llama(), "hydralora", balance_loss_weight=0.1, lora_dropout=0.0)
    settings = {"tasks": {"a": make_rows(0, 12)}, "max_steps": 6, "per_device_train_batch_size": 2}
    trainer = make_trainer(model, tmp_path, learning_rate=0.0, logging_steps=3, **settings)
    losses, context = [], context_of(model)
    for batch in trainer.get_train_dataloader():
        with torch.no_grad():
            model.train()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        losses.append(float(context.last_losses["balance"]))
    trainer.train()
    logged = [line["auxiliary_loss/balance"] for line in trainer.state.log_history if "loss" in line]
    assert logged == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3], rel=1e-5)


def test_losses_of_several_tasks_are_scored_by_their_mean(tiny_llama, tmp_path):
    values = {"a": ("loss", 1.0), "b": ("loss", 4.0), "c": ("exact_match", 0.5)}
    scores = {name: TaskScore(name, *value, 1, None, [value[1]]) for name, value in values.items()}
    trainer = make_trainer(adapted(tiny_llama()), tmp_path, evaluator=lambda model, step: scores)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == 2.5
    assert (metrics["eval_a"], metrics["eval_b"], metrics["eval_mean"]) == (1.0, 4.0, 0.5)


def test_auxiliary_losses_follow_the_factor_of_a_gradient_scaler(tiny_llama, tmp_path):
    """The router of heads that are zero hears of nothing but the balance loss."""
    model = adapted(tiny_llama(), "hydralora", balance_loss_weight=0.1, lora_dropout=0.0).train()
    trainer = make_trainer(model, tmp_path)
    inputs = next(iter(trainer.get_train_dataloader()))
    found = []
    for factor in (1.0, 1024.0):
        model.zero_grad()
        (trainer.compute_loss(model, inputs) * factor).backward()
        found.append({n: p.grad / factor for n, p in model.named_parameters() if n.endswith("router")})
    for name, gradient in found[0].items():
        assert gradient.norm() > 0
        torch.testing.assert_close(found[1][name], gradient)


def test_encoder_decoders_are_refused(tiny_llama, tmp_path):
    model = tiny_llama()
    model.config.is_encoder_decoder = True
    with pytest.raises(HeadwaterError, match="encoder-decoder"):
        make_trainer(model, tmp_path)


def test_homogeneous_batches_and_label_smoothing_train(tiny_llama, tmp_path):
    model = adapted(tiny_llama())
    trainer = make_trainer(
        model,
        tmp_path,
        mixture=MixtureSpec(strategy="uniform", batching="homogeneous", temperature=1.0),
        label_smoothing_factor=0.1,
        per_device_train_batch_size=3,
        max_steps=6,
        num_train_epochs=1,
    )
    trainer.train()
    logged = [[key for key in line if key.startswith("task_loss/")] for line in trainer.state.log_history[:6]]
    assert sorted(logged) == [["task_loss/a"]] * 3 + [["task_loss/b"]] * 3
    shares = trainer.realised_shares(6)
    assert shares["a"]["rows"] == shares["b"]["rows"] == 9
    assert shares["a"]["row_share"] == 0.5
