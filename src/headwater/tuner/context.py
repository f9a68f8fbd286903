"""What one forward pass carries to the adapted layers: task ids, the padding mask, auxiliary losses, observers.

A pre-hook on the base model opens a `State` per forward and a hook closes it. Thread-local storage keeps threads apart;
context variables would, too, but break compiled graphs.
"""

from __future__ import annotations

import contextlib
import re
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HeadwaterError, Problem
from ..methods.call import KEYWORD, LENGTHS, Align, Call, Observer, Packed, State
from ..ops import Stacks
from .checkpoints import carry_state, checkpointed
from .following import follow, follow_output

LABELS = "headwater_labels"
_CLASSIFIERS = ("ForTokenClassification", "ForMaskedLM")  # where a label of -100 marks no prompt
# In a decoder, the layers that read what the encoder wrote.
_CROSS = re.compile(
    r"(encdecattention|encoder_attn|encoder_attention|crossattention|cross_attn|cross_attention)\."
    r"(.*\.)?(k|v|key|value|k_proj|v_proj|key_proj|value_proj)$",
    re.IGNORECASE,
)
_UNTOLD = (
    "a batch came without its labels, as with label smoothing: which part of the optimiser step it is cannot be told, "
    "so auxiliary losses count in full in every batch; let the collator add `headwater_labels`, a copy of `labels`"
)
_CACHES = ("past_key_values", "cache_params")  # of attention, of Mamba's kin
_OTHER_INPUTS = ("input_features", "input_values", "pixel_values")


