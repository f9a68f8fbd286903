"""`headwater pool`: folders of adapters, and what can be made of them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headwater.cli.console import err_console, out_console, quiet_libraries, table
from headwater.errors import HeadwaterError, Problem

if TYPE_CHECKING:
    from headwater.data.rows import Row


def create(folder: str, model: str) -> None:
    """Make an empty pool for a base model."""
    from headwater.compose import AdapterPool

    quiet_libraries()
    pool = AdapterPool.create(folder, model)
    _say(f"{folder}: an empty pool for {pool.base_model}, fingerprint {pool.fingerprint.id}")


def add(
    folder: str, source: str, name: str | None, samples: str | None, num_samples: int, seed: int, *, same_base: bool
) -> None:
    """Copy an adapter into a pool, with texts by which requests find it.

    Raises:
        HeadwaterError: there is no pool or no adapter, or the adapter does not belong into the pool.
    """
    from headwater.cli.adapters import locate
    from headwater.compose import AdapterPool
    from headwater.data.rows import read_rows

    quiet_libraries()
    pool = AdapterPool(folder)
    found = locate(source)
    rows: list[Row] = []
    if samples is not None:
        rows = read_rows(samples)
    elif found.config is not None:
        from headwater.data.tasks import load_tasks

        rows = [row for task in load_tasks(found.config.tasks, found.config.base_dir) for row in task.train]
    texts = sample_texts(rows, num_samples, seed)
    name = name or Path(source).resolve().name
    entry = pool.add(found.adapter, name, samples=texts, same_base=same_base)
    _say(
        f"{name}: rank {entry.rank}, {entry.layers} layers, {entry.parameters:,} parameters, {len(texts)} sample texts"
    )
    if not texts:
        err_console().print(f"without sample texts, retrieval cannot find {name}; give --samples FILE", highlight=False)


def sample_texts(rows: Sequence[Row], count: int, seed: int) -> list[str]:
    """At most `count` different prompts of `rows`, drawn at random; of a conversation what the user said last."""
    texts = list(dict.fromkeys(row.prompt.strip() for row in rows if row.prompt.strip()))
    return texts if len(texts) <= count else random.Random(seed).sample(texts, count)


def show(folder: str, *, as_json: bool) -> None:
    """List a pool's adapters."""
    from headwater.compose import AdapterPool

    pool = AdapterPool(folder)
    if as_json:
        adapters = {name: entry.model_dump() for name, entry in pool.entries.items()}
        print(json.dumps({"base_model": pool.base_model, "fingerprint": pool.fingerprint.id, "adapters": adapters}))
        return
    rows = [
        (name, e.rank, e.layers, f"{e.parameters:,}", len(e.samples), e.sha256["adapter_model.safetensors"][:12])
        for name, e in pool.entries.items()
    ]
    columns = ["adapter", "rank", "layers", "parameters", "samples", "SHA-256"]
    _say(f"base model {pool.base_model}, fingerprint {pool.fingerprint.id}")
    out_console().print(table(columns, rows))


def remove(folder: str, names: Sequence[str]) -> None:
    """Take adapters out of a pool.

    Raises:
        HeadwaterError: the pool lacks one of them; then none is removed.
    """
    from headwater.compose import AdapterPool

    pool = AdapterPool(folder)
    pool.require(*names)
    for name in dict.fromkeys(names):
        pool.remove(name)
        _say(f"removed {name}")


def check(folder: str) -> None:
    """Read all of a pool's files.

    Raises:
        HeadwaterError: all that is wrong with them.
    """
    from headwater.compose import AdapterPool

    pool = AdapterPool(folder)
    problems = pool.check()
    if problems:
        raise HeadwaterError(*problems)
    _say(f"{folder}: {len(pool)} adapters, all files as they were added")


def merge(folder: str, weighted: Sequence[str], how: str, output: str) -> None:
    """Write one plain LoRA adapter made of several.

    Raises:
        HeadwaterError: an unknown adapter or way of merging, no weights, ranks that differ where factors are averaged.
    """
    from headwater.compose import AdapterPool
    from headwater.compose.adapter import write_adapter
    from headwater.compose.merge import WAYS
    from headwater.export import check_output, new_folder

    pool = AdapterPool(folder)
    weights = _weights(weighted)
    pool.require(*weights)
    if how not in WAYS:
        raise HeadwaterError(Problem(f"unknown way {how!r}", "--how", f"one of {', '.join(WAYS)}"))
    check_output(Path(output))
    merged = WAYS[how]([pool.load(name) for name in weights], list(weights.values()))
    if not all(t.isfinite().all() for layer in merged.layers.values() for t in (layer.A, layer.B)):
        what = "these weights are too large: the merged adapter would hold numbers that are not finite"
        raise HeadwaterError(Problem(what, "--adapter", "give smaller weights"))
    with new_folder(Path(output)) as work:
        write_adapter(merged, work, pool.base_model)
    _say(f"{output}: {how} of {', '.join(f'{w:g} {name}' for name, w in weights.items())}")


def cluster(folder: str, names: Sequence[str], count: int, seed: int, *, as_json: bool) -> None:
    """Show which adapters are alike.

    Raises:
        HeadwaterError: an unknown adapter, or more clusters than adapters.
    """
    from headwater.compose import AdapterPool
    from headwater.compose.cluster import cluster as clusters_of
    from headwater.compose.cluster import similarity

    pool = AdapterPool(folder)
    pool.require(*names)
    chosen = list(dict.fromkeys(names)) or pool.names
    adapters = [pool.load(name) for name in chosen]
    found, cosines = clusters_of(adapters, count, seed=seed), similarity(adapters)
    if as_json:
        print(json.dumps({"clusters": found, "adapters": chosen, "similarity": cosines.tolist()}))
        return
    if len(found) < count:
        err_console().print(f"{len(found)} clusters, not {count}: other adapters are the same", highlight=False)
    rows = []
    for number, members in enumerate(found, 1):
        inside = [chosen.index(name) for name in members]
        outside = [i for i in range(len(chosen)) if i not in inside]
        pairs = [cosines[i, j].item() for i in inside for j in inside if i < j]
        others = cosines[inside][:, outside].flatten().tolist()
        rows.append([number, ", ".join(members), *(f"{sum(p) / len(p):.3f}" if p else "" for p in (pairs, others))])
    out_console().print(table(["cluster", "adapters", "mean cosine inside", "and to the others"], rows))


def _weights(weighted: Sequence[str]) -> dict[str, float]:
    weights: dict[str, float] = {}
    problems = []
    for text in weighted:
        name, _, value = text.rpartition("=")
        try:
            weight = float(value)
        except ValueError:
            problems.append(Problem(f"{text!r} does not say which weight an adapter has", "--adapter", "NAME=WEIGHT"))
            continue
        if not math.isfinite(weight):
            problems.append(Problem(f"the weight of {text!r} is not a finite number", "--adapter", "give a finite one"))
        if name in weights:
            problems.append(Problem(f"{name!r} is given twice", "--adapter", "give each adapter once, with its weight"))
        weights[name] = weight
    if problems:
        raise HeadwaterError(*problems)
    return weights


def _say(text: str) -> None:
    out_console().print(text, soft_wrap=True, highlight=False, markup=False)
