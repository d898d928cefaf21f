"""Answers in the shapes of OpenAI's images API: images, events of a stream, models, and errors.

The names are those of the types of the `openai` package: `ImagesResponse`, `ImageGenPartialImageEvent`,
`ImageGenCompletedEvent`, `Model`. What this server tells beside them has names of its own.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .contract import ImageResult, PartialImage, Refused, Usage
from .openai_request import Asked

PARTIAL, COMPLETED = "image_generation.partial_image", "image_generation.completed"
# `type` of an error by its status; others are mistakes of the client, or failures of the server
TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}
# clients of OpenAI send a request again after these, which would take as long and end as before
NOT_AGAIN = (408, 500)


def images(asked: Asked, result: ImageResult, created: int) -> dict[str, Any]:
    """The answer to a request that is no stream. created: Unix time, in seconds."""
    first = asked.request.seed or 0
    data = [{"b64_json": _base64(png), "seed": first + number} for number, png in enumerate(result.images)]
    return {"created": created, "data": data, **_look(asked), "usage": _usage(result.usage)}


def partial_image(asked: Asked, partial: PartialImage, created: int) -> bytes:
    """An event with a preview."""
    index = {"partial_image_index": partial.index}
    return event(PARTIAL, {"b64_json": _base64(partial.png), "created_at": created, **_look(asked), **index})


def completed(asked: Asked, result: ImageResult, created: int) -> bytes:
    """The last event of a stream."""
    image = {"b64_json": _base64(result.images[0]), "created_at": created, "seed": asked.request.seed}
    return event(COMPLETED, {**image, **_look(asked), "usage": _usage(result.usage)})


def event(name: str, data: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return b"event: %s\ndata: %s\n\n" % (name.encode(), as_json({"type": name, **data}))


def error_event(refused: Refused) -> bytes:
    """The event that ends a stream which has begun, and which fails."""
    return event("error", error(refused))


def error(refused: Refused) -> dict[str, Any]:
    """The body of an answer without images."""
    status = refused.status
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    said = {"message": refused.message, "type": kind, "param": refused.parameter, "code": refused.code}
    return {"error": said}


def error_headers(refused: Refused) -> dict[str, str]:
    """Headers of such an answer: when to try again, if it is of use."""
    found = {}
    if refused.retry_after is not None:
        found["Retry-After"] = str(max(1, math.ceil(refused.retry_after)))
    elif refused.status in NOT_AGAIN:
        found["X-Should-Retry"] = "false"
    if refused.status == 401:
        found["WWW-Authenticate"] = "Bearer"
    return found


def models(names: Sequence[str], created: int) -> dict[str, Any]:
    """The models that are served."""
    return {"object": "list", "data": [model(name, created) for name in names]}


def model(name: str, created: int) -> dict[str, Any]:
    """One of them. created: when the server was started."""
    return {"id": name, "object": "model", "created": created, "owned_by": "srds_fast"}


def as_json(found: Mapping[str, Any]) -> bytes:
    """In ASCII: a client may have sent halves of surrogate pairs, which have no bytes in UTF-8."""
    return json.dumps(found, separators=(",", ":"), allow_nan=False).encode()


def _look(asked: Asked) -> dict[str, str]:
    """What an answer tells of the looks of its image."""
    return {"background": "opaque", "output_format": "png", "quality": asked.quality, "size": asked.size}


def _usage(usage: Usage) -> dict[str, Any]:
    """What it has cost. Clients expect counts of tokens, which this server does not charge: they are 0."""
    none = {"text_tokens": 0, "image_tokens": 0}
    tokens = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0, "input_tokens_details": none}
    return {**tokens, **asdict(usage)}


def _base64(png: bytes) -> str:
    return base64.b64encode(png).decode()