class Context:
    """Shared by a model's adapted layers."""

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        self._names = names  # of what the model's forward takes, in its order
        self._local = threading.local()
        self.observers: list[Observer] = []
        self.merging: list[Observer] = []  # those that are shown what a merge takes
        self.align: Align | None = None
        self.loss_scale = 1.0
        self.branches_need_state = self.branches_need_batch = self.branches_meet_ranks = False
        self.last_losses: dict[str, Tensor] = {}
        self._checkpointing: list[nn.Module] | None = None
        self._opened = False  # by a forward whose layers may run again in backward, perhaps in another thread

    def __reduce__(self) -> tuple[Any, ...]:
        # thread-local storage cannot be copied; a copied model starts with its own, and without observers. Nor does
        # `loss_scale` go along: a trainer sets it for its own accumulation, and a copy is trained by another.
        kept = ("align", "branches_need_state", "branches_need_batch", "branches_meet_ranks")
        return Context, (self._names,), {name: getattr(self, name) for name in kept}

    @property
    def needs_state(self) -> bool:
        """Somebody reads the state, so checkpointed layers must carry it."""
        return self.branches_need_state or self.align is not None

    @property
    def needs_batch(self) -> bool:
        """Some loss is of a whole batch, so it may not be cut into parts."""
        return self.branches_need_batch or self.align is not None

    @property
    def needs_padding(self) -> bool:
        """The loss counts padding, so rows may not be packed."""
        return getattr(self.align, "needs_padding", False)

    @property
    def state(self) -> State | None:
        return getattr(self._local, "state", None)

    @property
    def begins(self) -> bool:
        """Whether the running forward starts a sequence: no key-value cache lies behind it."""
        state = self.state
        return state is not None and state.begins

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
    def generating(self, prompts: int, prompt_length: int) -> Iterator[None]:
        """Marks the first `prompt_length` positions of every forward inside as the prompt.

        Raises:
            HeadwaterError: if there are task ids, and neither one nor one for each of `prompts`.
        """
        _fit_ids(getattr(self._local, "ids", None), prompts, repeat=False)
        before, self._local.prompt_length = getattr(self._local, "prompt_length", None), prompt_length
        try:
            yield
        finally:
            self._local.prompt_length = before

    def open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """Forward pre-hook of the base model: takes headwater's keywords out and opens the state."""
        learning = torch.is_grad_enabled()
        ids = kwargs.pop(KEYWORD, None)
        around = ids is None  # what `task_ids` says, which is for generation as well
        ids = getattr(self._local, "ids", None) if around else _as_ids(ids)
        told = kwargs.pop(LABELS, None)
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        # a trainer that computes the loss itself gives no `labels` to the model, but may still tell us which they are
        labels = given.get("labels") if told is None else told
        total = given.get("num_items_in_batch")
        if total is not None and labels is None and learning and self.needs_batch and not torch.compiler.is_compiling():
            warnings.warn(_UNTOLD, stacklevel=2)
        generating = getattr(self._local, "prompt_length", None)
        mask, decoder = given.get("attention_mask"), has_encoder(module)
        batch, length = _size(args, given)
        if decoder:  # the encoder's part is `open_encoder`'s
            labels = None if isinstance(labels, Tensor) and labels.is_floating_point() else labels  # of a classifier
            candidates = (given.get("decoder_input_ids"), given.get("decoder_inputs_embeds"), labels)
            written = next((t for t in candidates if isinstance(t, Tensor) and t.dim() > 1), None)
            if written is not None:  # else the model shifts what the encoder reads
                batch, length, mask = written.shape[0], written.shape[1], given.get("decoder_attention_mask")
        shape = (batch, length)
        packed = Packed(given[LENGTHS]) if LENGTHS in given else None  # attention needs them, too, so they stay
        if packed is not None:
            batch, length = len(packed.lengths), max(packed.lengths)
        valid = _valid(mask, length)
        cache: Any = next((c for name in _CACHES if (c := given.get(name)) is not None), None)
        repeat = generating is not None or cache is not None or (around and not learning)
        fitted = _fit_ids(ids, batch, repeat=repeat)
        state = State(batch, length, fitted, valid, packed=packed, loss_scale=self.loss_scale)
        if fitted is not None and fitted.device.type == "cpu":
            _move_ids(state, fitted, (*args, *kwargs.values()))
        remembers = self.needs_state and not (module.training and learning)
        state.begins = _begins(cache, length, matters=remembers or generating is not None)
        if remembers:
            state.memory = self._memory(cache, state.begins)
            if valid is None and cache is not None and state.begins:
                valid = state.valid = _valid_in_prompt(mask, length)
        if isinstance(labels, Tensor) and labels.shape == shape:
            learned, classifies = labels != -100, type(module).__name__.endswith(_CLASSIFIERS)
            if decoder:
                state.valid = learned if valid is None else valid
            elif not classifies:
                state.prompt = ~learned if valid is None else ~learned & valid
            if total is not None:
                # The loss is normalised by the tokens of the whole optimiser step; this is the micro-batch's share. By
                # default (`average_tokens_across_devices`) that step is all ranks', whose gradients are then averaged,
                # so the trainer multiplies its loss by their number.
                state.loss_scale = (learned if decoder or classifies else learned[:, 1:]).sum() / total
                state.gradient = float(_ranks())
        elif generating and length and state.begins and not decoder:
            device = next(t.device for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
            prompt = torch.arange(length, device=device).expand(batch, -1) < generating
            state.prompt = prompt if valid is None else prompt & valid.to(device)
        carries = self.needs_state or bool(self.observers or self.merging)
        if (module.training or learning) and not torch.compiler.is_compiling():
            state.stacks = Stacks(getattr(self._local, "wanted", {}))
            self._local.wanted = state.stacks.wanted
            carries = carries or bool(state.stacks.made)  # so that a checkpoint's second forward finds them
        if decoder:
            state.read = _state_beside(state, args, given)
        self._local.state = state
        if carries and (module.training or learning):
            if self._checkpointing is None:  # found once: to walk over all modules takes milliseconds
                self._checkpointing = checkpointed(module)
            carry_state(self, self._checkpointing)
            self._opened = True
        return args, kwargs

    def open_encoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of an encoder beside a decoder: its rows, padding and ids are its own, as `generate` may run
        it by itself."""
        outer = self.state
        batch, length = _size(args, kwargs)
        ids = getattr(self._local, "ids", None) if outer is None else outer.task_ids
        state = State(batch, length, _fit_ids(ids, batch, repeat=False), _valid(kwargs.get("attention_mask"), length))
        state.outer, state.loss_scale = outer, self.loss_scale if outer is None else outer.loss_scale
        if outer is not None:
            state.losses, state.stacks = outer.losses, outer.stacks
        elif self.needs_state and torch.is_grad_enabled():
            carry_state(self, checkpointed(module))
        self._local.state = state

    def close_encoder(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forward hook of an encoder, called on errors as well."""
        state = self.state
        if state is not None:
            state.closed = True
            self._local.state = state.outer
            if state.outer is None:
                self._note_losses(state)

    def _memory(self, cache: Any, begins: bool) -> dict[Any, Any]:
        # The first forward of a generation may make its cache itself, and `close` may not find it in the output; the
        # next one then adopts what the last forward of this thread remembered.
        if begins:
            self._local.memory = {}
        elif not hasattr(cache, "headwater_memory"):
            cache.headwater_memory = getattr(self._local, "memory", {})
        else:
            self._local.memory = cache.headwater_memory
        if cache is not None and begins:
            cache.headwater_memory = self._local.memory
        return getattr(self._local, "memory", {}) if cache is None else cache.headwater_memory

    def close(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forward hook of the base model, called on errors as well."""
        state = self.state
        if state is not None:
            state.closed = True
            if state.read is not None:
                state.read.closed = True
            made: Any = getattr(output, "past_key_values", None)
            if state.begins and state.memory and hasattr(made, "__dict__"):  # not a tuple
                made.headwater_memory = state.memory
            self._note_losses(state, further=kwargs.get("encoder_outputs") is not None)
            if state.losses:
                follow_output(self._with_losses, output, scaled=kwargs.get("num_items_in_batch") is not None)
        self._local.state = None

    def _note_losses(self, state: State, *, further: bool = False) -> None:
        """`further`: the forward goes on from an encoder that ran by itself."""
        self.last_losses = {name: total / count for name, (total, count) in state.losses.items()}
        if state.losses and torch.is_grad_enabled():
            before = self._with_losses[-1:] if further else ()
            self._local.with_losses = (*before, state)

    @property
    def _with_losses(self) -> tuple[State, ...]:
        """The states of this thread's last forward that has auxiliary losses."""
        return getattr(self._local, "with_losses", ())

    def follow(self, loss: Tensor) -> None:
        """Auxiliary losses of this thread's last forward take the gradient that `loss` gets as their own."""
        follow(self._with_losses, loss)

    def call(self, name: str, shape: tuple[int, ...]) -> Call:
        """One layer's view of the running forward; `shape` is its input's leading dimensions.

        Raises:
            HeadwaterError: in a checkpoint's second forward, if it cannot be told which forward that belongs to.
        """
        state = self.state
        if state is None and self._opened and self.needs_state and torch._C._current_graph_task_id() != -1:
            raise HeadwaterError(
                Problem(
                    f"{name} runs again in backward, by a checkpoint that headwater does not know",
                    fix="use model.gradient_checkpointing_enable(), or wrap layers before the first training step",
                )
            )
        ids = getattr(self._local, "ids", None) if state is None and self.needs_state else None
        if ids is not None and len(shape) > 1:  # a part of the model that runs by itself, as an image encoder
            state = State(shape[0], 0, _fit_ids(ids, shape[0], repeat=False))
        if state is not None and state.read is not None and _CROSS.search(name):
            state = state.read
        if state is not None and self.needs_batch and not state.closed:
            state.runs[name] = state.runs.get(name, 0) + 1
        return Call(name, shape, state, self.observers, self.merging, self.align)


def _ranks() -> int:
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if together else 1


def _as_ids(ids: Any) -> Tensor:
    what = "task ids are one integer per row, shape (batch,)"
    try:
        found = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:  # names of tasks, None
        raise HeadwaterError(Problem(f"{what}, not {ids!r}", KEYWORD)) from error
    if found.dim() == 0:
        found = found.reshape(1)
    if found.dim() != 1 or found.is_floating_point() or found.dtype == torch.bool or found.numel() == 0:
        raise HeadwaterError(Problem(f"{what}, not {tuple(found.shape)} of {found.dtype}", KEYWORD))
    return found.long()


def has_encoder(model: Any) -> bool:
    """Whether a model has an encoder beside its decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Rows and positions of what a model reads; 0 positions of sound or pixels, 0 rows where nothing is known."""
    texts = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    others = [t.shape[0] for name in _OTHER_INPUTS if isinstance(t := kwargs.get(name), Tensor) and t.dim() > 1]
    for given in texts if others else (*texts, *args[:1]):  # a forward may call its text as it likes
        if isinstance(given, Tensor) and given.dim() > 1:
            return given.shape[0], given.shape[1]
    return next(iter(others), 0), 0


def _positions_in(cache: Any) -> int | Tensor:
    """Positions that lie in a cache; 1 for any number where its layers count none."""
    if not hasattr(cache, "get_seq_length"):
        return 0
    try:
        past = cache.get_seq_length()
    except ValueError:  # no layer has attention
        return int(cache.has_previous_state())
    if isinstance(past, int) and past == 0 and not torch.compiler.is_compiling():  # the first layer may count none
        counted = [layer for layer in getattr(cache, "layers", ()) if hasattr(layer, "get_seq_length")]
        past = max((layer.get_seq_length() for layer in counted), default=0)
    return past


def _state_beside(state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> State:
    """For a decoder's layers that read what the encoder wrote: its rows and padding, and the losses of the model."""
    (batch, length), encoded = _size(args, kwargs), kwargs.get("encoder_outputs")
    if encoded is not None and isinstance(encoded[0], Tensor) and encoded[0].dim() == 3:
        batch, length = encoded[0].shape[:2]
    valid = _valid(kwargs.get("attention_mask"), length)
    beside = State(batch, length, state.task_ids, valid, loss_scale=state.loss_scale, losses=state.losses, outer=state)
    beside.stacks = state.stacks
    return beside


def _valid(mask: Any, length: int) -> Tensor | None:
    """bool `(batch, length)` from a 2-D attention mask; None for any other."""
    if isinstance(mask, Tensor) and mask.dim() == 2 and length and mask.shape[1] >= length:
        return mask[:, -length:].bool()  # with a cache the mask also covers the past
    return None


def memory_of(cache: Any) -> dict[Any, tuple[Tensor, ...]]:
    """What methods remember of each row for as long as a key-value cache lives: tensors with one entry a row."""
    return getattr(cache, "headwater_memory", {})


def keep_memory(cache: Any, rows: Tensor) -> None:
    """Of what methods remember, leaves a cache that of `rows`, int64, repeats allowed; its copies keep their own."""
    memory = memory_of(cache)
    cache.headwater_memory = {key: tuple(t[rows.to(t.device)] for t in values) for key, values in memory.items()}


def _valid_in_prompt(mask: Any, length: int) -> Tensor | None:
    """The same from the mask `(batch, 1, queries, keys)` that a static cache comes with: the keys that the last of a
    prompt's queries sees. Bool, or added to the logits."""
    if isinstance(mask, Tensor) and mask.dim() == 4 and 1 < length == mask.shape[2] <= mask.shape[3]:
        seen = mask[:, 0, -1, :length]
        return seen if seen.dtype == torch.bool else seen == 0
    return None


def _move_ids(state: State, ids: Tensor, inputs: tuple[Any, ...]) -> None:
    """Ids on the CPU go to where the model's inputs are, once and not in every layer; their range is read before."""
    device = next((t.device for t in inputs if isinstance(t, Tensor)), ids.device)
    if device != ids.device:
        if not torch.compiler.is_compiling():
            state.range_of_tasks(ids)
        state.task_ids = ids.to(device, non_blocking=True)


def _begins(cache: Any, length: int, *, matters: bool) -> bool:
    """Whether nothing lies in the key-value cache yet. A static cache counts in a tensor, which moves on while the
    forward runs: it is read here, once, and not in every layer.

    Args:
        matters: somebody asks while a graph is being compiled, which a reading would break; elsewhere all may.
    """
    past = _positions_in(cache)
    if isinstance(past, Tensor) and torch.compiler.is_compiling() and (length == 1 or not matters):
        return False  # one token is taken for one behind a prompt, so that decoding stays one graph
    return bool(past == 0)


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
