"""`headwater calibrate` and `headwater subspace`: files that an adapter is made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.text import Text

from headwater.cli.adapters import attach_to_shape, locate
from headwater.cli.console import err_console, out_console, quiet_libraries
from headwater.errors import HeadwaterError, Problem


def calibrate(source: str, sparsity: float, output: str) -> None:
    """Write LoRI-S's mask from a trained LoRI-D adapter.

    Raises:
        HeadwaterError: there is no adapter, it is of another method or untrained, or the sparsity is out of range.
    """
    _check_output(output)
    model = attach_to_shape(locate(source))

    from headwater.methods.files import write_tensors
    from headwater.methods.lori import calibrate as mask_of
    from headwater.tuner import MethodLayer

    branches = {m.name: m.branch("default") for m in model.modules() if isinstance(m, MethodLayer)}
    tensors = mask_of(branches, sparsity)
    write_tensors(tensors, output, {"sparsity": str(sparsity), "source": str(source)})
    entries = sum(branch.writes().numel() for branch in branches.values())
    out_console().print(
        f"{output}: {round((1 - sparsity) * entries):,} of {entries:,} entries in {len(branches)} layers",
        highlight=False,
        soft_wrap=True,
    )


def subspace(
    models: Sequence[str],
    output: str,
    *,
    r: int,
    targets: Sequence[str],
    scope: str,
    base: str | None,
    orientation: str,
    basis_scale: str,
    normalize: bool,
    importance: Sequence[float],
) -> None:
    """Write the common subspace of models' weights, or of their differences to `base`, for method cora.

    Raises:
        HeadwaterError: a model cannot be loaded, the models differ, or an option is out of range.
    """
    _check_output(output)
    if importance and len(importance) != len(models):
        what = f"{len(models)} model(s) and {len(importance)} weight(s)"
        raise HeadwaterError(Problem(what, "--weight", "give one for each --model, in their order, or none"))
    quiet_libraries()

    from headwater.methods.files import write_tensors
    from headwater.subspace import QKV, SubspaceSpec, differences, extract

    spec = SubspaceSpec(r, tuple(targets) or QKV, scope, orientation, basis_scale, normalize)  # type: ignore[arg-type]
    weights = _weights(models, spec.targets)
    if base is not None:
        weights = differences(weights, next(_weights([base], spec.targets)))
    bases = extract(weights, spec, importance or None)
    about = {"r": str(r), "scope": scope, "weights": "full" if base is None else "delta", "orientation": orientation}
    about |= {"basis_scale": basis_scale, "models": ", ".join(models), "importance": ", ".join(map(str, importance))}
    write_tensors(bases, output, about)
    out_console().print(
        f"{output}: a basis of {r} vectors for each of {len(bases)} layers, from {len(models)} model(s)",
        highlight=False,
        soft_wrap=True,
    )


def _weights(models: Sequence[str], targets: tuple[str, ...]) -> Iterator[dict]:
    from headwater.base_model import load_base_model
    from headwater.subspace import target_weights

    for name in models:
        with err_console().status(Text(f"reading {name}")):
            model, _ = load_base_model(name)
            try:
                weights = target_weights(model, targets)
            except HeadwaterError as error:  # it does not know the model's name
                raise HeadwaterError(*(replace(problem, where=name) for problem in error.problems)) from None
            yield weights


def _check_output(output: str) -> None:
    """Before anything is read, which may take long."""
    file = Path(output)
    if file.suffix != ".safetensors":
        raise HeadwaterError(Problem(f"{output!r} should end on .safetensors", "--output"))
    if file.is_dir():
        raise HeadwaterError(Problem(f"{output} is a folder", "--output", "give the file's name"))
    from headwater.training.folder import check_writable

    check_writable(file.parent, f"--output {output}", "choose another place")
