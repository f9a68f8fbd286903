"""Rows to token ids, with a loss on completions only.

A row becomes a list of *pieces*: text, and whether it is learned. Each piece is tokenised on its own, so the ids of a
prompt are the same whether a completion follows it in training, a choice in scoring or nothing in generation.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from headwater.data.chat import END, START, Piece, chat_pieces
from headwater.data.rows import Row, one_screen
from headwater.errors import HeadwaterError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that carries no loss; PyTorch's cross-entropy skips it."""

logger = logging.getLogger(__name__)


class DataSpec(BaseModel):
    """How rows are encoded.

    Args:
        max_length: most tokens a row may have, special tokens included.
        on_too_long: `error` names every longer row; `drop` leaves it out; `truncate_prompt` cuts its prompt from the
            left. The last two say how many rows of which file.
        chat_template: `auto` applies the tokenizer's template to `messages` rows, `always` to every row, with the
            prompt as the user's turn; with `never` a `messages` row is an error.
    """

    model_config = ConfigDict(extra="forbid")

    max_length: int = Field(1024, ge=2)
    on_too_long: Literal["error", "drop", "truncate_prompt"] = "error"
    chat_template: Literal["auto", "always", "never"] = "auto"


@dataclass(frozen=True)
class Encoded:
    """Token ids of one row, `labels` beside them (the id itself, or -100 where there is no loss), and its task's id."""

    input_ids: list[int]
    labels: list[int]
    task: int

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class EncodingReport:
    """What became of the rows.

    Args:
        rows: rows encoded and kept.
        tokens, learned_tokens: all of their tokens, and those with a loss.
        longest: tokens of the longest row before anything was cut.
        dropped, truncated: number of rows per file.
    """

    rows: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    longest: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)

    def notes(self, max_length: int) -> list[str]:
        """One sentence per file whose rows did not all fit."""
        done = ((self.dropped, "left out"), (self.truncated, "shortened from the left of the prompt"))
        return [
            f"{source}: {count:,} rows of more than {max_length:,} tokens {what}"
            for counts, what in done
            for source, count in counts.items()
        ]


def encode_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    spec: DataSpec,
    task_index: int,
    max_positions: int | None = None,
) -> tuple[list[Encoded], EncodingReport]:
    """Encode rows: prompt, completion, end token; for conversations the template, with a loss on each assistant turn.

    Args:
        task_index: id that every encoded row carries.
        max_positions: most tokens that the model takes, where it has a limit: rows beyond it are too long, too.

    Raises:
        HeadwaterError: rows that are too long (unless the spec says what to do), that the chat template refuses, or a
            tokenizer without an end token. All of them, at most about a screen.
    """
    limit = spec.max_length if max_positions is None else min(spec.max_length, max_positions)
    pieces: list[list[Piece]] = []
    problems: dict[str, list[Problem]] = {}
    for row in rows:
        try:
            pieces.append(_pieces(row, tokenizer, spec, row.completion))
        except HeadwaterError as error:
            pieces.append([])
            problems.setdefault(row.source, []).extend(error.problems)
    ids = _Ids(tokenizer)
    ids.prepare(piece for found in pieces for piece in found)
    encoded: list[Encoded] = []
    longest = 0
    dropped: Counter[str] = Counter()
    truncated: Counter[str] = Counter()
    for row, found in zip(rows, pieces, strict=True):
        if not found:
            continue
        item = _join(found, ids, task_index)
        longest = max(longest, len(item))
        if len(item) > limit:
            shorter = _cut(item, limit, ids.start) if spec.on_too_long == "truncate_prompt" else None
            if spec.on_too_long == "drop":
                dropped[row.source] += 1
                continue
            if shorter is None:
                problems.setdefault(row.source, []).append(_too_long(row, len(item), spec, limit))
                continue
            item = shorter
            truncated[row.source] += 1
        encoded.append(item)
    if wrong := one_screen(problems):
        raise HeadwaterError(*wrong)
    report = EncodingReport(
        rows=len(encoded),
        tokens=sum(map(len, encoded)),
        learned_tokens=sum(label != IGNORED for item in encoded for label in item.labels),
        longest=longest,
        dropped=dict(dropped),
        truncated=dict(truncated),
    )
    for note in report.notes(limit):
        logger.warning(note)
    return encoded, report


def encode_prompt(row: Row, tokenizer: PreTrainedTokenizerBase, spec: DataSpec) -> list[int]:
    """The ids that stand before the (last) completion in `encode_rows`, uncut; a model is asked with these.

    The completion itself is not needed: for a row that has none, the template's opening of an assistant turn is used.
    """
    ids = _Ids(tokenizer)
    pieces = _pieces(row, tokenizer, spec, row.completion or "?")
    last = max(i for i, piece in enumerate(pieces) if piece.content)
    ids.prepare(pieces[:last])
    return _join(pieces[:last], ids, 0).input_ids


