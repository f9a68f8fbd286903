"""What a request may choose between, and how a batch of different choices runs in one forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import HeadwaterError, Problem
from ..evaluation.forward import input_device
from ..tuner import needs_task_ids

if TYPE_CHECKING:
    from ..compose import AdapterPool, PooledModel

AUTO, BASE = "auto", "base"


class UnavailableError(RuntimeError):
    """What was asked for cannot be had any more. Clients read the message, so it has no paths; its cause may."""


@dataclass(frozen=True)
class Route:
    """What answers one request.

    Args:
        name: under which it was asked for.
        task: the task id, where the adapter goes by task.
        mixture: the pool's adapters and their weights; empty for the base model, or outside a pool.
    """

    name: str
    task: int | None = None
    mixture: Mapping[str, float] = field(default_factory=dict)


class Routes(Protocol):
    """The choices of one server."""

    model: nn.Module
    names: list[str]
    """What `model` may be in a request; the first one is the default."""

    def choose(self, name: str, text: str) -> Route:
        """The route of a request with this `model` and this text.

        Raises:
            HeadwaterError: there is none of that name.
        """
        ...

    def apply(self, routes: Sequence[Route]) -> Any:
        """A context in which row i of a forward goes by `routes[i]`; yields keywords for that forward."""
        ...


class RunRoutes:
    """A run's adapter: one choice, or one for each task where the adapter goes by task.

    Args:
        model: a `PeftModel` in eval mode.
        name: of the choice.
        tasks: the run's tasks, in the order of their ids; needed where the adapter goes by task.

    Raises:
        HeadwaterError: the adapter goes by task, and no tasks were given.
    """

    def __init__(self, model: nn.Module, name: str, tasks: Sequence[str] = ()):
        self.model = model
        self._by_task = needs_task_ids(model)
        if self._by_task and not tasks:
            what = "the adapter goes by task, and it is not known which tasks there are"
            raise HeadwaterError(Problem(what, name, "give the run folder, whose config.yaml lists the tasks"))
        self.names = list(tasks) if self._by_task else [name]

    def choose(self, name: str, text: str) -> Route:
        if name not in self.names:
            raise unknown(name, self.names)
        return Route(name, self.names.index(name) if self._by_task else None)

    @contextmanager
    def apply(self, routes: Sequence[Route]) -> Iterator[dict[str, Tensor]]:
        if not self._by_task:
            yield {}
            return
        ids = torch.tensor([route.task for route in routes], device=input_device(self.model))
        yield {"headwater_task_ids": ids}


class PoolRoutes:
    """A pool's adapters by name, `base` for none of them, and `auto` for those that are retrieved for the text.

    Args:
        pool: the pool.
        pooled: its adapters on the base model.
        retrieve: text -> mixture; without it there is no `auto`.
    """

    def __init__(self, pool: AdapterPool, pooled: PooledModel, retrieve: Callable[[str], Mapping[str, float]] | None):
        self.model, self._pooled, self._retrieve = pooled.model, pooled, retrieve
        self._adapters = list(pool.names)
        self.names = [*([AUTO] if retrieve else []), *self._adapters, BASE]

    def choose(self, name: str, text: str) -> Route:
        if name == AUTO and self._retrieve is not None:
            return Route(name, mixture=dict(self._retrieve(text)))
        if name not in self.names:
            raise unknown(name, self.names)
        return Route(name, mixture={} if name == BASE else {name: 1.0})

    @contextmanager
    def apply(self, routes: Sequence[Route]) -> Iterator[dict[str, Tensor]]:
        with ExitStack() as held:
            try:
                held.enter_context(self._pooled.rows([route.mixture for route in routes]))
            except (HeadwaterError, OSError) as error:  # adapters are read when they are first asked for
                names = ", ".join(dict.fromkeys(name for route in routes for name in route.mixture))
                raise UnavailableError(f"{names} cannot be loaded any more; the server's log says why") from error
            yield {}


def unknown(name: str, names: Sequence[str]) -> HeadwaterError:
    """The error for a name that is not served."""
    return HeadwaterError(Problem(f"the model `{name}` does not exist here", "model", f"there are {', '.join(names)}"))
