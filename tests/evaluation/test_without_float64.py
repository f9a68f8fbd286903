"""Training on an Apple GPU scores there, too, and such a GPU has no float64: numbers come to the CPU first."""

import pytest
from peft import get_peft_model
from torch import Tensor

import headwater
from headwater.analysis.routing import head_similarity
from headwater.evaluation.forward import evaluating
from headwater.evaluation.likelihood import choice_log_probs, completion_losses
from headwater.preference.contexts import prompt_states


@pytest.fixture
def no_float64(monkeypatch):
    """Only what `cpu` gave back can become float64."""
    cpu, double, on_cpu = Tensor.cpu, Tensor.double, []

    def to_cpu(self, *args, **kwargs):
        on_cpu.append(cpu(self, *args, **kwargs).clone())
        return on_cpu[-1]

    def to_double(self, *args, **kwargs):
        assert any(self is tensor for tensor in on_cpu), "float64 on the device"
        return double(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "cpu", to_cpu)
    monkeypatch.setattr(Tensor, "double", to_double)


@pytest.mark.parametrize(
    "what",
    [
        lambda model: completion_losses(model, [[5, 6, 7]], [[-100, 6, 7]], fill=258),
        lambda model: choice_log_probs(model, [[5, 6]], [[[7], [8, 9]]], fill=258),
        lambda model: prompt_states(model, [[5, 6, 7]], fill=258),
        head_similarity,
    ],
)
def test_float64_is_on_the_cpu(no_float64, tiny_llama, what):
    fields = {"r": 4, "num_heads": 2, "head_dropout": 0.0, "target_modules": ["up_proj"], "task_type": "CAUSAL_LM"}
    config = headwater.RLoraConfig(**fields)
    model = get_peft_model(tiny_llama(), config)
    with evaluating(model):
        assert len(what(model))