def encode_completion(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a completion or a choice behind a prompt, as in `encode_rows`; `encode_end` has what follows.

    They are the same in a chat template, where an assistant's turn stands as it is written.
    """
    return _Ids(tokenizer)[Piece(text, content=True)]


def encode_end(row: Row, tokenizer: PreTrainedTokenizerBase, spec: DataSpec) -> list[int]:
    """The ids behind the (last) completion in `encode_rows`: the end token, or what closes a turn in the template."""
    ids = _Ids(tokenizer)
    pieces = _pieces(row, tokenizer, spec, row.completion or "?")
    last = max(i for i, piece in enumerate(pieces) if piece.content)
    return _join(pieces[last + 1 :], ids, 0).input_ids


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The start token, where the tokenizer adds one: what a cut from the left leaves in its place."""
    return _Ids(tokenizer).start


def closing_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special token by which the chat template closes an assistant's turn, which training teaches; none without."""
    if not tokenizer.chat_template:
        return []
    turns = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "?"})
    try:
        closing = _Ids(tokenizer)[chat_pieces(turns, tokenizer, "")[-1]]
    except HeadwaterError:
        return []
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [i for i in closing[-1:] if i in special]


def _pieces(row: Row, tokenizer: PreTrainedTokenizerBase, spec: DataSpec, completion: str) -> list[Piece]:
    if spec.chat_template == "always" or (row.messages and spec.chat_template == "auto"):
        turns = row.messages or ({"role": "user", "content": row.prompt},)
        if turns[-1]["role"] != "assistant":
            turns = (*turns, {"role": "assistant", "content": completion})
        return chat_pieces(turns, tokenizer, row.where)
    if row.messages:
        what = "the row is a conversation, which needs the chat template"
        raise HeadwaterError(Problem(what, row.where, "set chat_template to auto, or write prompt and completion"))
    answer = Piece(completion, learned=True, content=True, opens=not row.prompt)
    return [START, Piece(row.prompt, opens=True), answer, END]


class _Ids:
    """Ids of pieces, tokenised in one batch and kept, for completions repeat."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if tokenizer.eos_token_id is None:
            what = "the tokenizer has no end token, so a model could not learn where a completion ends"
            raise HeadwaterError(Problem(what, fix="set tokenizer.eos_token"))
        self.tokenizer = tokenizer
        self.end: int = tokenizer.eos_token_id
        empty = self._tokenise([""], add_special_tokens=True)[0]
        self.start = empty[:1] if empty and empty[0] == tokenizer.bos_token_id else []
        # Tokenizers of SentencePiece's kind put a space before the first word. Behind a guard that they never merge
        # with, a piece in the middle of a text is read as it stands.
        opening = tokenizer.convert_ids_to_tokens(self._tokenise(["a"])[0])[0]
        self.guard = "\n" if opening[:1] in ("▁", "Ġ") else ""
        self.guard_ids = self._tokenise([self.guard])[0]
        self.known: dict[tuple[str, bool], list[int]] = {}

    def prepare(self, pieces: Iterable[Piece]) -> None:
        """Tokenise all pieces that are not known yet, in one call."""
        new = list({(p.text, p.opens): None for p in pieces if (p.text, p.opens) not in self.known})
        if not new:
            return
        found = self._tokenise([text if opens else self.guard + text for text, opens in new])
        for (text, opens), ids in zip(new, found, strict=True):
            if not opens and ids[: len(self.guard_ids)] != self.guard_ids:
                # The guard merged with the text; the text alone, with its added space, is the closest there is.
                ids = [*self.guard_ids, *self._tokenise([text])[0]]
            self.known[text, opens] = ids if opens else ids[len(self.guard_ids) :]

    def __getitem__(self, piece: Piece) -> list[int]:
        if piece.special:
            return self.start if piece.special == "start" else [self.end]
        self.prepare([piece])
        return self.known[piece.text, piece.opens]

    def _tokenise(self, texts: list[str], **options: Any) -> list[list[int]]:
        options = {"add_special_tokens": False, **options}
        return self.tokenizer(texts, return_attention_mask=False, verbose=False, **options)["input_ids"]


def _join(pieces: Sequence[Piece], ids: _Ids, task: int) -> Encoded:
    input_ids: list[int] = []
    labels: list[int] = []
    for piece in pieces:
        found = ids[piece]
        input_ids += found
        labels += found if piece.learned else [IGNORED] * len(found)
    return Encoded(input_ids, labels, task)


def _cut(item: Encoded, max_length: int, start: list[int]) -> Encoded | None:
    """Leave out prompt tokens from the left, after the start token; None if what is learned does not fit by itself."""
    excess = len(item) - max_length
    keep = len(start) if item.input_ids[: len(start)] == start else 0
    prompt = next((i for i, label in enumerate(item.labels) if label != IGNORED), len(item))
    if prompt - keep < excess:
        return None
    ids, labels = item.input_ids, item.labels
    return Encoded(ids[:keep] + ids[keep + excess :], labels[:keep] + labels[keep + excess :], item.task)


def _too_long(row: Row, length: int, spec: DataSpec, limit: int) -> Problem:
    of_model = limit < spec.max_length
    most = f"the model's {limit:,}" if of_model else f"max_length={limit:,}"
    if spec.on_too_long == "truncate_prompt":
        what = f"the row has {length:,} tokens; what is learned of it does not fit {most}"
        return Problem(what, row.where, f"{'' if of_model else 'raise max_length, or '}shorten the completion")
    fix = f"{'shorten it' if of_model else 'raise data.max_length'}, or set data.on_too_long to drop or truncate_prompt"
    return Problem(f"the row has {length:,} tokens, more than {most}", row.where, fix)
