"""A conversation through the tokenizer's chat template, cut into pieces where what is learned begins and ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jinja2 import TemplateError

from headwater.errors import HeadwaterError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Piece:
    """A stretch of a row's text that is tokenised on its own.

    Args:
        learned: it carries loss.
        content: it is a completion or an assistant's turn, without what closes it.
        opens: the row's text begins with it.
        special: it is not text, but the tokenizer's start token (if the tokenizer uses one) or its end token.
    """

    text: str
    learned: bool = False
    content: bool = False
    opens: bool = False
    special: Literal["", "start", "end"] = ""


START = Piece("", special="start")
END = Piece("", learned=True, special="end")


def chat_pieces(messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, where: str) -> list[Piece]:
    """Render a conversation once, with a mark in place of each assistant's turn, and cut it at the marks.

    So turns stand in the text exactly as written, templates that treat earlier turns differently need no special case,
    and what the template itself puts before a turn (an empty thinking block, say) is context, not something to learn.
    A turn is closed by what the template writes after the last one up to its first special token; that is learned
    too, where a turn has it. If there is no such token, the end token is put behind the last turn.

    Raises:
        HeadwaterError: no template, a template that refuses the conversation, or one that does not show every turn.
    """
    if not tokenizer.chat_template:
        fix = "use a model with one, set tokenizer.chat_template, or write prompt and completion"
        raise HeadwaterError(Problem("the tokenizer has no chat template", where, fix))
    marked = [dict(message) for message in messages]
    turns = [message for message in marked if message["role"] == "assistant"]
    contents = [turn["content"] for turn in turns]
    for number, turn in enumerate(turns):
        turn["content"] = _mark(number)
    try:
        text = tokenizer.apply_chat_template(marked, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:  # its own, a mistake in it, none of several by default
        raise HeadwaterError(Problem(f"the chat template refuses the conversation: {error}", where)) from error
    assert isinstance(text, str)
    context: list[str] = []
    for number in range(len(turns)):
        before, mark, after = text.partition(_mark(number))
        if not mark or mark in after:
            raise HeadwaterError(Problem(f"the chat template does not show assistant turn {number + 1} once", where))
        context.append(before)
        text = after
    specials = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    ends = [text.find(token) + len(token) for token in specials if token and token in text]
    closing = text[: min(ends)] if ends else text.rstrip()
    pieces = [Piece(context[0], opens=True)]
    for content, following in zip(contents, [*context[1:], closing], strict=True):
        pieces.append(Piece(content, learned=True, content=True))
        closed = closing if following.startswith(closing) else ""
        pieces += [Piece(closed, learned=True), Piece(following[len(closed) :])]
    # What follows the last turn's closing, a line break as a rule, teaches nothing.
    return [*(p for p in pieces if p.text or p.content), *([] if ends else [END])]


def _mark(number: int) -> str:
    """A text that no conversation holds and no template changes."""
    return f"\u27e6assistant-turn-{number}\u27e7"
