"""Which device each command runs its model on. A stand-in for the GPU is the meta device, which has no numbers: what a
command would do with its model is cut short."""

from __future__ import annotations

import contextlib

import pytest
import torch
from cli_support import run_main, write_run
from compose.pool_support import make_pool
from peft import get_peft_model
from tiny_models import make_tiny_llama
from torch import nn

import headwater
from headwater import base_model
from headwater.cli.adapters import load, locate
from headwater.cli.serve import _routes
from headwater.compose.scoring import Composition
from headwater.config import dump_config, load_config
from headwater.errors import HeadwaterError


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch):
    def own_device(*, use_cpu: bool = False) -> torch.device:
        return torch.device("cpu" if use_cpu else "meta")

    monkeypatch.setattr(base_model, "own_device", own_device)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that may use the GPU, as `run`, a pool of adapters, as `pool`, and the tasks' file `run.yaml`."""
    folder = tmp_path_factory.mktemp("made")
    path = write_run(folder)
    path.write_text(path.read_text().replace(", use_cpu: true", ""))
    config = load_config(path)
    fields = {key: value for key, value in config.method.items() if key != "name"}
    method = headwater.make_config(config.method["name"], task_type="CAUSAL_LM", **fields)
    get_peft_model(make_tiny_llama(), method).save_pretrained(folder / "run" / "adapter")
    (folder / "run" / "config.yaml").write_text(dump_config(config))
    make_pool(folder)
    return folder


@pytest.fixture
def device_of(monkeypatch, capsys, folder):
    """The device of the model that a command gives to a function, which is not run."""

    def ask(function: str, *arguments: object) -> str:
        found: set[str] = set()

        def cut(*given: object, **_: object) -> None:
            models = [one.pooled.model if isinstance(one, Composition) else one for one in given]
            found.update(p.device.type for m in models if isinstance(m, nn.Module) for p in m.parameters())
            raise HeadwaterError("far enough")

        monkeypatch.setattr(function, cut)
        words = [word.format(folder=folder) if isinstance(word, str) else word for word in arguments]
        assert "far enough" in run_main(capsys, *words).err
        (kind,) = found
        return kind

    return ask


EVALUATE = ("headwater.evaluation.score_tasks", "evaluate", "{folder}/run")
LM_EVAL = ("headwater.evaluation.lm_eval.lm_eval_scores", "evaluate", "{folder}/run", "--lm-eval", "bbh")


@pytest.mark.parametrize(
    "command",
    [
        EVALUATE,
        LM_EVAL,
        (*EVALUATE, "--tasks", "{folder}/run.yaml"),
        ("headwater.evaluation.score_tasks", "evaluate", "{folder}/run/adapter", "--tasks", "{folder}/run.yaml"),
        ("headwater.evaluation.generate_text", "generate", "{folder}/run", "-p", "one"),
        ("headwater.analysis.routing.gates_by_task", "inspect", "{folder}/run"),
        ("headwater.analysis.conflict.gradient_conflict", "conflict", "{folder}/run"),
        ("headwater.export.by_mean_gates", "export", "{folder}/run", "-o", "{folder}/out", "--per-task"),
        (
            "headwater.compose.scoring.score_way",
            "pool",
            "evaluate",
            "{folder}/pool",
            "--tasks",
            "{folder}/run.yaml",
            "--way",
            "base",
        ),
    ],
    ids=lambda command: " ".join(command[1:]),
)
def test_a_command_runs_its_model_on_the_gpu(device_of, command):
    assert device_of(*command) == "meta"


@pytest.mark.parametrize("setting", ["model.device_map=cpu", "training.use_cpu=true"])
@pytest.mark.parametrize("command", [EVALUATE, LM_EVAL, (*EVALUATE, "--tasks", "{folder}/run.yaml")])
def test_it_stays_on_the_cpu_where_the_config_says_so(device_of, command, setting):
    assert device_of(*command, "--set", setting) == "cpu"


def test_a_run_that_was_trained_on_the_cpu_is_scored_there(device_of, folder):
    file = folder / "run" / "config.yaml"
    before = file.read_text()
    file.write_text(before.replace("training:\n", "training:\n  use_cpu: true\n"))
    try:
        assert device_of(*EVALUATE) == "cpu"
    finally:
        file.write_text(before)


@pytest.mark.parametrize("source", ["run", "pool"])
def test_a_server_runs_its_model_on_the_gpu(folder, source):
    routes, _, _ = _routes(str(folder / source), 4, "", None, None, contextlib.ExitStack())
    assert {p.device.type for p in routes.model.parameters()} == {"meta"}


def test_merging_is_left_on_the_cpu(folder):
    model, _ = load(locate(str(folder / "run")), on_cpu=True)
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_the_gpu_is_the_ranks_own(monkeypatch):
    monkeypatch.undo()  # the real function
    assert base_model.own_device(use_cpu=True) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert base_model.own_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert base_model.own_device() == torch.device("cuda", 1)
    assert base_model.own_device(use_cpu=True) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert base_model.own_device() == torch.device("cpu")
