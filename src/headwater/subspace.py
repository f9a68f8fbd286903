"""The common subspace of several models' weights: CoRA's up-projection.

Xiao et al., arXiv:2409.02119. The leading left singular vectors of weights side by side, [W_1 | W_2 | ...], are the
leading eigenvectors of sum_i W_i W_i^T; so models are read one after the other, and no wide matrix is made. Models may
count more or less, c_i W_i W_i^T, which is headwater's own.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .errors import HeadwaterError, Problem
from .tuner.layer import floating_weight, linear_sizes

QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class SubspaceSpec:
    """How a basis is extracted.

    Args:
        r: number of basis vectors.
        targets: endings of the layers' names.
        scope: which layers share a basis. "layer_qkv": the targets of one transformer block; "layer_projection": each
            layer has its own; "global": all layers. Layers of different output width never share one.
        orientation: "output" takes left singular vectors, which live where B writes; "input" right ones, for square
            layers only.
        basis_scale: "orthonormal", or columns times their singular value ("s") or its root ("sqrt_s").
        normalize: divide each weight by its Frobenius norm, for sources of different scale.
    """

    r: int = 64
    targets: tuple[str, ...] = QKV
    scope: Literal["layer_qkv", "layer_projection", "global"] = "layer_qkv"
    orientation: Literal["output", "input"] = "output"
    basis_scale: Literal["orthonormal", "sqrt_s", "s"] = "orthonormal"
    normalize: bool = False

    def __post_init__(self) -> None:
        allowed = {
            "scope": ("layer_qkv", "layer_projection", "global"),
            "orientation": ("output", "input"),
            "basis_scale": ("orthonormal", "sqrt_s", "s"),
        }
        problems = [
            Problem(f"{name} is one of {', '.join(values)}, not {getattr(self, name)!r}", name)
            for name, values in allowed.items()
            if getattr(self, name) not in values
        ]
        if self.r < 1:
            problems.append(Problem(f"r must be at least 1, not {self.r}", "r"))
        if problems:
            raise HeadwaterError(*problems)


def target_weights(model: nn.Module, targets: Sequence[str]) -> dict[str, Tensor]:
    """The weights `(d_out, d_in)` of the linear layers whose names end on one of `targets`.

    Raises:
        HeadwaterError: if a target names none, or something else than a linear layer, or one is quantised or holds
            numbers that are not finite.
    """
    found: dict[str, Tensor] = {}
    missing = set(targets)
    for name, module in model.named_modules():
        meant = {target for target in targets if f".{name}".endswith(f".{target}")}
        if not meant or not hasattr(module, "weight"):
            continue
        missing -= meant
        try:
            weight = floating_weight(module)
        except TypeError:
            what = f"{name} is no linear layer, but a {type(module).__name__}"
            raise HeadwaterError(Problem(what, "targets", "name linear layers")) from None
        if weight is None:
            raise HeadwaterError(Problem(f"the weight of {name} is quantised", fix="load the model unquantised"))
        if not weight.isfinite().all():
            raise HeadwaterError(Problem(f"the weight of {name} holds numbers that are not finite"))
        d_in, d_out = linear_sizes(module)
        found[name] = weight.detach() if tuple(weight.shape) == (d_out, d_in) else weight.detach().T
    if missing:
        raise HeadwaterError(
            Problem(
                f"the model has no linear layer named {', '.join(t for t in targets if t in missing)}",
                "targets",
                "models with fused query, key and value need targets of their own",
            )
        )
    return found


def extract(
    sources: Iterable[Mapping[str, Tensor]], spec: SubspaceSpec, importance: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """The basis of each layer. Warns where layers that were to share one cannot, because their output widths differ.

    Args:
        sources: layer name -> weight `(d_out, d_in)`, or a difference of weights, one mapping per model; read once.
        spec: what is shared and how.
        importance: how much each source counts, one positive number for each; all alike by default.

    Returns:
        Layer name -> float32 `(d_out, r)`. The sign of a column is such that its largest entry is positive.

    Raises:
        HeadwaterError: if the models' layers differ, r is larger than a layer or than what the weights span, a layer is
            not square where it must, or a source counts by a number that is not positive.
        ValueError: if there are not as many sources as numbers in `importance`.
    """
    wrong = [c for c in importance or () if not 0 < c < math.inf]
    if wrong:
        raise HeadwaterError(Problem(f"a model counts by a positive number, not {wrong[0]!r}", "weight"))
    grams: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    each = itertools.repeat(1.0) if importance is None else importance
    for number, (weights, c) in enumerate(zip(sources, each, strict=importance is not None)):
        here = {name: tuple(weight.shape) for name, weight in weights.items()}
        if number and here != shapes:
            odd = sorted(set(here.items()) ^ set(shapes.items()))[0][0]
            raise HeadwaterError(
                Problem(f"the models differ in layer {odd}", f"model {number + 1}", "give models of one architecture")
            )
        shapes = here
        for name, weight in weights.items():
            _add_gram(grams, name, weight, spec, c)
    bases = {key: _basis(key, gram, spec) for key, gram in grams.items()}
    _warn_of_widths(shapes, spec)
    return {name: bases[_group(name, shape, spec)] for name, shape in shapes.items()}


def differences(models: Iterable[Mapping[str, Tensor]], base: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Each model's weights minus the base model's."""
    for weights in models:
        if {n: w.shape for n, w in weights.items()} != {n: w.shape for n, w in base.items()}:
            raise HeadwaterError(Problem("the base model's layers are not those of the models", "base"))
        yield {name: weight.float() - base[name].float() for name, weight in weights.items()}


