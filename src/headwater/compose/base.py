"""What a pool remembers of its base model: enough to tell it from another one without reading all of it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from ..errors import HeadwaterError, Problem
from ..tuner.layer import linear_sizes

_TENSORS, _VALUES = 16, 8  # weights looked at: so many of so many tensors
_TOLERANCE = 2**-7  # twice what rounding both sides to bfloat16 can do
_SHOWN = 3


class BaseFingerprint(BaseModel):
    """A base model's kind, the sizes of its linear layers, and some of its weights.

    The weights, 8 each of 16 tensors, are compared up to bfloat16's rounding, so that the same model loaded in another
    dtype is the same; tensors that are quantised are not compared.

    Args:
        model_type: transformers' name of the architecture.
        layers: linear layer -> (d_in, d_out).
        weights: parameter -> some of its values, as bfloat16 holds them.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model_type: str
    layers: dict[str, tuple[int, int]]
    weights: dict[str, list[float]]

    @classmethod
    def of(cls, model: nn.Module) -> BaseFingerprint:
        """The fingerprint of a loaded transformers model that carries no adapter."""
        named = sorted(model.named_parameters())
        step = max(1, len(named) // _TENSORS)
        weights = {}
        for name, tensor in named[::step]:
            if type(tensor) is nn.Parameter and tensor.is_floating_point() and tensor.device.type != "meta":
                flat = tensor.detach().flatten()
                at = torch.linspace(0, flat.numel() - 1, min(_VALUES, flat.numel()), dtype=torch.float64).long()
                weights[name] = flat[at.to(flat.device)].to(torch.bfloat16).float().tolist()
        config: Any = getattr(model, "config", None)
        return cls(model_type=getattr(config, "model_type", ""), layers=linear_layers(model), weights=weights)

    @property
    def id(self) -> str:
        """16 hex digits, the same for the same model loaded in the same way; for people to compare."""
        content = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def differences(self, other: BaseFingerprint) -> list[str]:
        """How `other` is not this model; empty if it is."""
        found = []
        if self.model_type != other.model_type:
            found.append(f"its architecture is {other.model_type!r}, not {self.model_type!r}")
        missing = [name for name in self.layers if name not in other.layers]
        sized = [name for name in self.layers if name not in missing and self.layers[name] != other.layers[name]]
        if missing:
            found.append(f"it has no layer {_some(missing)}")
        if sized:
            found.append(f"it has other sizes at {_some(sized)}")
        changed = [
            name
            for name, values in self.weights.items()
            if name in other.weights and not _close(values, other.weights[name])
        ]
        if changed:
            found.append(f"it has other weights at {_some(changed)}")
        return found

    def require(self, model: nn.Module, name: str = "") -> None:
        """Check that `model` is this one.

        Raises:
            HeadwaterError: it is another; says how.
        """
        found = self.differences(BaseFingerprint.of(model))
        if found:
            fix = "load the base model that the pool was made for"
            raise HeadwaterError(Problem(f"this is not the pool's base model: {'; '.join(found)}", name, fix))


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The model's linear layers, quantised ones and transformers' `Conv1D` too: name -> (d_in, d_out)."""
    layers = {}
    for name, module in model.named_modules():
        try:
            if name and getattr(module, "weight", None) is not None:
                layers[name] = linear_sizes(module)
        except (TypeError, AttributeError):
            continue
    return layers


def _close(mine: list[float], theirs: list[float]) -> bool:
    a, b = torch.tensor(mine, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64)
    return a.shape == b.shape and torch.allclose(a, b, rtol=_TOLERANCE, atol=1e-6)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
