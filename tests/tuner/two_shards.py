"""Run in a process of its own: one backward on two ranks whose layers are sharded by FSDP2, for the rows named.

    python -m tuner.two_shards FOLDER ROW...

Writes `gradients.safetensors` (`<row id>/<parameter>`): the whole gradients, averaged over two ranks of two rows each.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from .helpers import adapt, task_kwargs, tokens
from .rows import BY_ID, Row


def backward(row: Row, base: nn.Module, rank: int | None, *, flat: bool = False) -> dict[str, torch.Tensor]:
    """The adapter's gradients; `rank` None is a single process with the whole batch and nothing sharded. `flat`: by
    FSDP1, which has a layer's parameters in one tensor."""
    model = adapt(row, base)
    x, part = tokens(rows=4), slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    ids = {name: value[part] for name, value in task_kwargs(row, 4).items()}
    if flat:
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        policy = ModuleWrapPolicy({type(model.base_model.model.model.layers[0])})
        model = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id="cpu")
    elif rank is not None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    model(input_ids=x[part], labels=x[part], **ids).loss.backward()
    if flat:
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            found = [(n, p.grad) for n, p in model.named_parameters() if p.requires_grad]
            return {n.replace("_fsdp_wrapped_module.", ""): g.clone() for n, g in found}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, p in trained.items() if p.grad is None]
    assert not missing, missing
    return {n: p.grad if rank is None else p.grad.full_tensor() for n, p in trained.items()}


def work(rank: int, folder: Path, rows: list[str]) -> None:
    from tiny_models import make_tiny_llama

    from . import task_probe  # noqa: F401

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {}
    for name in rows:
        # FSDP1 has another layer's gate in shards
        for flat in (False, True) if name != "moe_lora-by-task" else (False,):
            gradients = backward(BY_ID[name], make_tiny_llama(), rank, flat=flat)
            found |= {f"{name}{1 if flat else 2}/{key}": g.contiguous() for key, g in gradients.items()}
    if rank == 0:
        save_file(found, folder / "gradients.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    arguments = (Path(sys.argv[1]), sys.argv[2:])
    torch.multiprocessing.start_processes(work, args=arguments, nprocs=2, start_method="fork")
