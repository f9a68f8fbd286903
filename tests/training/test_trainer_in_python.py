"""HeadwaterTrainer as one's own script uses it: without an evaluator, with paths and True, and with mistakes."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from headwater.data.mixture import MixtureSpec
from headwater.errors import HeadwaterError
from headwater.evaluation.likelihood import choice_log_probs
from headwater.training import HeadwaterArguments, HeadwaterTrainer
from headwater.tuner import align, context_of

from .common import CPU, adapted, make_rows, make_tasks, make_trainer, trained


@pytest.mark.parametrize("normalization", ["example", "token"])
def test_the_loss_of_an_evaluation_is_that_of_a_plain_reading(tiny_llama, tmp_path, normalization):
    model, rows = adapted(tiny_llama()), make_rows(0, 6, longest=12)
    arguments = {**CPU, "per_device_eval_batch_size": 6, "loss_normalization": normalization}
    trainer = HeadwaterTrainer(
        model,
        HeadwaterArguments(output_dir=str(tmp_path), **arguments),
        train={"a": rows},
        pad_token_id=258,
        mixture=MixtureSpec(),
        eval_dataset=rows,
    )
    losses = []
    with torch.no_grad():
        for row in rows:
            ids, labels = torch.tensor([row.input_ids]), torch.tensor(row.labels)
            logits = model.eval()(input_ids=ids).logits[0, :-1]
            losses.append(F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="none")[labels[1:] != -100])
    means = torch.stack([loss.mean() for loss in losses])
    expected = means.mean() if normalization == "example" else torch.cat(losses).mean()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_alignment_may_come_after_the_trainer(tiny_llama, tmp_path):
    weights = []
    for late in (False, True):
        model = adapted(tiny_llama(), "lora")
        if not late:
            align(model, kind="kl", weight=1.0)
        trainer = make_trainer(model, tmp_path, max_steps=2, per_device_train_batch_size=6)
        if late:
            align(model, kind="kl", weight=1.0)
        trainer.train()
        weights.append(trained(model))
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


@pytest.mark.parametrize("padding_free", [False, True])
def test_a_method_that_goes_by_task_may_be_on_the_output_layer(tiny_llama, tmp_path, padding_free):
    fields = {"target_modules": ["lm_head"], "num_tasks": 2}
    model = adapted(tiny_llama(attn_implementation="sdpa"), "mtl_lora", lora_dropout=0.0, **fields)
    rows = [*make_rows(0, 3), *make_rows(1, 3)]
    args = {"padding_free": padding_free, "per_device_train_batch_size": 6, "learning_rate": 0.0, "max_steps": 1}
    trainer = make_trainer(model, tmp_path, tasks={"a": rows[:3], "b": rows[3:]}, **args)
    losses = []
    for row in rows:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor(row.labels)[1:]
        with torch.no_grad():
            logits = model(input_ids=ids, headwater_task_ids=torch.tensor([row.task])).logits[0, :-1]
        losses.append(F.cross_entropy(logits, labels, ignore_index=-100))
    assert trainer.train().training_loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_a_method_that_goes_by_the_prompt_is_scored_on_the_output_layer(tiny_llama, tiny_tokenizer):
    model = adapted(tiny_llama(), "cond_mixlora", target_modules=["lm_head"], lora_dropout=0.0).eval()
    prompt, *choices = (tiny_tokenizer(text)["input_ids"] for text in ("a longer prompt", " yes", " no"))
    (sums,) = choice_log_probs(model, [prompt], [choices], fill=258)
    for ids, found in zip(choices, sums, strict=True):
        labels = torch.tensor([[-100] * len(prompt) + ids])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids]), headwater_labels=labels).logits
        log_probs = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = log_probs[torch.arange(len(ids)), torch.tensor(ids)].sum().item()
        assert found == pytest.approx(expected, abs=1e-4)


def test_auxiliary_losses_of_ones_own_loop_count_in_full_after_a_trainer(tiny_llama, tmp_path):
    model = adapted(tiny_llama(), "hydralora", balance_loss_weight=0.1, lora_dropout=0.0)
    make_trainer(model, tmp_path, max_steps=1, gradient_accumulation_steps=4).train()
    assert context_of(model).loss_scale == 1.0


def test_rows_of_another_task_and_weights_of_none_are_refused(tiny_llama, tmp_path):
    model = adapted(tiny_llama())
    with pytest.raises(HeadwaterError, match=r"train\['b'\]: its rows carry the task id 0, but it is task 1"):
        make_trainer(model, tmp_path, tasks={"a": make_rows(0, 4), "b": make_rows(0, 4)})
    with pytest.raises(HeadwaterError, match=r"weights\['c'\]: there is no such task\n *the tasks are a, b"):
        HeadwaterTrainer(
            model,
            HeadwaterArguments(output_dir=str(tmp_path), **CPU),
            train=make_tasks(),
            pad_token_id=258,
            mixture=MixtureSpec(strategy="weights"),
            weights={"c": 2.0},
        )


@pytest.mark.parametrize("given", [True, Path], ids=["True", "Path"])
def test_a_checkpoint_is_checked_however_it_is_named(tiny_llama, tmp_path, given):
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    made = adapted(tiny_llama())
    make_trainer(made, tmp_path, **saving).train()
    checkpoint = True if given is True else given(tmp_path / "checkpoint-2")
    again = adapted(tiny_llama())
    done = make_trainer(again, tmp_path, **saving)
    done.train(resume_from_checkpoint=checkpoint)
    assert done.state.global_step == 2
    for name, weight in trained(again).items():
        torch.testing.assert_close(weight, trained(made)[name], rtol=0, atol=0)
    other = make_trainer(adapted(tiny_llama(), lora_alpha=99), tmp_path, **{**saving, "max_steps": 4})
    with pytest.raises(HeadwaterError, match="rlora lora_alpha 16, this run has rlora lora_alpha 99"):
        other.train(resume_from_checkpoint=checkpoint)
