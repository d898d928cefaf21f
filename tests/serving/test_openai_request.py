"""Bodies of `POST /v1/images/generations`: what they mean, and that nothing is answered by a failure of the server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srds_fast.serving.contract import ImageRequest, Refused
from srds_fast.serving.kinds import Kind, kinds_of
from srds_fast.serving.openai_request import FIELDS, parsed
from srds_fast.serving.settings import ServerSettings

LIMITS: dict[str, Any] = {"max_images": 4, "max_prompt_chars": 100}
SIZES = ((64, 32), (32, 32))
SETTINGS = ServerSettings(steps=(50, 25, 100), sizes=SIZES, guidance=(7.5, 1), negative_prompts=True, **LIMITS)
MODELS = ["digits"]


def asked(deadline: str | None = None, **fields: Any) -> Any:
    return parsed(json.dumps({"prompt": "a", **fields}).encode(), SETTINGS, MODELS, deadline)


def test_a_prompt_alone_has_the_defaults_and_some_seed() -> None:
    found = asked()
    expected = ImageRequest("a", 50, width=64, height=32, seed=found.request.seed, guidance_scale=7.5)
    assert (found.request, found.stream, found.quality, found.size) == (expected, False, "auto", "64x32")
    assert found.request.seed != asked().request.seed
    alone = parsed(b'{"prompt": "a"}', ServerSettings(), MODELS)
    assert (alone.request.width, alone.request.height, alone.size) == (None, None, "auto")


def test_everything_that_is_asked_for_is_taken() -> None:
    found = asked(
        deadline="1500",
        model="digits",
        n=1,
        size="32x32",
        stream=True,
        partial_images=2,
        seed=7,
        steps=25,
        guidance_scale=1,
        negative_prompt="b",
        user="me",
        response_format="b64_json",
        output_format="png",
        background="opaque",
        moderation="low",
        quality=None,
    )
    expected = ImageRequest("a", 25, 1, 32, 32, 7, 1.0, "b", 2, 1.5)
    assert (found.request, found.stream, found.size) == (expected, True, "32x32")


@pytest.mark.parametrize(
    ("quality", "steps"),
    [("low", 25), ("medium", 50), ("auto", 50), ("standard", 50), ("high", 100), ("hd", 100), (None, 50)],
)
def test_quality_is_a_number_of_steps(quality: str | None, steps: int) -> None:
    found = asked(quality=quality)
    assert found.request.steps == steps
    assert found.quality in ("low", "medium", "high", "auto"), "what the types of the client know"


WRONG = [
    ({"prompt": None}, 400, "prompt"),
    ({"prompt": " "}, 400, "prompt"),
    ({"prompt": 7}, 400, "prompt"),
    ({"prompt": "a" * 101}, 400, "prompt"),
    ({"prompt": "\ud800"}, 400, "prompt"),
    ({"model": "dall-e-3"}, 404, "model"),
    ({"model": 3}, 400, "model"),
    ({"n": 0}, 400, "n"),
    ({"n": 5}, 400, "n"),
    ({"n": True}, 400, "n"),
    ({"n": 1.0}, 400, "n"),
    ({"n": 2, "stream": True}, 400, "n"),
    ({"size": "1024x1024"}, 422, "size"),
    ({"size": "large"}, 400, "size"),
    ({"size": 32}, 400, "size"),
    ({"steps": 51}, 400, "steps"),
    ({"steps": 0}, 400, "steps"),
    ({"steps": 25, "quality": "low"}, 400, "steps"),
    ({"quality": "best"}, 400, "quality"),
    ({"quality": ["low"]}, 400, "quality"),
    ({"seed": -1}, 400, "seed"),
    ({"seed": 2**63}, 400, "seed"),
    ({"guidance_scale": float("nan")}, 400, "guidance_scale"),
    ({"guidance_scale": 3.1}, 400, "guidance_scale"),
    ({"guidance_scale": True}, 400, "guidance_scale"),
    ({"guidance_scale": "3"}, 400, "guidance_scale"),
    ({"negative_prompt": 1}, 400, "negative_prompt"),
    ({"negative_prompt": " "}, 400, "negative_prompt"),
    ({"response_format": "url"}, 400, "response_format"),
    ({"output_format": "webp"}, 400, "output_format"),
    ({"output_compression": 50}, 400, "output_compression"),
    ({"background": "transparent"}, 400, "background"),
    ({"style": "vivid"}, 400, "style"),
    ({"stream": "yes"}, 400, "stream"),
    ({"partial_images": 2}, 400, "partial_images"),
    ({"partial_images": 4, "stream": True}, 400, "partial_images"),
    ({"guidence_scale": 3}, 400, "guidence_scale"),
    ({"user": 3}, 400, "user"),
]


@pytest.mark.parametrize(("fields", "status", "parameter"), WRONG, ids=[str(case[0])[:40] for case in WRONG])
def test_what_is_wrong_is_named(fields: dict[str, Any], status: int, parameter: str) -> None:
    with pytest.raises(Refused) as caught:
        asked(**fields)
    assert (caught.value.status, caught.value.parameter) == (status, parameter)
    assert caught.value.message[0].isprintable()


@pytest.mark.parametrize(
    ("settings", "known", "told"),
    [
        ({}, 3.0, "prepared for 3. Ask"),
        ({"guidance": (5.0, 3.0)}, 5.0, "prepared for 5, 3. Ask"),
        ({"model": "owner/name"}, None, "prepared for the value of its model alone. Leave it out"),
    ],
)
def test_guidance_and_negative_prompts_are_those_that_the_server_is_prepared_for(
    settings: dict[str, Any], known: float | None, told: str
) -> None:
    """Each value is another kind of call: one that is not prepared would be rehearsed in the middle of serving."""
    given = ServerSettings(**settings)
    assert parsed(b'{"prompt": "a"}', given, MODELS).request.guidance_scale == known
    with pytest.raises(Refused, match=told):
        parsed(b'{"prompt": "a", "guidance_scale": 4}', given, MODELS)
    with pytest.raises(Refused, match="takes none") as caught:
        parsed(b'{"prompt": "a", "negative_prompt": "b"}', given, MODELS)
    assert (caught.value.status, caught.value.parameter) == (400, "negative_prompt")


def test_every_request_is_of_a_kind_that_is_prepared() -> None:
    kinds = kinds_of(SETTINGS)
    assert len(set(kinds)) == len(kinds) == 3 * 2 * 2 * 2
    assert Kind.of(asked().request) == kinds[0]
    found = asked(steps=100, size="32x32", guidance_scale=1, negative_prompt="b").request
    assert Kind.of(found) == kinds[-1]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"null", b"[" * 60_000, b'{"n":1%s}' % (b"0" * 5000)])
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(Refused) as caught:
        parsed(body, SETTINGS, MODELS)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


@pytest.mark.parametrize("deadline", ["", "soon", "0", "-5", "nan", "inf", "9" * 400])
def test_a_deadline_is_a_number_of_milliseconds(deadline: str) -> None:
    with pytest.raises(Refused) as caught:
        asked(deadline)
    assert caught.value.parameter == "X-Deadline-Ms"


def taken(body: bytes, deadline: str | None = None) -> Any:
    """What is asked for; None if it is refused by a status of mistakes of the client."""
    try:
        return parsed(body, SETTINGS, MODELS, deadline)
    except Refused as refused:
        if refused.status in (400, 404, 422):
            return None
        raise


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
LIKELY = {
    "prompt": st.text(max_size=120),
    "n": st.integers(-1, 6),
    "size": st.sampled_from(["auto", "32x32", "64x32", "x", "0x0", "32x"]),
    "steps": st.sampled_from([25, 50, 100, 51]),
    "guidance_scale": st.floats(-1, 25) | st.sampled_from([0, 1, 7.5]),
    "stream": st.booleans(),
    "seed": st.integers(-1, 2**64),
}
BODIES = st.fixed_dictionaries({}, optional={name: LIKELY.get(name, JSON) | JSON for name in FIELDS})


@given(BODIES, st.none() | st.text(max_size=20))
def test_any_object_is_a_request_within_the_limits_or_refused(body: dict[str, Any], deadline: str | None) -> None:
    found = taken(json.dumps(body).encode(), deadline)
    if found is None:
        return
    request = found.request
    assert 1 <= request.n <= SETTINGS.max_images
    assert request.steps in SETTINGS.steps
    assert (request.width, request.height) in SETTINGS.sizes
    assert Kind.of(request) in kinds_of(SETTINGS)
    assert request.seed is not None
    assert 0 <= request.seed <= 2**62
    assert request.prompt == body["prompt"]
    request.prompt.encode()


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_a_request(body: bytes) -> None:
    taken(body)
