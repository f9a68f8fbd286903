"""OpenAI's requests and answers, as far as they are served; and `headwater`, an addition of ours to both."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic.functional_validators import ModelWrapValidatorHandler
from typing_extensions import Self

from .fields import check_characters, check_fields, check_message, check_prompt, refusal

_MISTAKES = 100
"""Most mistakes of a body that are looked at: to tell each of a hundred thousand would stop the server for seconds."""


class Extras(BaseModel):
    """What a request may ask beyond OpenAI's interface. gates: which heads wrote each token."""

    model_config = ConfigDict(extra="forbid")

    gates: bool = False


class StreamOptions(BaseModel):
    """What a stream holds beside the answer. There is no obfuscation, so asking for it changes nothing; usage in every
    chunk is refused."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: Literal[False] = False


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
        if not isinstance(data, dict):
            return data
        check_characters(data)
        return {key: value for key, value in data.items() if value is not None}

    @model_validator(mode="wrap")
    @classmethod
    def _has_few_mistakes(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            if error.error_count() <= _MISTAKES:
                raise
            raise refusal(f"the body has {error.error_count():,} mistakes, too many to name", None) from None

    @model_validator(mode="after")
    def _is_served(self) -> Self:
        check_fields(self.model_extra or {}, type(self).model_fields, self.n)
        if len(self.stops) > 4 or not all(self.stops):
            raise refusal("stop takes at most 4 texts, none of them empty", "stop")
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens of an answer."""
        return self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @model_validator(mode="after")
    def _is_text(self) -> Self:
        check_message(self.model_extra or {})
        return self

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
            raise refusal("the last message must be the user's", "messages")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Request):
    """A body of `/v1/completions`."""

    prompt: Annotated[str | list[str] | list[int] | list[list[int]], PlainValidator(check_prompt)]

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if not self.prompts:
            raise refusal("there is no prompt", "prompt")
        return self

    @property
    def asks_logprobs(self) -> bool:
        """Whether `logprobs` is 0: of the answer's tokens, of no others."""
        asked = (self.model_extra or {}).get("logprobs", False)
        return asked is not False

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


def logprobs_of(tokens: Sequence[tuple[str, float, int]]) -> dict[str, Any]:
    """`logprobs` of `/v1/completions`, from each token's text, log-probability and place in the answer."""
    texts, values, places = (list(column) for column in zip(*tokens, strict=True))
    return {"tokens": texts, "token_logprobs": values, "top_logprobs": None, "text_offset": places}


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

    def whole(self, index: int, text: str, finish: str | None, logprobs: Any = None) -> dict[str, Any]:
        """One finished choice."""
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}

    def part(self, index: int, text: str, finish: str | None, logprobs: Any = None, *, first: bool) -> dict[str, Any]:
        """One choice of a chunk."""
        delta = {**({"role": "assistant"} if first else {}), **({"content": text} if text or first else {})}
        content = {"delta": delta} if self.chat else {"text": text}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}
