"""What was fitted on a pool's adapters, in a folder: `<kind>.json` and, where there are tensors, `<kind>.safetensors`.

Both name the adapters, in order, and the first what their updates are made of, weights and scalings: gates of other
adapters would route to anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import HeadwaterError, Problem
from ..files import whole_folder, write_json
from .adapter import WEIGHTS_FILE, Adapter, read_config, scaling_fields, write_adapter
from .pool import AdapterPool

SCHEMA = 2


def write_fitted(
    folder: str | Path,
    kind: str,
    pool: AdapterPool,
    names: Sequence[str],
    fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
    adapter: Adapter | None = None,
) -> None:
    """Write a folder; it appears when it is whole, in the place of what was there.

    Args:
        kind: `flow`, `hub` or `arrow`; names the files.
        fields: more to keep, fit for JSON.
        adapter: written as PEFT's files into the same folder.

    Raises:
        NotWritten: if it cannot be.
    """
    from safetensors.torch import save_file

    with whole_folder(folder) as work:
        adapters = {name: _update(pool, name) for name in names}
        write_json(work / f"{kind}.json", {"schema": SCHEMA, "kind": kind, "adapters": adapters, **fields})
        if tensors:
            held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(held, work / f"{kind}.safetensors", metadata={"adapters": json.dumps(list(names))})
        if adapter is not None:
            write_adapter(adapter, work, pool.base_model)


def kind_of(folder: str | Path) -> str:
    """What was fitted in the folder: `flow`, `hub` or `arrow`.

    Raises:
        HeadwaterError: there is nothing of the kind.
    """
    for kind in ("flow", "hub", "arrow"):
        if (Path(folder) / f"{kind}.json").is_file():
            return kind
    fix = "headwater pool flow, hub and arrow write such folders"
    raise HeadwaterError(Problem("nothing fitted on a pool is in this folder", str(folder), fix))


def read_fitted(
    folder: str | Path, kind: str, pool: AdapterPool
) -> tuple[list[str], dict[str, Any], dict[str, Tensor]]:
    """The adapters' names in order, the other fields, and the tensors.

    Raises:
        HeadwaterError: a file is missing or damaged, or the pool's adapters are not those that it was fitted on.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    file = folder / f"{kind}.json"
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        schema, adapters = fields.pop("schema"), dict(fields.pop("adapters"))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise HeadwaterError(Problem(f"not readable: {error!r}", str(file))) from None
    if schema != SCHEMA or fields.pop("kind", None) != kind or not adapters:
        fix = f"fit it again with headwater pool {kind}"
        raise HeadwaterError(Problem(f"this is not version {SCHEMA} of a {kind} file", str(file), fix))
    names, tensors = list(adapters), {}
    weights = folder / f"{kind}.safetensors"
    if kind == "flow" or weights.exists():  # Arrow makes its tensors anew, and a composed adapter has none
        try:
            with safe_open(weights, "pt") as opened:
                listed = json.loads((opened.metadata() or {}).get("adapters", "[]"))
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, ValueError, SafetensorError) as error:
            raise HeadwaterError(Problem(f"not readable: {error}", str(weights))) from None
        if listed != names:
            what = f"the tensors are of the adapters {', '.join(listed)}, and {file.name} names {', '.join(names)}"
            raise HeadwaterError(Problem(what, str(weights), "restore both files as they were written"))
    pool.require(*names)
    changed = {name: _differences(adapters[name], _update(pool, name)) for name in names}
    if any(changed.values()):
        fix = "fit it again on the adapters that are in the pool now"
        what = "the pool's adapter {!r} is not the one that this was fitted on: {}"
        raise HeadwaterError(*(Problem(what.format(n, how), str(file), fix) for n, how in changed.items() if how))
    return names, fields, tensors


def _update(pool: AdapterPool, name: str) -> dict[str, Any]:
    """What an adapter's update is made of. Not the whole config: the base model's name there, for one, may change."""
    return {"weights": pool[name].sha256[WEIGHTS_FILE], **scaling_fields(read_config(pool.folder(name)))}


def _differences(before: Any, now: Mapping[str, Any]) -> str:
    before = before if isinstance(before, dict) else {}
    if before.get("weights") != now["weights"]:
        return "it has other weights"
    return ", ".join(
        f"{key} was {before.get(key)!r} and is {v!r} now" for key, v in now.items() if before.get(key) != v
    )
