"""What a request may hold beside what is served: what is harmless, what is refused, and what nobody knows."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic_core import PydanticCustomError

# Change nothing about an answer, whatever they say.
_HARMLESS = {
    "user", "store", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
    "prompt_cache_options", "prompt_cache_retention", "priority", "request_id",
}  # fmt: skip
# OpenAI's parameters, and those common on servers like this one, that would change an answer -> values that do not.
_NOT_HERE: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),  # without tools both are no call
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "logprobs": (False, 0),  # 0 is served, for completions
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "suffix": ("",),
    "echo": (False,),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "moderation": (),
    "web_search_options": (),  # {} asks for a search
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "top_k": (-1, 0),
    "min_p": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "typical_p": (1,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
}
_IN_MESSAGES = ("tool_calls", "function_call", "audio")
_TOLD = 3
"""Most unknown names that are told one by one: to look for each one's nearest would stop the server."""


def refusal(message: str, param: str | None) -> PydanticCustomError:
    """An error for a validator to raise; `param` as in OpenAI's errors."""
    return PydanticCustomError("refused", "{message}", {"message": message, "param": param})


def check_characters(fields: Mapping[str, Any]) -> None:
    """Refuses texts with half of a surrogate pair, which JSON can write and nothing else can."""
    for name, value in fields.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except RecursionError:  # Python reads a little deeper than it writes
            raise refusal("the body is nested too deeply", None) from None
        except UnicodeEncodeError:
            whole = name.isprintable()  # a half is not
            what = f"{name if whole else 'a name'} has half of a character in it: \\ud800 to \\udfff come in pairs"
            raise refusal(what, name if whole else None) from None


def check_fields(extra: Mapping[str, Any], served: Iterable[str], n: int) -> None:
    """Refuses what would change an answer and is not there, and names that mean nothing here.

    Args:
        extra: the request's fields that are not `served`.
        n: the answers that it asks for.
    """
    neutral = {**_NOT_HERE, "best_of": (n,)}
    unknown = [name for name in extra if name not in neutral and name not in _HARMLESS]
    missing = [name for name, value in extra.items() if name in neutral and value not in neutral[name]]
    said = [f"this server does not know {short(name)}{_nearest(name, served)}" for name in unknown[:_TOLD]]
    if len(unknown) > _TOLD:
        said.append(f"nor {len(unknown) - _TOLD:,} other names")
    if missing:
        said.append(f"this server does not have {', '.join(missing)}")
    if said:
        raise refusal("; ".join(said), short((unknown + missing)[0]))


def check_prompt(prompt: Any) -> Any:
    """Refuses what is neither text nor token ids nor a list of either. By hand, because pydantic would tell of each
    element that it is none of the four."""

    def ids(of: Any) -> bool:
        return isinstance(of, list) and all(type(token) is int for token in of)  # true and false are of another type

    texts = isinstance(prompt, list) and all(isinstance(text, str) for text in prompt)
    if isinstance(prompt, str) or texts or ids(prompt) or (isinstance(prompt, list) and all(map(ids, prompt))):
        return prompt
    raise refusal("prompt is a text, token ids, a list of texts or a list of lists of token ids", "prompt")


def check_message(extra: Mapping[str, Any]) -> None:
    """Refuses messages that hold more than text."""
    found = [name for name in _IN_MESSAGES if extra.get(name)]
    if found:
        raise refusal(f"this server does not have {', '.join(found)} in messages", "messages")


def short(text: str, most: int = 64) -> str:
    """What was sent, where it is said back."""
    return text if len(text) <= most else f"{text[:most]}..."


def _nearest(name: str, served: Iterable[str]) -> str:
    close = difflib.get_close_matches(short(name), list(served), 1)
    return f"; did you mean {close[0]}?" if close else ""
