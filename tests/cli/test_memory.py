"""Memory that runs out is said without a traceback, and nothing else is taken for it."""

import pytest
import torch
from cli_support import run_main, write_run


@pytest.fixture
def run_file(tmp_path):
    write_run(tmp_path)
    return tmp_path / "run.yaml"


def saying(done, *texts):
    assert done.code == 2, done
    for text in texts:
        assert text in done.err


def test_what_does_not_fit(capsys, run_file):
    done = run_main(capsys, "train", run_file, "--set", "method={name: rlora, num_heads: 1000000000000}")
    saying(done, "error: out of memory", "GiB more did not fit", "training.per_device_train_batch_size")


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of"),
            "error: out of memory of the GPU: 2.5 GiB more did not fit",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "error: out of memory of the GPU\n"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB)"), "error: out of memory\n"),
        (MemoryError(), "error: out of memory\n"),
    ],
)
def test_other_memory_that_runs_out(capsys, run_file, monkeypatch, raised, said):
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr("headwater.training.train", fail)
    saying(run_main(capsys, "train", run_file), said, "gradient_checkpointing")


def test_other_errors_of_the_program_are_not_hidden(capsys, run_file, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("The size of tensor a must match the size of tensor b")

    monkeypatch.setattr("headwater.training.train", fail)
    with pytest.raises(RuntimeError, match="size of tensor"):
        run_main(capsys, "train", run_file)
