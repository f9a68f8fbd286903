"""Run in a process of its own: one optimiser step on two ranks over gloo, for every row; then plain `Trainer` on two.

    python -m tuner.two_ranks FOLDER

Writes `stepped.safetensors` (`<row id>/<parameter>` after one step of SGD on four rows of tokens, two to a rank) and
`trainer.safetensors` (the step that `Trainer` took under an auxiliary loss).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .helpers import adapt, task_kwargs, tokens
from .rows import ROWS, Row


def sgd_step(row: Row, base: nn.Module, rank: int | None) -> dict[str, torch.Tensor]:
    """The adapter's parameters after a step; `rank` None is a single process with the whole batch."""
    model = adapt(row, base)  # in eval mode: dropout differs by rank, and some auxiliary losses are no mean over rows
    trained = [p for p in model.parameters() if p.requires_grad]
    x, part = tokens(rows=4), slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    ids = {name: value[part] for name, value in task_kwargs(row, 4).items()}
    forward = model if rank is None else DistributedDataParallel(model)
    forward(input_ids=x[part], labels=x[part], **ids).loss.backward()
    torch.optim.SGD(trained, lr=1.0).step()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def work(rank: int, folder: Path) -> None:
    from tiny_models import make_tiny_llama

    from . import task_probe  # noqa: F401
    from .penalised import train_one_step

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", GLOO_SOCKET_IFNAME="lo")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    stepped = {}
    for row in ROWS:
        for name, value in sgd_step(row, make_tiny_llama(), rank).items():
            other = value.clone()
            dist.broadcast(other, src=0)
            assert torch.equal(other, value), f"{row.id}: the ranks disagree on {name}"
            stepped[f"{row.id}/{name}"] = value
    by_trainer = train_one_step(make_tiny_llama, folder / "trainer", size=2, accumulation=2)
    if rank == 0:
        save_file(stepped, folder / "stepped.safetensors")
        save_file(by_trainer, folder / "trainer.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    # forked after the imports, which take longer than everything else here
    torch.multiprocessing.start_processes(work, args=(Path(sys.argv[1]),), nprocs=2, start_method="fork")
