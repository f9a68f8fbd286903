"""The commands that make or fetch what a method starts from, and their arguments."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from headwater.cli.arguments import Adapter


def calibrate(
    source: Adapter,
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="The mask's file, *.safetensors.")],
    sparsity: Annotated[float, typer.Option(help="Share of B's entries that are left out.")] = 0.9,
) -> None:
    """Find LoRI-S's mask in a trained LoRI-D adapter, for `method: {name: lori, mask: FILE}`."""
    from headwater.cli.ingredients import calibrate as run

    run(source, sparsity, output)


def subspace(
    model: Annotated[list[str], typer.Option("--model", metavar="MODEL", help="Hub id, folder or GGUF; repeatable.")],
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="The basis's file, *.safetensors.")],
    r: Annotated[int, typer.Option("--r", help="Number of basis vectors.")] = 64,
    target: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--target", metavar="NAME", help="Layers, by their names' end; by default q_proj, k_proj and v_proj."
        ),
    ] = None,
    scope: Annotated[str, typer.Option(help="Who shares: layer_qkv, layer_projection or global.")] = "layer_qkv",
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="MODEL", help="Take the models' differences to this one instead of their weights."),
    ] = None,
    orientation: Annotated[str, typer.Option(help="output, or input for square layers.")] = "output",
    basis_scale: Annotated[str, typer.Option(help="orthonormal, sqrt_s or s.")] = "orthonormal",
    normalize: Annotated[bool, typer.Option(help="Give every weight the same norm first.")] = False,
    weight: Annotated[
        Optional[list[float]],  # noqa: UP045
        typer.Option("--weight", metavar="C", help="How much each model counts, in the order of --model; repeatable."),
    ] = None,
) -> None:
    """Extract the common subspace of models' weights, for `method: {name: cora, basis: FILE}`."""
    from headwater.cli.ingredients import subspace as run

    run(
        model,
        output,
        r=r,
        targets=target or [],
        scope=scope,
        base=base,
        orientation=orientation,
        basis_scale=basis_scale,
        normalize=normalize,
        importance=weight or [],
    )


def import_(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder with an adapter of the authors' code.")],
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="The adapter folder to write.")],
    method: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="rlora, hydralora or lori; needed where the files do not tell."),
    ] = None,
    rslora: Annotated[bool, typer.Option("--rslora", help="R-LoRA: scale by alpha / sqrt(r), as in training.")] = False,
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="MODEL", help="The base model, where the files name none or another."),
    ] = None,
) -> None:
    """Turn a published R-LoRA, HydraLoRA or LoRI adapter into one of headwater's."""
    from headwater.cli.importing import run

    run(source, output, method=method, rslora=rslora, base=base)
