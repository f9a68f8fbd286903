"""Two processes train as one would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .common import adapted, make_rows
from .ranks import CASES
from .test_trainer import plain_gradients

ROOT = Path(__file__).parents[2]


def test_two_ranks_have_the_gradients_of_one_big_batch_and_resume_exactly(tiny_llama, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT / "src", ROOT, ROOT / "tests")))
    ran = subprocess.run(
        [*command, "-m", "tests.training.ranks", str(tmp_path)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    rows = [*make_rows(0, 5, longest=2), *make_rows(1, 3, longest=20)]
    for case, normalization in CASES.items():
        loss, expected = plain_gradients(adapted(tiny_llama()), rows, normalization == "example")
        of_a, _ = plain_gradients(adapted(tiny_llama()), rows[:5], normalization == "example")
        for rank in range(2):
            saved = torch.load(tmp_path / f"{case}{rank}.pt", weights_only=True)
            assert saved["log"]["loss"] == pytest.approx(loss, rel=1e-5)
            assert saved["log"]["task_loss/a"] == pytest.approx(of_a, rel=1e-5)
            for name, gradient in expected.items():
                torch.testing.assert_close(saved["gradients"][name], gradient, rtol=1e-4, atol=1e-7)
        logs = [torch.load(tmp_path / f"{case}{rank}.pt", weights_only=True)["log"] for rank in range(2)]
        assert logs[0]["gate_entropy"] == logs[1]["gate_entropy"] < 1  # over both ranks' rows, which differ
    assert [(tmp_path / f"resumed{rank}").read_text() for rank in range(2)] == ["True", "True"]
