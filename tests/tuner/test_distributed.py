"""Two ranks do together what one process does alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .helpers import assert_near, gradients
from .penalised import PENALTY, batch, explicit_penalty, make
from .rows import BY_ID
from .two_ranks import sgd_step
from .two_shards import backward

SHARDED = ("rlora", "moe_lora-by-task", "mtl_lora")  # with the gate of another layer, and with tasks


def run(module: str, folder: Path, *arguments: str) -> Path:
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed package")
    alone = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-m", f"tuner.{module}", folder, *arguments],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, **alone, "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run("two_ranks", tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return load_file(run("two_shards", tmp_path_factory.mktemp("shards"), *SHARDED) / "gradients.safetensors")


@pytest.mark.parametrize(
    ("row_id", "fsdp"), [*((row_id, 2) for row_id in SHARDED), *((row_id, 1) for row_id in ("rlora", "mtl_lora"))]
)
def test_layers_sharded_by_fsdp_have_the_gradients_of_one_process(shards, tiny_llama, row_id, fsdp):
    expected, key = backward(BY_ID[row_id], tiny_llama(), None), f"{row_id}{fsdp}/"
    found = {name.removeprefix(key): g for name, g in shards.items() if name.startswith(key)}
    assert_near(found, expected, relative=1e-4)


@pytest.mark.parametrize("row_id", BY_ID)
def test_a_step_on_two_ranks_is_the_step_of_one_process(folder, tiny_llama, row_id):
    expected = sgd_step(BY_ID[row_id], tiny_llama(), None)
    stepped = load_file(folder / "stepped.safetensors")
    found = {name.removeprefix(f"{row_id}/"): t for name, t in stepped.items() if name.startswith(f"{row_id}/")}
    assert_near(found, expected, relative=1e-5)


def test_plain_trainer_on_two_ranks_weighs_the_auxiliary_loss_the_same(folder, tiny_llama):
    model = make(tiny_llama, penalty=0.0)
    loss, penalty, _ = explicit_penalty(model, {name: torch.cat([batch(0)[name], batch(1)[name]]) for name in batch()})
    (loss + PENALTY * penalty).backward()
    assert_near(load_file(folder / "trainer.safetensors"), gradients(model), relative=1e-3)
