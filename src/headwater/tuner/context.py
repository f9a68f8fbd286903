"""What one forward pass carries to the adapted layers: task ids, the padding mask, auxiliary losses, observers.

A pre-hook on the base model opens a `State` per forward and a hook closes it. Gradient checkpointing runs layers again
in backward, long after the state is closed and perhaps after further forwards; so each checkpointed call remembers the
state it ran under. Thread-local storage keeps threads apart; context variables would, too, but break compiled graphs.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HeadwaterError, Problem
from ..methods.call import KEYWORD, LENGTHS, Align, Call, Observer, Packed, State

LABELS = "headwater_labels"
_CHECKPOINTS = ("_gradient_checkpointing_func", "checkpoint_fn")  # of transformers' layers, of PyTorch's wrapper


class Context:
    """Shared by a model's adapted layers."""

    def __init__(self) -> None:
        self._local = threading.local()
        self.observers: list[Observer] = []
        self.merging: list[Observer] = []  # those that are shown what a merge takes
        self.align: Align | None = None
        self.loss_scale = 1.0
        self.needs_state = False  # some branch reads the state, so checkpointed layers must carry it
        self.needs_batch = False  # some loss is of a whole batch, so it may not be cut into parts
        self.needs_padding = False  # some loss counts padding, so rows may not be packed
        self.last_losses: dict[str, Tensor] = {}
        self._checkpointing: list[nn.Module] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # thread-local storage cannot be copied; a copied model starts with its own, and without observers
        kept = ("align", "loss_scale", "needs_state", "needs_batch", "needs_padding")
        return Context, (), {name: getattr(self, name) for name in kept}

    @property
    def state(self) -> State | None:
        return getattr(self._local, "state", None)

    @property
    def begins(self) -> bool:
        """Whether the running forward starts a sequence: no key-value cache lies behind it."""
        state = self.state
        return state is not None and state.past == 0

    @contextlib.contextmanager
    def use(self, state: State | None) -> Iterator[None]:
        before, self._local.state = self.state, state
        try:
            yield
        finally:
            self._local.state = before

    @contextlib.contextmanager
    def task_ids(self, ids: Any) -> Iterator[None]:
        before, self._local.ids = getattr(self._local, "ids", None), _as_ids(ids)
        try:
            yield
        finally:
            self._local.ids = before

    @contextlib.contextmanager
    def generating(self, prompt_length: int) -> Iterator[None]:
        """Marks the first `prompt_length` positions of every forward inside as the prompt."""
        before, self._local.prompt_length = getattr(self._local, "prompt_length", None), prompt_length
        try:
            yield
        finally:
            self._local.prompt_length = before

    def open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """Forward pre-hook of the base model: takes headwater's keywords out and opens the state."""
        ids = kwargs.pop(KEYWORD, None)
        ids = getattr(self._local, "ids", None) if ids is None else _as_ids(ids)
        # a trainer that computes the loss itself gives no `labels` to the model, but may still tell us which they are
        labels = kwargs.pop(LABELS, kwargs.get("labels"))
        total = kwargs.get("num_items_in_batch")
        generating = getattr(self._local, "prompt_length", None)
        if decoder := _has_encoder(module):  # the encoder's part is `open_encoder`'s
            inputs = _first(kwargs, "decoder_input_ids", "decoder_inputs_embeds", "labels")
        else:
            inputs = _first({"input_ids": args[0] if args else None, **kwargs}, "input_ids", "inputs_embeds")
        shape = batch, length = inputs.shape[:2] if isinstance(inputs, Tensor) and inputs.dim() > 1 else (0, 0)
        packed = Packed(kwargs[LENGTHS]) if LENGTHS in kwargs else None  # attention needs them, too, so they stay
        if packed is not None:
            batch, length = len(packed.lengths), max(packed.lengths)
        valid = _valid(kwargs.get("decoder_attention_mask" if decoder else "attention_mask"), length)
        cache: Any = kwargs.get("past_key_values")
        fitted = _fit_ids(ids, batch, repeat=generating is not None or cache is not None)
        state = State(batch, length, fitted, valid, packed=packed, loss_scale=self.loss_scale)
        state.past = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
        if self.needs_state and not (module.training and torch.is_grad_enabled()):
            state.memory = self._memory(cache, state.past)
        if isinstance(labels, Tensor) and labels.shape == shape:
            learned = labels != -100
            if decoder:
                state.valid = learned if valid is None else valid
            elif _is_causal(module):
                state.prompt = ~learned if valid is None else ~learned & valid
            if total is not None:
                # The loss is normalised by the tokens of the whole optimiser step; this is the micro-batch's share. By
                # default (`average_tokens_across_devices`) that step is all ranks', whose gradients are then averaged,
                # so the trainer multiplies its loss by their number.
                state.loss_scale = (learned if decoder else learned[:, 1:]).sum() / total
                state.gradient = float(_ranks())
        elif generating and length and state.past == 0 and not decoder:
            prompt = torch.arange(length, device=inputs.device).expand(batch, -1) < generating
            state.prompt = prompt if valid is None else prompt & valid.to(prompt.device)
        self._local.state = state
        if (self.needs_state or self.observers or self.merging) and module.training:
            self.carry_through_checkpoints(module)
        return args, kwargs

    def open_encoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of an encoder beside a decoder: its rows, padding and ids are its own, as `generate` may run
        it by itself."""
        outer = self.state
        inputs = _first({"input_ids": args[0] if args else None, **kwargs}, "input_ids", "inputs_embeds")
        batch, length = inputs.shape[:2] if isinstance(inputs, Tensor) and inputs.dim() > 1 else (0, 0)
        ids = getattr(self._local, "ids", None) if outer is None else outer.task_ids
        state = State(batch, length, _fit_ids(ids, batch, repeat=False), _valid(kwargs.get("attention_mask"), length))
        if outer is not None:
            state.outer, state.losses, state.loss_scale = outer, outer.losses, outer.loss_scale
        self._local.state = state

    def close_encoder(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forward hook of an encoder, called on errors as well."""
        state = self.state
        if state is not None:
            state.closed = True
            self._local.state = state.outer

    def _memory(self, cache: Any, past: int) -> dict[Any, Any]:
        # The first forward of a generation may make its cache itself, out of our sight; the next one then adopts what
        # the last forward of this thread remembered.
        if past == 0:
            self._local.memory = {}
        elif not hasattr(cache, "headwater_memory"):
            cache.headwater_memory = getattr(self._local, "memory", {})
        else:
            self._local.memory = cache.headwater_memory
        if cache is not None and past == 0:
            cache.headwater_memory = self._local.memory
        return getattr(self._local, "memory", {}) if cache is None else cache.headwater_memory

    def close(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forward hook of the base model, called on errors as well."""
        state = self.state
        if state is not None:
            state.closed = True
            self.last_losses = {name: total / count for name, (total, count) in state.losses.items()}
            if state.losses and torch.is_grad_enabled():
                self._local.with_losses = state
                loss = getattr(output, "loss", output[0] if isinstance(output, tuple) and output else None)
                if isinstance(loss, Tensor) and loss.dim() == 0:
                    self.follow(loss)
        self._local.state = None

    def follow(self, loss: Tensor) -> None:
        """Auxiliary losses of this thread's last forward take the gradient that `loss` gets as their own."""
        state: State | None = getattr(self._local, "with_losses", None)
        if state is not None and loss.requires_grad and not torch.compiler.is_compiling():
            loss.register_hook(functools.partial(_remember, state))

    def call(self, name: str, shape: tuple[int, ...]) -> Call:
        """One layer's view of the running forward; `shape` is its input's leading dimensions.

        Raises:
            HeadwaterError: in a checkpoint's second forward, if it cannot be told which forward that belongs to.
        """
        if self.state is None and self.needs_state and torch._C._current_graph_task_id() != -1:
            raise HeadwaterError(
                Problem(
                    f"{name} runs again in backward, by a checkpoint that headwater does not know",
                    fix="use model.gradient_checkpointing_enable(), or wrap layers before the first training step",
                )
            )
        return Call(name, shape, self.state, self.observers, self.merging, self.align)

    def carry_through_checkpoints(self, model: nn.Module) -> None:
        """Makes transformers' checkpointed layers and PyTorch's wrapped ones remember the state of the forward they
        belong to."""
        if self._checkpointing is None:  # found once: to walk over all modules in each forward takes milliseconds
            names = ("gradient_checkpointing", "checkpoint_fn")
            self._checkpointing = [m for m in model.modules() if any(hasattr(m, name) for name in names)]
        for module in self._checkpointing:
            for name in _CHECKPOINTS:
                checkpoint = module.__dict__.get(name)
                if checkpoint is not None and not hasattr(checkpoint, "carries_headwater_state"):
                    module.__dict__[name] = _Carrying(self, checkpoint)

    def leave_checkpoints(self, model: nn.Module) -> None:
        """Undoes `carry_through_checkpoints`."""
        for module in model.modules():
            for name in _CHECKPOINTS:
                checkpoint = module.__dict__.get(name)
                if isinstance(checkpoint, _Carrying):
                    module.__dict__[name] = checkpoint.checkpoint


class _Carrying:
    """`checkpoint(function, *args)` where `function`, whenever it runs, runs under the state of the first call."""

    carries_headwater_state = True

    def __init__(self, context: Context, checkpoint: Callable[..., Any]):
        self.context, self.checkpoint = context, checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state = self.context.state

        def under_state(*inner: Any, **named: Any) -> Any:
            with self.context.use(state):
                return function(*inner, **named)

        return self.checkpoint(under_state, *args, **kwargs)


def _remember(state: State, gradient: Tensor) -> None:
    state.gradient = gradient.detach()


def _ranks() -> int:
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if together else 1


def _as_ids(ids: Any) -> Tensor:
    ids = torch.as_tensor(ids)
    if ids.dim() == 0:
        ids = ids.reshape(1)
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool or ids.numel() == 0:
        raise HeadwaterError(
            Problem(
                f"task ids are one integer per row, shape (batch,), not {tuple(ids.shape)} of {ids.dtype}",
                KEYWORD,
            )
        )
    return ids.long()


def _has_encoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _is_causal(model: nn.Module) -> bool:
    """Whether a label of -100 marks a prompt: in a model that writes text, and not in one that classifies tokens."""
    can_generate = getattr(model, "can_generate", None)
    return can_generate is None or bool(can_generate())


def _first(kwargs: dict[str, Any], *names: str) -> Any:
    """The first that is given."""
    return next((kwargs[name] for name in names if kwargs.get(name) is not None), None)


def _valid(mask: Any, length: int) -> Tensor | None:
    """bool `(batch, length)` from a 2-D attention mask; None for any other."""
    if isinstance(mask, Tensor) and mask.dim() == 2 and length and mask.shape[1] >= length:
        return mask[:, -length:].bool()  # with a cache the mask also covers the past
    return None


def _fit_ids(ids: Tensor | None, batch: int, *, repeat: bool) -> Tensor | None:
    """One id for each row. One id is all rows'; `repeat`: more may stand for beams and returned sequences, which
    transformers expands row by row."""
    if ids is None or batch == 0 or ids.shape[0] == batch:
        return ids
    if ids.shape[0] != 1 and (batch % ids.shape[0] or not repeat):
        raise HeadwaterError(
            Problem(f"{ids.shape[0]} task ids do not fit a batch of {batch} rows", KEYWORD, "give one id per row")
        )
    return ids.repeat_interleave(batch // ids.shape[0])
