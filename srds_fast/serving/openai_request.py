"""The body of `POST /v1/images/generations`, as OpenAI's clients send it: checked, and turned into an `ImageRequest`.

Nothing here knows of a web framework: bytes go in, and what is wrong with them is a `Refused`.
"""

from __future__ import annotations

import difflib
import json
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidArgument, shown
from .contract import ImageRequest, Refused
from .kinds import guidance_scales
from .settings import ServerSettings, Size, size_of

DEADLINE = "X-Deadline-Ms"
# torch takes 64 bits, and later images add to it
MOST_SEED = 2**62
# seeds of requests that name none; JavaScript reads them exactly
OWN_SEEDS = 2**32
MOST_USER_CHARS = 512
# of quality: the step counts of the server that it means
FEWEST, USUAL, MOST = "fewest", "usual", "most"
QUALITIES = {"auto": USUAL, "standard": USUAL, "medium": USUAL, "low": FEWEST, "high": MOST, "hd": MOST}
FIELDS = (
    *("prompt", "model", "n", "size", "quality", "response_format", "output_format", "output_compression"),
    *("background", "moderation", "style", "user", "stream", "partial_images"),
    # of this server
    *("seed", "steps", "guidance_scale", "negative_prompt"),
)


@dataclass(frozen=True)
class Asked:
    """What a client asks for.

    Attributes:
        request: its `seed` is always set.
        stream: whether the answer is a stream of events.
        quality, size: as in the answer.
    """

    request: ImageRequest
    stream: bool
    quality: str
    size: str


def parsed(body: bytes, settings: ServerSettings, models: Sequence[str], deadline: str | None = None) -> Asked:
    """What the body of a request asks for.

    Args:
        models: names of the models that are served.
        deadline: the header of that name, in milliseconds.

    Raises:
        Refused: 400 with the parameter that is wrong; 404 if there is no such model; 422 if images of this size are not
            made.
    """
    given = _Fields(_object_of(body))
    for name in given.values:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            meant = f" Did you mean {near[0]}?" if near else ""
            raise _wrong(name, f"There is no parameter {shown(name)}.{meant} Known are {', '.join(FIELDS)}.")
    _check_model(given, models)
    _check_formats(given)
    quality = given.one_of("quality", tuple(QUALITIES)) or "auto"
    width, height = _size(given, settings)
    stream = given.switch("stream")
    n = given.whole("n", 1, settings.max_images)
    request = ImageRequest(
        prompt=_prompt(given, settings),
        steps=_steps(given, settings, quality),
        n=1 if n is None else n,
        width=width,
        height=height,
        seed=_seed(given),
        guidance_scale=_guidance(given, settings),
        negative_prompt=_negative_prompt(given, settings),
        partial_images=given.whole("partial_images", 0, settings.max_partial_images) or 0,
        deadline=_deadline(deadline),
    )
    if stream and request.n > 1:
        raise _wrong("n", f"n is {request.n} and stream is true. A stream shows one image. Ask for one, or without.")
    if request.partial_images and not stream:
        raise _wrong("partial_images", "partial_images was given without stream. Only a stream shows them. Set it.")
    size = "auto" if width is None else f"{width}x{height}"
    return Asked(request, stream, "auto" if quality == "standard" else "high" if quality == "hd" else quality, size)


