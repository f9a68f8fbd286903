"""What all benchmarks share: interleaved timing, bytes saved for backward, FLOPs, and writing down the results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

from headwater.training.memory import SavedBytes

RESULTS = Path(__file__).parent / "results"
PAUSE = 40_000_000  # cycles of a GPU, some 20 ms: longer than a program takes to queue one layer's step
# glibc then never gives large blocks back, so a fresh tensor costs no page faults
KEPT_HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 26)}


def arguments(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes; `defaults` override."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="write the results to this file")
    parser.add_argument("--rounds", type=int, default=9, help="repetitions; each runs every variant once, shuffled")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch")
    parser.add_argument(
        "--heap", choices=("default", "kept"), default="default", help="what glibc does with freed blocks"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(**defaults)
    return parser


def prepare(options: argparse.Namespace) -> None:
    """Sets threads and seed; starts the process anew where the heap's settings, read at its start, are not there."""
    if options.heap == "kept" and any(os.environ.get(key) != value for key, value in KEPT_HEAP.items()):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **KEPT_HEAP})
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)


def clock(device: str) -> float:
    """Seconds. On a GPU, wall time once it is idle; on the CPU, the process's own CPU time, for which other programs on
    the machine do not count. With one thread and nothing else running the two are the same.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def seconds_of(run: Callable[[], Any], device: str) -> float:
    start = clock(device)
    run()
    return clock(device) - start


def busy_seconds(run: Callable[[], Any], device: str) -> float:
    """How long a GPU is at it when it never waits for the program: all launches are queued behind a pause."""
    if device == "cpu":
        return seconds_of(run, device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(PAUSE)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleave(
    variants: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    device: str = "cpu",
    warmup: int = 1,
    seed: int = 0,
    timer: Callable[[Callable[[], Any], str], float] = seconds_of,
) -> dict[str, list[float]]:
    """Times each variant once per round, in another order each round: what slows the machine slows all of them.

    Returns:
        name -> seconds, one per round.
    """
    for _ in range(warmup):
        for run in variants.values():
            run()
    order, shuffle = list(variants), random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            seconds[name].append(timer(variants[name], device))
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(seconds: Mapping[str, Sequence[float]], floor: str) -> dict[str, dict[str, float]]:
    """Per variant, the spread over rounds of its time divided by the floor's of the same round."""
    return {name: spread([t / f for t, f in zip(own, seconds[floor], strict=True)]) for name, own in seconds.items()}


def show_ratio(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"


def saved_bytes(run: Callable[[], Any], *, without: nn.Module) -> int:
    """Bytes that one forward keeps for its backward; each storage once, `without` a module's parameters and buffers."""
    with SavedBytes(without) as saved:
        output = run()
    del output
    return saved.total


def _addmm_in_place(self_shape: Any, a_shape: Any, b_shape: Any, **kwargs: Any) -> int:
    return addmm_flop(self_shape, a_shape, b_shape)


def flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products in `run`."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_in_place}) as counter:
        run()
    return counter.get_total_flops()


def device_name(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def environment(options: argparse.Namespace, device: str = "cpu") -> dict[str, Any]:
    """What the numbers depend on; no date, no host, no path."""
    packages = ("headwater", "torch", "transformers", "peft", "trl")
    clocked = "CPU time of the process" if device == "cpu" else "wall time, device synchronised"
    settings = {key: value for key, value in vars(options).items() if key != "json" and not isinstance(value, Path)}
    if "model" in settings:  # a folder's name says which model; where it lies is nobody's business
        settings["model"] = Path(settings["model"]).name
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "clock": clocked,
        "settings": settings,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def write(path: Path | None, result: Mapping[str, Any]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 150).print(table)