def _warn_of_widths(shapes: Mapping[str, tuple[int, ...]], spec: SubspaceSpec) -> None:
    """Under grouped-query attention, for one, k and v are narrower than q."""
    widths: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, shape in shapes.items():
        widths[_block(name, spec)][shape[0]].add(name.rpartition(".")[2])
    for block, kinds in widths.items():
        if len(kinds) > 1:
            parts = "; ".join(f"{', '.join(sorted(names))} ({d_out} outputs)" for d_out, names in kinds.items())
            warnings.warn(
                f"layers of different output width share no basis; in {block} these groups have one each: {parts}",
                stacklevel=3,
            )
            return


def _add_gram(grams: dict[str, Tensor], name: str, weight: Tensor, spec: SubspaceSpec, c: float) -> None:
    d_out, d_in = weight.shape
    if spec.orientation == "input" and d_in != d_out:
        raise HeadwaterError(
            Problem(f"layer {name} is not square ({d_in} -> {d_out})", "orientation", "use orientation output")
        )
    if spec.r > d_out:
        raise HeadwaterError(Problem(f"layer {name} has {d_out} outputs, fewer than r = {spec.r}", "r", "lower r"))
    W = weight.double() if spec.orientation == "output" else weight.double().T
    if spec.normalize:
        W = W / W.norm().clamp_min(torch.finfo(W.dtype).tiny)
    key = _group(name, tuple(weight.shape), spec)
    grams[key] = grams.get(key, 0) + c * (W @ W.T)


def _group(name: str, shape: tuple[int, ...], spec: SubspaceSpec) -> str:
    return f"{_block(name, spec)}:{shape[0]}"


def _block(name: str, spec: SubspaceSpec) -> str:
    """What shares a basis, as far as widths allow."""
    return {"layer_projection": name, "layer_qkv": name.rpartition(".")[0], "global": "all layers"}[spec.scope]


def _basis(key: str, gram: Tensor, spec: SubspaceSpec) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)  # rising
    # what lies beyond is rounding, and its directions are any
    rank = int((values > values[-1] * len(values) * torch.finfo(values.dtype).eps).sum()) if values[-1] > 0 else 0
    if rank < spec.r:
        block, _, d_out = key.rpartition(":")
        what = f"the weights of {block} with {d_out} outputs span {rank} directions, fewer than r = {spec.r}"
        raise HeadwaterError(Problem(what, "r", "lower r" if rank else "they are all zero: give other models"))
    U = vectors.flip(1)[:, : spec.r]
    U = U * torch.sign(U.gather(0, U.abs().argmax(0, keepdim=True)))
    s = values.flip(0)[: spec.r].clamp_min(0).sqrt()
    scale = {"orthonormal": torch.ones_like(s), "sqrt_s": s.sqrt(), "s": s}[spec.basis_scale]
    return (U * scale).float().contiguous()  # as safetensors wants it