def _object_of(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Refused(400, f"The body is no JSON: {why}. Send a JSON object.", code="invalid_json") from None
    if not isinstance(found, dict):
        raise Refused(400, f"The body is {shown(found)}. Send a JSON object.", code="invalid_json")
    return found


class _Fields:
    """The fields of a body; null is as if a field was not given. Each method raises `Refused` for a wrong value."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.values = {name: value for name, value in given.items() if value is not None}

    def text(self, name: str, most: int) -> str | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise _wrong(name, f"{name} is {shown(value)}. It must be a text. Pass a string.")
        if len(value) > most:
            raise _wrong(
                name,
                f"{name} has {len(value):,} characters. This server takes {most:,} at most. Shorten it.",
                code="string_above_max_length",
            )
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _wrong(name, f"{name} holds half of a surrogate pair, which is no character. Leave it out.") from None
        return value

    def whole(self, name: str, low: int, high: int) -> int | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _wrong(name, f"{name} is {shown(value)}. It must be a whole number from {low} to {high}.")
        return value

    def switch(self, name: str) -> bool:
        value = self.values.get(name, False)
        if not isinstance(value, bool):
            raise _wrong(name, f"{name} is {shown(value)}. It must be true or false.")
        return value

    def one_of(self, name: str, known: Sequence[str]) -> str | None:
        value = self.values.get(name)
        if value is not None and (not isinstance(value, str) or value not in known):
            raise _wrong(name, f"{name} is {shown(value)}. This server takes {', '.join(known)}.")
        return value


def _check_model(given: _Fields, models: Sequence[str]) -> None:
    model = given.text("model", MOST_USER_CHARS)
    if model is not None and model not in models:
        raise Refused(
            404,
            f"There is no model {shown(model)} here. This server has {', '.join(models)}.",
            parameter="model",
            code="model_not_found",
        )


def _check_formats(given: _Fields) -> None:
    """Fields that have one meaning here, and are taken where they ask for it."""
    given.one_of("response_format", ("b64_json",))
    given.one_of("output_format", ("png",))
    given.whole("output_compression", 100, 100)
    given.one_of("background", ("auto", "opaque"))
    given.one_of("moderation", ("auto", "low"))  # nothing is moderated
    given.text("user", MOST_USER_CHARS)
    if "style" in given.values:
        raise _wrong("style", "style was given. This server has one style, that of its model. Leave it out.")


def _prompt(given: _Fields, settings: ServerSettings) -> str:
    prompt = given.text("prompt", settings.max_prompt_chars)
    if prompt is None or not prompt.strip():
        why = "is missing" if prompt is None else "is empty"
        raise _wrong("prompt", f"prompt {why}. It says what to draw. Pass a text.", code="missing_required_parameter")
    return prompt


def _size(given: _Fields, settings: ServerSettings) -> Size | tuple[None, None]:
    """Width and height; None for the pipeline's own."""
    asked = given.text("size", MOST_USER_CHARS)
    if asked is None or asked == "auto":
        return settings.sizes[0] if settings.sizes else (None, None)
    try:
        size = size_of("size", asked)
    except InvalidArgument as error:
        raise _wrong("size", str(error)) from None
    if size not in settings.sizes:
        known = ", ".join(["auto", *(f"{width}x{height}" for width, height in settings.sizes)])
        raise Refused(
            422,
            f"size is {asked}. This server makes images of these sizes: {known}. Ask for one of them.",
            parameter="size",
            code="size_not_served",
        )
    return size


def _steps(given: _Fields, settings: ServerSettings, quality: str) -> int:
    asked = given.values.get("steps")
    if asked is None:
        meant = QUALITIES[quality]
        return settings.steps[0] if meant == USUAL else (min if meant == FEWEST else max)(settings.steps)
    if "quality" in given.values:
        raise _wrong("steps", "steps and quality were given. Each of them sets the number of steps. Leave one out.")
    if isinstance(asked, bool) or not isinstance(asked, int) or asked not in settings.steps:
        known = ", ".join(map(str, settings.steps))
        raise _wrong("steps", f"steps is {shown(asked)}. This server is prepared for {known}. Ask for one of them.")
    return asked


def _seed(given: _Fields) -> int:
    seed = given.whole("seed", 0, MOST_SEED)
    return secrets.randbelow(OWN_SEEDS) if seed is None else seed


def _guidance(given: _Fields, settings: ServerSettings) -> float | None:
    asked, known = given.values.get("guidance_scale"), guidance_scales(settings)
    if asked is None:
        return known[0]
    if isinstance(asked, bool) or not isinstance(asked, int | float) or asked not in known:
        own = "This server is prepared for the value of its model alone. Leave it out."
        listed = ", ".join(f"{each:g}" for each in known if each is not None)
        told = f"This server is prepared for {listed}. Ask for one of them." if listed else own
        raise _wrong("guidance_scale", f"guidance_scale is {shown(asked)}. {told}")
    return float(asked)


def _negative_prompt(given: _Fields, settings: ServerSettings) -> str | None:
    prompt = given.text("negative_prompt", settings.max_prompt_chars)
    if prompt is not None and not settings.negative_prompts:
        raise _wrong("negative_prompt", "negative_prompt was given. This server takes none. Leave it out.")
    if prompt is not None and not prompt.strip():
        raise _wrong("negative_prompt", "negative_prompt is empty. It says what not to draw. Leave it out.")
    return prompt


def _deadline(header: str | None) -> float | None:
    """Seconds of the header."""
    if header is None:
        return None
    try:
        number = float(header) if len(header) <= 32 else math.nan
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise _wrong(DEADLINE, f"{DEADLINE} is {shown(header)}. It must be a number of milliseconds above 0.")
    return number / 1e3


def _wrong(parameter: str, message: str, *, code: str = "invalid_value") -> Refused:
    return Refused(400, message, parameter=parameter, code=code)
