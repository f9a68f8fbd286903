"""`generate` of a base model that carries adapters, whichever of PEFT's wrappers calls it: without a `task_type` PEFT
asks the base model itself. The model keeps its class; only its instance's `generate` is replaced."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from typing import Any, cast

from torch import Tensor, nn

from ..errors import HeadwaterError, Problem
from ..methods.registry import method as registered
from .context import KEYWORD, Context
from .layer import MethodLayer

_CHUNKS = "prefill_chunk_size"
_LOGITS = "logits_to_keep"  # 0 for all


def wrap_generate(model: Any, context: Context) -> None:
    """Lets the model's `generate` take `headwater_task_ids` and tell adapters which part of the text is the prompt."""
    if hasattr(model, "generate") and not isinstance(model.generate, _Generate):
        model.__dict__["generate"] = _Generate(model, context, model.__dict__.get("generate"))


def unwrap_generate(model: nn.Module) -> None:
    """Undoes `wrap_generate`."""
    ours = model.__dict__.get("generate")
    if isinstance(ours, _Generate):
        del model.__dict__["generate"]
        if ours.before is not None:
            model.__dict__["generate"] = ours.before


class _Generate:
    """The base model's `generate`; takes `headwater_task_ids`, one per prompt or one for all.

    Args:
        before: what the instance had in its class's place.
    """

    def __init__(self, model: nn.Module, context: Context, before: Any):
        self._model = weakref.ref(model)  # which holds this: a circle would keep its weights until garbage is collected
        self.context, self.before = context, before

    def __reduce__(self) -> tuple[Any, ...]:
        return _Generate, (self._model(), self.context, self.before)  # a copy is the copied model's

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `transformers`' `generate`.

        Raises:
            HeadwaterError: if there are other ids than that, or what is generated with needs whole prompts and
                `prefill_chunk_size` cuts them.
        """
        model, context = cast(Any, self._model()), self.context
        ids = kwargs.pop(KEYWORD, None)
        settings = kwargs.get("generation_config") or getattr(model, "generation_config", None)
        if kwargs.get(_CHUNKS, getattr(settings, _CHUNKS, None)):
            _refuse_chunks(model)
        if _head_reads_prompt(model):
            kwargs.setdefault(_LOGITS, 0)  # transformers shows the head a prompt's last token alone
        prompts = next(
            (p for p in (*args[:1], *map(kwargs.get, ("input_ids", "inputs", "inputs_embeds"))) if p is not None), None
        )
        with contextlib.ExitStack() as stack:
            # A forward that Ctrl-C ended has left its state: no hook tells of it.
            stack.enter_context(context.use(None))
            if ids is not None:
                stack.enter_context(context.task_ids(ids))
            if isinstance(prompts, Tensor):
                stack.enter_context(context.generating(*prompts.shape[:2]))
            if self.before is not None:
                return self.before(*args, **kwargs)
            return type(model).generate(model, *args, **kwargs)


def goes_by_prompt(model: nn.Module) -> str | None:
    """The method in a model that goes by a row's whole prompt, so that it may not be read in parts; else None."""
    names = {layer.method_name for layer in model.modules() if isinstance(layer, MethodLayer)}
    return next((registered(name).title for name in names if registered(name).branch.by_prompt), None)


def _head_reads_prompt(model: Any) -> bool:
    head = model.get_output_embeddings()
    reads = isinstance(head, MethodLayer) and registered(head.method_name).branch.by_prompt
    return reads and _LOGITS in inspect.signature(type(model).forward).parameters


def _refuse_chunks(model: nn.Module) -> None:
    if (title := goes_by_prompt(model)) is not None:
        what = f"{title} goes by a row's whole prompt, and would see the first chunk of it alone"
        raise HeadwaterError(Problem(what, _CHUNKS, "leave it out"))
