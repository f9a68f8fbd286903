"""`headwater.analysis` on gates: load, entropy and dead experts of every gated method, against loops in float64."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import headwater
from headwater.analysis import GateRecorder, Texts, gate_statistics
from headwater.analysis.gates import shows_gates
from headwater.analysis.routing import mean_gates
from headwater.training import MethodCallback

from .helpers import LAYERS, adapt, config, task_kwargs, tokens, train_loss
from .rows import BY_ID, ROWS

DOCS = Path(__file__).parents[2] / "docs" / "gates.md"
ROUTED = [row for row in ROWS if row.gated]
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])


@pytest.fixture(params=ROUTED, ids=[row.id for row in ROUTED])
def row(request):
    return request.param


def plain_reading(gates: list[list[float]]):
    """From a list of gates, one per token: load, mean gate, entropies, dead experts; each from its definition."""
    N, T = len(gates[0]), len(gates)
    shares = [[abs(g) / sum(map(abs, gate)) for g in gate] for gate in gates]
    most = max(sum(g != 0 for g in gate) for gate in gates)
    if most < N:
        load = [sum(gate[n] != 0 for gate in gates) / T for n in range(N)]
    else:
        load = [sum(share[n] for share in shares) / T for n in range(N)]
    log_N = math.log(N) if N > 1 else 1
    entropy = sum(-p * math.log(p) for share in shares for p in share if p > 0) / T / log_N
    spread = [value / sum(load) for value in load]
    return {
        "tokens": T,
        "top_k": most,
        "load": load,
        "mean_gate": [sum(gate[n] for gate in gates) / T for n in range(N)],
        "gate_entropy": entropy if N > 1 else 1.0,  # one expert alone is used as equally as can be
        "load_entropy": -sum(p * math.log(p) for p in spread if p > 0) / log_N if N > 1 else 1.0,
        "dead_experts": [n for n in range(N) if load[n] < 0.1 * sum(load) / N],
    }


def assert_reads(found: dict, expected: dict):
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key] == (value if key in ("tokens", "top_k", "dead_experts") else pytest.approx(value, abs=1e-12))


@pytest.mark.parametrize("held", [1 << 22, 5], ids=["together", "in-parts"])
def test_every_gated_method_as_a_plain_reading(row, tiny_llama, held, monkeypatch):
    """Two forwards, the first with padding; what is summed up together must not matter."""
    monkeypatch.setattr("headwater.analysis.gates._MOST_PENDING", held)
    model, seen = adapt(row, tiny_llama()), {name: [] for name in LAYERS}

    def see(name, gate):
        rows = gate if gate.shape[1] == 4 else gate[MASK.bool()]
        seen[name].extend(rows.reshape(-1, gate.shape[-1]).double().tolist())

    assert shows_gates(model)
    with torch.no_grad(), headwater.observe(model, see), GateRecorder(model) as recorder:
        model(input_ids=tokens(), attention_mask=MASK, **task_kwargs(row))
        model(input_ids=tokens(rows=3, length=4, seed=1), **task_kwargs(row, 3))
    model(input_ids=tokens(), **task_kwargs(row))  # after the end
    found = recorder.statistics()
    assert list(found) == list(LAYERS)
    for name, gates in seen.items():
        assert len(gates) == 7 + 4 + 3 * 4
        assert_reads(found[name].as_dict(), plain_reading(gates))
        torch.testing.assert_close(found[name].relative_load.mean(), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("row", [r for r in ROWS if not r.gated], ids=[r.id for r in ROWS if not r.gated])
def test_methods_without_gates_have_no_statistics(row, tiny_llama):
    model = adapt(row, tiny_llama())
    assert not shows_gates(model)
    assert gate_statistics(model, [[1, 2, 3]]) == {}


def test_texts_are_read_as_rows_on_their_own(row, tiny_llama):
    """Batches, padding and order change nothing; the mode and the random state are as before."""
    model = adapt(row, tiny_llama()).train()
    texts = [tokens(1, length, seed=length)[0].tolist() for length in (3, 9, 1, 7, 5, 5, 2, 8, 6, 4, 3)]
    alone, state = {name: [] for name in LAYERS}, torch.get_rng_state()
    found = gate_statistics(model, Texts(texts, task_index=2), fill=258)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad(), headwater.observe(model.eval(), lambda name, gate: alone[name].extend(gate[0].tolist())):
        for text in texts:
            model(input_ids=torch.tensor([text]), **task_kwargs(row, 1, first=2))
    for name, gates in alone.items():
        wanted = plain_reading(gates)
        assert found[name].tokens == wanted["tokens"]
        assert found[name].load.tolist() == pytest.approx(wanted["load"], abs=1e-5)
        assert found[name].gate_entropy == pytest.approx(wanted["gate_entropy"], abs=1e-5)


def test_a_method_that_routes_by_the_prompt_is_given_it(tiny_llama):
    model = adapt(BY_ID["cond_mixlora"], tiny_llama())
    text = tokens(1, 9)[0].tolist()
    by_prompt = gate_statistics(model, Texts([text], prompt_lengths=[3]))
    assert {n: s.load.tolist() for n, s in by_prompt.items()} == {
        n: s.load.tolist() for n, s in _seen(model, text, [-100] * 3 + text[3:]).items()
    }
    assert any(not torch.equal(s.load, gate_statistics(model, [text])[n].load) for n, s in by_prompt.items())


def _seen(model, text, labels):
    with torch.no_grad(), GateRecorder(model) as recorder:
        model(input_ids=torch.tensor([text]), labels=torch.tensor([labels]))
    return recorder.statistics()


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_does_not_count_again(row, tiny_llama, reentrant):
    model = adapt(row, tiny_llama()).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with GateRecorder(model) as recorder:
        train_loss(row, model).backward()
        train_loss(row, model).backward()
    assert {name: s.tokens for name, s in recorder.statistics().items()} == dict.fromkeys(LAYERS, 2 * 2 * 7)


def test_a_sample_of_tokens_is_spread_evenly_and_moves(tiny_llama):
    model, row = adapt(BY_ID["rlora"], tiny_llama()), BY_ID["rlora"]
    with torch.no_grad(), GateRecorder(model, values_per_layer=4 * 3) as recorder:
        for _ in range(4):  # 14 tokens of 3 gates, every fourth, starting at each of the four places once
            model(input_ids=tokens(), **task_kwargs(row))
    with torch.no_grad(), GateRecorder(model) as whole:
        model(input_ids=tokens(), **task_kwargs(row))
    for name, gates in whole.statistics().items():
        assert recorder.statistics()[name].tokens == gates.tokens == 14
        torch.testing.assert_close(recorder.statistics()[name].load, gates.load)


def test_one_expert_that_gets_all():
    gates = torch.zeros(5, 4)
    gates[:, 2] = 1
    found = _of(gates)
    assert (found.top_k, found.gate_entropy, found.load_entropy) == (1, 0.0, 0.0)
    assert found.dead() == [0, 1, 3]
    assert _of(torch.eye(4)).dead() == []
    assert _of(torch.eye(4)).load_entropy == pytest.approx(1)  # every token is sure, and all experts are used
    assert _of(torch.eye(4)).gate_entropy == 0
    assert _of(torch.full((3, 4), 0.25)).gate_entropy == pytest.approx(1)
    assert _of(torch.ones(3, 1)).load_entropy == 1.0


def test_the_threshold_is_a_share_of_an_equal_load():
    soft = torch.tensor([[0.5, 0.45, 0.05]])  # an equal share is 1/3: the last gets 15 % of it
    assert _of(soft).dead() == []
    assert _of(soft).dead(0.2) == [2]
    two_of_four = torch.tensor([[1.0, 1, 0, 0]] * 19 + [[1.0, 0, 1, 0]]) / 2  # an equal load is 1/2
    assert _of(two_of_four).load.tolist() == pytest.approx([1, 0.95, 0.05, 0])
    assert _of(two_of_four).dead() == [3]
    assert _of(two_of_four).dead(0.11) == [2, 3]


def _of(gates):
    from headwater.analysis.gates import _sums, statistics_of

    sums, most = _sums(gates.unsqueeze(0), None)
    return statistics_of({"layer": (sums[0], float(most[0]))})["layer"]


def test_the_documented_lines_run(tiny_llama, capsys):
    _, code = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)  # the first trains
    names = {"model": adapt(BY_ID["rlora"], tiny_llama())}
    exec(code, names)
    assert {s.tokens for s in names["found"].values()} == {5}
    assert {s.tokens for s in names["recorder"].statistics().values()} == {3}
    assert len(capsys.readouterr().out.splitlines()) == len(LAYERS)


def test_a_gate_of_nothing_but_zeros_is_no_load():
    found = _of(torch.tensor([[0.0, 0, 0], [0.5, 0.5, 0]]))
    assert found.load.tolist() == [0.5, 0.5, 0]
    assert found.gate_entropy == pytest.approx(math.log(2) / math.log(3) / 2)


def two_active(tiny_llama, row, num_heads=3):
    model = adapt(row, tiny_llama())
    model.add_adapter("other", config(row, **({"num_heads": num_heads} if row.name == "rlora" else {})))
    model.base_model.set_adapter(["default", "other"])
    return model


@pytest.mark.parametrize("num_heads", [2, 3])
def test_the_gates_of_two_adapters_are_not_mixed(tiny_llama, num_heads):
    model = two_active(tiny_llama, BY_ID["rlora"], num_heads)
    for texts in ([[1, 2, 3]], [[1, 2, 3], [4, 5]]):
        with pytest.raises(headwater.HeadwaterError, match=r"mlp\.\w+ shows the gates of several active adapters"):
            gate_statistics(model, texts)
    with pytest.raises(headwater.HeadwaterError, match="2 adapters are active"):
        mean_gates(model, Texts([[1, 2, 3]]))
    for name, heads in (("default", 3), ("other", num_heads)):
        model.set_adapter(name)
        found = gate_statistics(model, [[1, 2, 3]])
        assert {(s.tokens, len(s.load)) for s in found.values()} == {(3, heads)}
    assert not model.get_base_model()._headwater_context.observers


class Twice(nn.Module):
    """One layer at two depths."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, input_ids):
        return self.layer(self.layer(input_ids))


def test_a_layer_that_runs_twice_is_counted_twice():
    model = get_peft_model(Twice(), config(BY_ID["rlora"], target_modules=["layer"], task_type=None))
    with GateRecorder(model) as recorder:
        for _ in range(3):
            model(torch.ones(2, 5, 8))
    assert recorder.statistics()["layer"].tokens == 3 * 2 * 2 * 5


@pytest.mark.parametrize(("row_id", "said"), [("rlora", 1), ("smora", 1), ("mlora", 0)])
def test_training_two_adapters_goes_on_without_their_gates(tiny_llama, tmp_path, row_id, said):
    """One becomes active with another in the middle of the training."""
    row = BY_ID[row_id]
    model = two_active(tiny_llama, row, num_heads=2)
    model.set_adapter("default")

    class Activate(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                model.base_model.set_adapter(["default", "other"])

    rows = [{"input_ids": tokens(seed=n)[0], "labels": tokens(seed=n)[0]} for n in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=2, logging_steps=1, save_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[MethodCallback(), Activate()])
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trainer.train()
    assert sum("gates are not watched any more" in str(w.message) for w in warned) == said
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert ["gate_entropy" in log for log in logs] == [bool(said)] * 2 + [False] * 4
