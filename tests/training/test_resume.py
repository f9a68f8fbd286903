"""A run that is stopped and resumed is, bit for bit, the run that was never stopped."""

import pytest
import torch
from peft import get_peft_model_state_dict
from transformers import TrainerCallback

from headwater.data.mixture import MixtureSpec
from headwater.errors import HeadwaterError

from .common import adapted, make_rows, make_trainer, trained


class Seen(TrainerCallback):
    """Keeps the input ids of every batch."""

    def __init__(self, model):
        self.batches = []
        model.get_base_model().model.embed_tokens.register_forward_pre_hook(
            lambda module, args: self.batches.append(args[0].tolist())
        )


FIELDS = {
    "rlora": {"head_dropout": 0.3, "lora_dropout": 0.2, "lora_alpha": 2},
    "smora": {"r": 8, "top_k": 2, "bias_update_rate": 0.1},  # its bias moves in the first forward after a step
    "cola": {"mode": "fold", "num_links": 3},
}


@pytest.mark.parametrize(
    ("stop_at", "accumulation", "batching", "method"),
    [
        (3, 1, "mixed", "rlora"),
        (9, 1, "mixed", "rlora"),
        (4, 2, "homogeneous", "rlora"),
        (5, 2, "mixed", "rlora"),
        (10, 2, "mixed", "rlora"),
        (5, 2, "mixed", "smora"),
        (5, 1, "mixed", "cola"),  # its second link
    ],
)
def test_same_trajectory(tiny_llama, tmp_path, stop_at, accumulation, batching, method):
    """18 rows in batches of 2 are 9 batches an epoch, 9 or 5 steps: the stops are inside and at the end of epochs."""
    settings = {
        "mixture": MixtureSpec(strategy="temperature", temperature=2.0, batching=batching),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 1e-2,
        "max_steps": 13,
        "save_strategy": "steps",
        "save_steps": stop_at,
    }
    whole = adapted(tiny_llama(), method, **FIELDS[method])
    seen = Seen(whole)
    uninterrupted = make_trainer(whole, tmp_path / "whole", **settings)
    uninterrupted.train()

    resumed = adapted(tiny_llama(), method, **FIELDS[method])
    seen_again = Seen(resumed)
    trainer = make_trainer(resumed, tmp_path / "resumed", **settings)
    torch.manual_seed(99)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop_at}"))

    expected = get_peft_model_state_dict(whole)
    for name, tensor in get_peft_model_state_dict(resumed).items():
        assert torch.equal(tensor, expected[name]), name
    assert seen_again.batches == seen.batches[-len(seen_again.batches) :]
    # Every step has `accumulation` batches, but for the last of an epoch of 9 batches.
    assert len(seen.batches) - len(seen_again.batches) == (
        stop_at // 5 * 9 + stop_at % 5 * 2 if accumulation == 2 else stop_at
    )
    losses = {line["step"]: line["loss"] for line in uninterrupted.state.log_history if "loss" in line}
    again = {line["step"]: line["loss"] for line in trainer.state.log_history if "loss" in line}
    assert again == losses
    assert trainer.accounts.tokens == uninterrupted.accounts.tokens


def test_a_complete_checkpoint_is_restored_and_not_trained_further(tiny_llama, tmp_path):
    model = adapted(tiny_llama())
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-2}
    trainer = make_trainer(model, tmp_path, **settings)
    trainer.train()
    fresh = adapted(tiny_llama())
    again = make_trainer(fresh, tmp_path, **settings)
    assert again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4")).global_step == 4
    expected = trained(model)
    assert all(torch.equal(weight, expected[name]) for name, weight in trained(fresh).items())
    assert again.accounts.tokens == trainer.accounts.tokens > 0
    assert again.realised_shares(4) == trainer.realised_shares(4)


def test_other_data_or_settings_are_refused(tiny_llama, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    make_trainer(adapted(tiny_llama()), tmp_path, **settings).train()
    other = {"a": make_rows(0, 12), "b": make_rows(1, 5, longest=15)}
    trainer = make_trainer(adapted(tiny_llama()), tmp_path, tasks=other, **settings, seed=3)
    with pytest.raises(HeadwaterError) as error:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    message = str(error.value)
    assert "rows {'a': 12, 'b': 6}, this run has {'a': 12, 'b': 5}" in message
    assert "seed 42, this run has 3" in message
    assert "batch_size" not in message
