"""OpenAI's requests and answers, as far as they are served; and `headwater`, an addition of ours to both."""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

# Parameters that would change an answer and are not there: refused unless they ask for nothing.
_REFUSED = (
    "tools", "functions", "logit_bias", "logprobs", "top_logprobs", "frequency_penalty", "presence_penalty", "suffix",
    "echo", "audio", "prediction",
)  # fmt: skip


class Extras(BaseModel):
    """What a request may ask beyond OpenAI's interface. gates: which heads wrote each token."""

    model_config = ConfigDict(extra="forbid")

    gates: bool = False


class StreamOptions(BaseModel):
    include_usage: bool = False


class Request(BaseModel):
    """What both kinds of requests have in common."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    headwater: Extras = Extras()

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_the_default(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _is_served(self) -> Self:
        extra = self.model_extra or {}
        asked = [name for name in _REFUSED if extra.get(name) not in (None, 0, False, "", [], {})]
        if extra.get("response_format", {"type": "text"}) != {"type": "text"}:
            asked.append("response_format")
        if asked:
            raise ValueError(f"this server does not have {', '.join(asked)}")
        if len(self.stops) > 4 or not all(self.stops):
            raise ValueError("stop takes at most 4 texts, none of them empty")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Request):
    """A body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if self.messages[-1].role != "user":
            raise ValueError("the last message must be the user's")
        return self


class CompletionRequest(Request):
    """A body of `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One entry per prompt: text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


def error_body(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts; a token that only ends an answer counts, too."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


class Shape:
    """Builds the answers to one request: whole, or chunk by chunk.

    Args:
        chat: `/v1/chat/completions`, else `/v1/completions`.
        model: the name that was asked for.
    """

    def __init__(self, *, chat: bool, model: str):
        self.chat, self.model = chat, model
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def body(self, choices: list[dict[str, Any]], *, chunk: bool = False, **more: Any) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        name = f"{kind}.chunk" if chunk and self.chat else kind
        head = {"id": self.id, "object": name, "created": self.created, "model": self.model}
        return {**head, "choices": choices, **more}

    def whole(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        """One finished choice."""
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": index, **content, "logprobs": None, "finish_reason": finish}

    def part(self, index: int, text: str, finish: str | None, *, first: bool) -> dict[str, Any]:
        """One choice of a chunk."""
        delta = {**({"role": "assistant"} if first else {}), **({"content": text} if text or first else {})}
        content = {"delta": delta} if self.chat else {"text": text}
        return {"index": index, **content, "logprobs": None, "finish_reason": finish}
