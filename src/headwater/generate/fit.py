"""Training of the generator. A step depends on the seed and its number alone, so a resumed run is the same run."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import HeadwaterError, Problem
from ..files import whole_folder, write_json
from .cvae import CVAE, can_train, cvae_loss
from .generator import AdapterGenerator
from .layout import Layout, Scale
from .spec import MetaSpec

Report = Callable[[int, dict[str, float]], None]


def new_generator(
    layout: Layout, weights: Mapping[str, Tensor], vectors: Mapping[str, Tensor], spec: MetaSpec, seed: int
) -> AdapterGenerator:
    """An untrained generator for tasks' adapters: scales and origin are measured, the autoencoder is drawn.

    Args:
        weights: task name -> its collected adapters, `(n, L)`.
        vectors: task name -> its vector, `(d,)`.
        seed: of the autoencoder's start.
    """
    tasks = list(weights)
    width = vectors[tasks[0]].numel()
    mean = torch.stack([weights[name].mean(0) for name in tasks]).mean(0)
    origin = mean if spec.origin == "mean" else torch.zeros(layout.length)
    scales = {name: Scale.of(layout, weights[name] - origin) for name in tasks}
    if spec.stats == "pooled":
        scales = dict.fromkeys(tasks, Scale.average(list(scales.values())))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cvae = CVAE(layout.length, width, spec.latent, spec.channels)
    return AdapterGenerator(
        layout,
        cvae,
        {name: vectors[name] for name in tasks},
        torch.stack([vectors[name] for name in tasks]).mean(0),
        scales,
        origin,
        spec.task_vector.model_dump(),
    )


def check_batches(length: int, tasks: int, spec: MetaSpec, where: str) -> None:
    """Refuses batches of one adapter that the autoencoder's channels halve to a single value.

    Args:
        length: numbers in an adapter.
        tasks: that a generator learns, at the least.
        where: the setting to name, e.g. with its file and line.

    Raises:
        HeadwaterError: for such a batch.
    """
    if can_train(length, spec.channels, tasks * spec.rows_per_task):
        return
    what = (
        f"a generator of one task learns from one adapter at a time, and {len(spec.channels)} channels halve its "
        f"{length:,} numbers to a single one, which cannot be normalised"
    )
    fix = "set meta.rows_per_task to 2 or more, give more tasks or fewer meta.channels"
    raise HeadwaterError(Problem(what, where, fix))


def fit(
    generator: AdapterGenerator,
    weights: Mapping[str, Tensor],
    spec: MetaSpec,
    seed: int,
    *,
    state: Path | None = None,
    report: Report | None = None,
) -> None:
    """Trains the generator's autoencoder: AdamW, a cosine schedule to 0, each batch with as many adapters of each task.

    Args:
        weights: task name -> its collected adapters, `(n, L)`.
        seed: of the batches and of eps.
        state: folder that the training's state is kept in; one that is there is resumed from, exactly.
        report: called after each step with its number and `{"error", "kl"}`.

    Raises:
        HeadwaterError: the loss is not finite, `state` is another training's, or as `check_batches`.
    """
    check_batches(generator.layout.length, len(generator.tasks), spec, "meta.rows_per_task")
    cvae = generator.cvae.train()  # on the CPU, where the same draws give the same generator on every machine
    normalised = {name: generator.normalise(weights[name], name) for name in generator.tasks}
    conditions = torch.stack([generator.condition(v) for v in generator.tasks.values()])
    conditions = conditions.repeat_interleave(spec.rows_per_task, dim=0)
    optimizer = torch.optim.AdamW(cvae.parameters(), lr=spec.learning_rate)
    settings = {**_settings(spec, seed), "data": _digest(normalised)}
    done = _resume(state, settings, cvae, optimizer) if state is not None else 0
    for step in range(done, spec.steps):
        draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = [x[torch.randint(len(x), (spec.rows_per_task,), generator=draw)] for x in normalised.values()]
        for group in optimizer.param_groups:
            group["lr"] = spec.learning_rate * 0.5 * (1 + math.cos(math.pi * step / spec.steps))
        beta = spec.beta * min(1.0, (step + 1) / max(spec.kl_warmup, 1))
        loss, error, kl = cvae_loss(cvae, torch.cat(rows), conditions, beta=beta, generator=draw)
        if not torch.isfinite(loss):
            fix = "lower meta.learning_rate"
            raise HeadwaterError(Problem(f"the generator's loss is not finite at step {step + 1}", "meta", fix))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if report is not None:
            report(step + 1, {"error": error.item(), "kl": kl.item()})
        if state is not None and (step + 1) % spec.save_steps == 0:
            _save(state, settings, step + 1, cvae, optimizer)
    cvae.eval()


def check_state(state: Path, spec: MetaSpec, seed: int) -> None:
    """Refuses what `fit` would, as far as settings alone say it: before a run's files are written anew.

    Raises:
        HeadwaterError: `state` is another training's.
    """
    _held(state, _settings(spec, seed))


def _settings(spec: MetaSpec, seed: int) -> dict[str, Any]:
    """What decides the trajectory beside the adapters; a state made under other settings must not be gone on with.

    The conditions go by `task_vector`. Its settings are compared and not the vectors, which differ in their last digits
    from one device to another.
    """
    keys = {"latent", "channels", "beta", "kl_warmup", "steps", "learning_rate", "rows_per_task", "task_vector"}
    return {"seed": seed, **spec.model_dump(mode="json", include=keys)}


def _digest(normalised: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, x in normalised.items():
        digest.update(name.encode() + x.numpy().tobytes())
    return digest.hexdigest()


def _save(folder: Path, settings: dict[str, Any], step: int, cvae: CVAE, optimizer: torch.optim.Optimizer) -> None:
    moments = {
        f"{index}.{name}": value
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }
    tensors = {f"cvae.{name}": t.contiguous() for name, t in cvae.state_dict().items()} | moments
    with whole_folder(folder) as work:
        save_file(tensors, work / _STATE)
        write_json(work / "state.json", {"settings": settings, "step": step})


def _held(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The note of a state that is there. It must be of these settings."""
    file = folder / "state.json"
    if not file.is_file():
        return None
    held: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    then = held["settings"]
    if changed := sorted(key for key in settings if then.get(key) != settings[key]):
        what = f"holds the state of another training of the generator: {', '.join(changed)} differ"
        raise HeadwaterError(Problem(what, str(folder), "choose another output_dir, or delete this folder"))
    return held


def _resume(folder: Path, settings: dict[str, Any], cvae: CVAE, optimizer: torch.optim.Optimizer) -> int:
    held = _held(folder, settings)
    if held is None:
        return 0
    tensors = load_file(folder / _STATE)
    cvae.load_state_dict({n.removeprefix("cvae."): t for n, t in tensors.items() if n.startswith("cvae.")})
    entries: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if not name.startswith("cvae."):
            index, _, moment = name.partition(".")
            entries.setdefault(int(index), {})[moment] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})
    return int(held["step"])


_STATE = "state.safetensors"
