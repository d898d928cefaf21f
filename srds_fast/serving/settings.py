"""What a server is configured with. The command line makes it, and both backends read it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import InvalidArgument, shown
from ..planner.settings import LATENCIES, MOST_STEPS
from ..solvers.checks import check_number, check_one_of, check_positive, check_switch, check_whole
from ..solvers.sequential import Sequential

Size = tuple[int, int]
"""Width and height, in pixels."""
AUTO = "auto"
# how requests that wait are answered, see `ServerSettings.batching`
BATCHING = ("adaptive", "never", Sequential.name)
# pixels on a side: no pipeline of today makes larger images, and one request may ask for all of it
MOST_PIXELS = 8192
MOST_GUIDANCE = 1000.0
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


@dataclass(frozen=True)
class ServerSettings:
    """The settings of a server, checked. `to_dict` and `from_dict` turn them to plain JSON types and back.

    Attributes:
        model: name of a bundled pipeline, folder of a saved one, or id on the hub. Requests can name no other.
        device: "auto", "cpu", "cuda" or "cuda:1"; with Ray a replica uses the devices that Ray gives it.
        dtype: of the networks, as "float32".
        ddim: whether the scheduler of the model is replaced by DDIM.

        steps: step counts that requests may ask for. The first is that of a request that names none.
        sizes: sizes of images that requests may ask for. The first is that of a request that names none. Empty: the
            pipeline's own size alone.
        guidance: guidance scales that requests may ask for. The first is that of a request that names none. Empty: 3
            alone with a bundled pipeline, and else the pipeline's own alone.
        negative_prompts: whether requests may have a negative prompt.
        latency: "adaptive" or "constant", as in `srds_fast.compile`.
        tolerance: as in `srds_fast.compile`; None for its default, or that of the plan.
        plan: file of a plan that every call runs; `steps` then holds the steps of the plan alone, or is left as it is.

        host, port: where the server listens. The default host is reached from this machine alone.
        api_key_file: file with one key a line; a request must carry one of them. None: no key is asked for.

        max_images: images of one request at most.
        max_prompt_chars: characters of a prompt, and of a negative prompt, at most.
        max_body_bytes: bytes of the body of a request at most.
        max_partial_images: previews of one stream at most.
        max_queue: requests that wait, of one replica, at most; others are refused with 429.
        request_seconds: time limit of a request, from its arrival.
        drain_seconds: how long a server that is told to end goes on with the requests that it has.

        replicas: copies of the pipeline, each on devices of its own: a number, or "auto" (one for every
            `devices_per_replica` devices). 0: this process alone, without Ray.
        devices_per_replica: devices that make each image together.
        batching: what happens to requests that wait: "adaptive" (those of the same kind share a call once that answers
            them sooner on average), "never" (each has a call of its own), "sequential" (every call takes one step after
            another, for as many requests as wait).
        batch_sizes: numbers of images for which calls are prepared; 1 is always one of them. "auto": those of 1, 2, 4
            and 8 that make at least a tenth more images a second than the one before, as measured at the start.
    """

    model: str = "digits"
    device: str = "auto"
    dtype: str = "float32"
    ddim: bool = False

    steps: tuple[int, ...] = (50,)
    sizes: tuple[Size, ...] = ()
    guidance: tuple[float, ...] = ()
    negative_prompts: bool = False
    latency: str = "adaptive"
    tolerance: float | None = None
    plan: str | None = None

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: str | None = None

    max_images: int = 4
    max_prompt_chars: int = 4000
    max_body_bytes: int = 65_536
    max_partial_images: int = 3
    max_queue: int = 64
    request_seconds: float = 120.0
    drain_seconds: float = 30.0

    replicas: int | str = AUTO
    devices_per_replica: int = 1
    batching: str = "adaptive"
    batch_sizes: tuple[int, ...] | str = AUTO

    def __post_init__(self) -> None:
        for name in ("model", "device", "dtype", "host"):
            _check_text(name, getattr(self, name))
        for name in ("plan", "api_key_file"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        for name in ("ddim", "negative_prompts"):
            check_switch(name, getattr(self, name))
        self._check_what_runs()
        self._check_limits()
        if self.replicas != AUTO:
            check_whole("replicas", self.replicas, 0)
        check_whole("devices_per_replica", self.devices_per_replica, 1)
        if self.replicas == 0 and self.devices_per_replica > 1:
            raise InvalidArgument(
                f"replicas is 0 and devices_per_replica is {self.devices_per_replica}. Several devices of a replica "
                "need Ray, and 0 replicas mean this process alone. Leave one of the two out."
            )

    def _check_what_runs(self) -> None:
        for name in ("steps", "sizes", "guidance", *(["batch_sizes"] if self.batch_sizes != AUTO else [])):
            if not isinstance(getattr(self, name), list | tuple):
                raise InvalidArgument(f"{name} is {shown(getattr(self, name))}. It must be a list.")
        if not self.steps:
            raise InvalidArgument("steps is empty. A server takes at least one step count. Pass (50,), say.")
        for each in self.steps:
            check_whole("each of steps", each, 1, MOST_STEPS)
        for scale in self.guidance:
            check_number("each of guidance", scale, 0, MOST_GUIDANCE)
        for size in self.sizes:
            if not isinstance(size, list | tuple) or len(size) != 2:
                raise InvalidArgument(f"sizes has {shown(size)}. Each size is width and height. Pass (512, 512), say.")
            for pixels in size:
                check_whole("each width and height of sizes", pixels, 1, MOST_PIXELS)
        # lists of a file become tuples; a value that is named twice is one
        object.__setattr__(self, "steps", tuple(dict.fromkeys(self.steps)))
        object.__setattr__(self, "sizes", tuple(dict.fromkeys(tuple(size) for size in self.sizes)))
        object.__setattr__(self, "guidance", tuple(dict.fromkeys(map(float, self.guidance))))
        if not isinstance(self.batch_sizes, str):
            for each in self.batch_sizes:
                check_whole("each of batch_sizes", each, 1)
            object.__setattr__(self, "batch_sizes", tuple(sorted({1, *self.batch_sizes})))
        check_one_of("latency", self.latency, LATENCIES)
        check_one_of("batching", self.batching, BATCHING)
        if self.tolerance is not None:
            check_number("tolerance", self.tolerance, 0)
        given = [name for name in ("latency", "tolerance") if getattr(self, name) != getattr(type(self), name)]
        if self.plan is not None and given:
            raise InvalidArgument(
                f"plan was given together with {' and '.join(given)}. A plan fixes every setting of a call. "
                "Leave one of the two out."
            )

    def _check_limits(self) -> None:
        check_whole("port", self.port, 0, 65_535)
        check_whole("max_images", self.max_images, 1)
        check_whole("max_prompt_chars", self.max_prompt_chars, 1)
        check_whole("max_body_bytes", self.max_body_bytes, 1)
        check_whole("max_partial_images", self.max_partial_images, 0)
        check_whole("max_queue", self.max_queue, 0)
        check_positive("request_seconds", self.request_seconds)
        check_number("drain_seconds", self.drain_seconds, 0)

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain JSON types; a size is a string, as "512x512"."""
        found = asdict(self)
        lists = {name: list(each) for name, each in found.items() if isinstance(each, tuple)}
        return {**found, **lists, "sizes": [f"{width}x{height}" for width, height in self.sizes]}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> ServerSettings:
        """Settings of plain JSON types; what is not given has its default.

        Raises:
            InvalidArgument: a name is unknown, or a value is wrong.
        """
        known = {each.name for each in fields(cls)}
        for name in given:
            if name not in known:
                raise InvalidArgument(f"There is no setting {shown(name)} of a server. Known are {', '.join(known)}.")
        sizes = given.get("sizes", ())
        if isinstance(sizes, list | tuple):
            sizes = tuple(size_of("sizes", each) if isinstance(each, str) else each for each in sizes)
        return cls(**{**given, "sizes": sizes})

    @property
    def model_name(self) -> str:
        """What clients call the model: of a folder its name alone."""
        return Path(self.model).resolve().name if Path(self.model).is_dir() else self.model

    def api_keys(self) -> tuple[bytes, ...]:
        """The keys in `api_key_file`; empty if there is no such file to read.

        Raises:
            InvalidArgument: the file cannot be read, or holds no key.
        """
        if self.api_key_file is None:
            return ()
        path = Path(self.api_key_file)
        try:
            keys = tuple(line.strip() for line in path.read_bytes().splitlines() if line.strip())
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise InvalidArgument(
                f"The keys in {shown(str(path))} cannot be read: {why}. Give a text file with one key a line."
            ) from error
        if not keys:
            raise InvalidArgument(f"{path} holds no key. Write one key a line.")
        return keys


def size_of(name: str, text: str) -> Size:
    """Width and height of a size written as "512x512". Raises InvalidArgument if it is none."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise InvalidArgument(f"{name} is {shown(text)}. A size is width x height in pixels, as 512x512.")
    return int(found[1]), int(found[2])


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise InvalidArgument(f"{name} is {shown(value)}. It must be a text that is not empty. Pass a string.")
