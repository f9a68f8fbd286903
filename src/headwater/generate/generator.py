"""The trained generator: everything that turns a task's name, or a new task's vector, into a LoRA adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import HeadwaterError, Problem
from ..files import whole_folder, write_json
from ..seeds import require_seed
from .cvae import CVAE
from .layout import Layout, Scale

SETTINGS, TENSORS = "generator.json", "generator.safetensors"


@dataclass
class AdapterGenerator:
    """A conditional generator of adapters of one layout.

    Args:
        layout: of the adapters.
        cvae: the model, over normalised weights.
        tasks: task name -> its vector `(d,)`, as `task_vector` gave it.
        centre: mean of the tasks' vectors, `(d,)`.
        scales: task name -> the scale of its tensors.
        origin: `(L,)`, what was subtracted before normalising; zeros for none.
        vector_settings: the arguments that `task_vector` was called with; a new task's vector needs the same.
    """

    layout: Layout
    cvae: CVAE
    tasks: dict[str, Tensor]
    centre: Tensor
    scales: dict[str, Scale]
    origin: Tensor
    vector_settings: dict[str, Any]

    def condition(self, vector: Tensor) -> Tensor:
        """The condition `(d,)` of a task's vector: its direction from the tasks' centre, in units of z's size."""
        return torch.nn.functional.normalize(vector - self.centre, dim=0) * vector.numel() ** 0.5

    def normalise(self, weights: Tensor, task: str) -> Tensor:
        """Adapters of a task, `(n, L)`, as the autoencoder sees them."""
        return self.scales[task].normalise(self.layout, weights - self.origin)

    @torch.no_grad()
    def generate(
        self,
        vector: Tensor,
        *,
        scale: str | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """The adapter for a task vector, `(L,)`.

        Args:
            vector: `(d,)`, from `task_vector` under `vector_settings`.
            scale: the task whose scale the tensors get; None takes the tasks' pooled scale, for a task not seen before.
            seed: draws z from N(0, I); None takes z = 0, the likeliest adapter.

        Raises:
            HeadwaterError: if `seed` is none.
        """
        self.cvae.eval()
        z = torch.zeros(1, self.cvae.latent)
        if seed is not None:
            require_seed(seed)
            z.normal_(generator=torch.Generator().manual_seed(seed))
        decoded = self.cvae.decode(z, self.condition(vector).unsqueeze(0))[0]
        scales = Scale.average(list(self.scales.values())) if scale is None else self.scales[scale]
        return scales.restore(self.layout, decoded) + self.origin

    def for_task(self, name: str, *, seed: int | None = None) -> Tensor:
        """The adapter for a task that the generator was trained on, `(L,)`.

        Raises:
            HeadwaterError: if it knows no such task.
        """
        self.require(name)
        return self.generate(self.tasks[name], scale=name, seed=seed)

    def require(self, name: str) -> None:
        """Raises HeadwaterError unless the generator was trained on this task."""
        if name not in self.tasks:
            fix = f"it knows {', '.join(self.tasks)}; a new task needs examples"
            raise HeadwaterError(Problem(f"the generator knows no task {name!r}", "--task", fix))

    def sizes(self) -> dict[str, int]:
        """Bytes of what is kept: the model, the tasks' vectors and scales, the origin; and of one adapter."""
        tensors = self._tensors()
        bytes_of = {name: t.numel() * t.element_size() for name, t in tensors.items()}
        return {
            "model": sum(b for name, b in bytes_of.items() if name.startswith("cvae.")),
            "tasks": sum(b for name, b in bytes_of.items() if name.startswith(("task.", "scale.", "centre"))),
            "origin": bytes_of["origin"] if self.origin.any() else 0,
            "adapter": 4 * self.layout.length,
        }

    def _tensors(self) -> dict[str, Tensor]:
        scales = {
            f"scale.{name}.{part}": getattr(scale, part) for name, scale in self.scales.items() for part in _PARTS
        }
        return {
            **{f"cvae.{name}": t for name, t in self.cvae.state_dict().items()},
            **{f"task.{name}": t for name, t in self.tasks.items()},
            **scales,
            "centre": self.centre,
            "origin": self.origin,
        }

    def save(self, folder: Path) -> None:
        """Writes the generator's folder, whole or not at all: safetensors and JSON."""
        settings = {
            "schema": 1,
            "tasks": list(self.tasks),
            "cvae": {"latent": self.cvae.latent, "channels": self.cvae.channels, "condition": self.cvae.condition},
            "vector": self.vector_settings,
            "layout": {
                "names": self.layout.names,
                "shapes": self.layout.shapes,
                "dtypes": self.layout.dtypes,
                "config": self.layout.config,
            },
        }
        with whole_folder(folder) as work:
            save_file({name: t.detach().contiguous() for name, t in self._tensors().items()}, work / TENSORS)
            write_json(work / SETTINGS, settings)

    @classmethod
    def load(cls, folder: Path) -> AdapterGenerator:
        """Reads what `save` wrote.

        Raises:
            HeadwaterError: a file is missing, unreadable, or does not fit the other.
        """
        try:
            settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            tensors = load_file(folder / TENSORS)
            fields = settings["layout"]
            layout = Layout(
                tuple(fields["names"]),
                tuple(tuple(shape) for shape in fields["shapes"]),
                tuple(fields["dtypes"]),
                fields["config"],
            )
            shape = settings["cvae"]
            cvae = CVAE(layout.length, shape["condition"], shape["latent"], tuple(shape["channels"]))
            cvae.load_state_dict(_below(tensors, "cvae."))
            scales = {name: Scale(*(tensors[f"scale.{name}.{part}"] for part in _PARTS)) for name in settings["tasks"]}
            tasks = {name: tensors[f"task.{name}"] for name in settings["tasks"]}
            return cls(layout, cvae, tasks, tensors["centre"], scales, tensors["origin"], settings["vector"])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            what = f"is not a generator's folder, or is damaged: {' '.join(str(error).split())[:300]}"
            raise HeadwaterError(Problem(what, str(folder), "headwater meta train FILE writes one")) from error


_PARTS: tuple[Literal["mean", "std"], ...] = ("mean", "std")


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
