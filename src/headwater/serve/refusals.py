"""What is said about requests that are not answered."""

from __future__ import annotations

import math
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from ..errors import HeadwaterError
from .fields import short
from .protocol import error_body


class Refused(Exception):  # noqa: N818, it is an answer
    """An answer that is an error; of what was sent, which its texts may repeat, it says little."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", **more: Any):
        message = short(message, 1000)
        if more.get("param"):
            more["param"] = short(more["param"])
        super().__init__(message)
        self.status, self.retry_after = status, more.pop("retry_after", None)
        self.body = error_body(message, kind, **more)

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        return JSONResponse(self.body, self.status, headers)


def said(error: HeadwaterError) -> str:
    """All its problems in one line, without places, which are the client's `param`."""
    return "; ".join(": ".join(filter(None, (p.what, p.fix))) for p in error.problems)


def mistake(error: RequestValidationError, content_type: str) -> tuple[str, str | None]:
    """What is wrong with a body, and the parameter that it is about."""
    found = error.errors()
    kind, place = found[0]["type"], found[0]["loc"]
    if kind == "json_invalid":
        return f"the body is not JSON: {found[0]['ctx']['error']}, at character {place[1] + 1}", None
    if isinstance(error.body, bytes):  # FastAPI has not looked into it
        return f"the Content-Type is {content_type or 'missing'}; send application/json", None
    if place == ("body",) and kind == "missing":
        return "the request has no body", None
    if place == ("body",) and kind != "refused":
        return "the body is not a JSON object", None
    texts = [e["msg"] if e["type"] == "refused" else f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in found]
    told = list(dict.fromkeys(texts))
    more = [f"and {len(told) - 5} more"] if len(told) > 5 else []
    param = found[0]["ctx"]["param"] if kind == "refused" else str(place[1])
    return "; ".join(told[:5] + more), param
