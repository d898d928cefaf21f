"""The page of the server, in headless Chromium: it draws, shows previews, stops, and tells what is wrong."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import INSTALLED, Browser, browser
from PIL import Image
from served import FakeBackend, needs, served

needs("fastapi", "uvicorn", "openai")
pytestmark = pytest.mark.skipif(not INSTALLED, reason="needs Debian's chromium and chromium-driver")

from srds_fast.serving.app import create_app
from srds_fast.serving.contract import ImageRequest, ImageResult, PartialImage, Refused
from srds_fast.serving.settings import ServerSettings

# resolves once the page says something that matches
SAYS = """
const wanted = new RegExp(arguments[0]);
return new Promise((resolve) => {
  const look = () => {
    const said = document.getElementById("status").textContent;
    if (wanted.test(said)) resolve(said); else setTimeout(look, 10);
  };
  look();
});
"""
CLICK = "document.getElementById(arguments[0]).click()"
IMAGES = "return [...document.querySelectorAll('figure')].map((each) => [each.className, each.innerText])"
READY = "return new Promise((resolve) => {const look = () => document.querySelector('#steps option') ? resolve(1) : "
READY += "setTimeout(look, 10); look();})"


class Drawing(FakeBackend):
    """Its images can be shown."""

    async def stream(self, request: ImageRequest) -> Any:
        async for item in super().stream(request):
            colour = (40 * (item.index + 1), 90, 160) if isinstance(item, PartialImage) else (37, 99, 235)
            file = io.BytesIO()
            Image.new("RGB", (32, 32), colour).save(file, format="PNG")
            if isinstance(item, PartialImage):
                yield PartialImage(file.getvalue(), item.index)
            else:
                yield ImageResult((file.getvalue(),), item.usage)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as made:
        yield made


@pytest.fixture
def backend() -> FakeBackend:
    return Drawing(ServerSettings(steps=(50, 25)), previews=2)


@pytest.fixture
def page(chromium: Browser, backend: FakeBackend) -> Iterator[Browser]:
    with served(create_app(backend, backend.settings)) as address:
        chromium.open(f"{address}/")
        chromium.run(READY)
        yield chromium
        chromium.open("about:blank")


def test_a_prompt_is_drawn_with_previews_and_what_it_cost(page: Browser, backend: FakeBackend) -> None:
    page.run(
        "document.getElementById('prompt').value = 'the <b>digit</b> two'; document.getElementById('seed').value = 3"
    )
    page.run(CLICK, "draw")
    page.run(SAYS, "^Done in ")
    shown = page.run(IMAGES)
    assert [name for name, _ in shown] == ["", "", "final"]
    assert [text.split(",")[0] for _, text in shown] == ["preview 1", "preview 2", "image"]
    assert page.run("return [...document.images].every((each) => each.naturalWidth === 32)")
    told = page.run("return document.getElementById('usage').innerText")
    for words in ("1.50 s, 0.50 s of it waiting", "7 batched network calls, 70 rows", "srds"):
        assert words in told
    (request,) = backend.seen
    assert (request.prompt, request.seed, request.steps, request.partial_images) == ("the <b>digit</b> two", 3, 50, 3)
    assert page.errors() == []
    with Image.open(io.BytesIO(page.screenshot())) as image:
        assert image.size[0] == 900


def test_a_refusal_is_told_and_stop_stops(page: Browser, backend: FakeBackend) -> None:
    async def refuse(request: ImageRequest) -> None:
        raise Refused(429, "The queue <i>is</i> full.")

    backend.doing = refuse
    for backend.previews in (0, 1):
        page.run(CLICK, "draw")
        page.run(SAYS, "The queue <i>is</i> full")
        page.run("document.getElementById('status').textContent = ''")
    backend.doing = lambda request: asyncio.Event().wait()
    page.run(CLICK, "draw")
    page.run(SAYS, "Drawing")
    page.run(CLICK, "stop")
    page.run(SAYS, "Stopped")
    assert not page.run("return document.getElementById('draw').disabled")


def test_the_page_asks_for_a_key_where_one_is_needed(chromium: Browser, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("secret")
    settings = ServerSettings(api_key_file=str(file))
    with served(create_app(Drawing(settings), settings)) as address:
        chromium.open(f"{address}/")
        chromium.run(READY)
        chromium.run(CLICK, "draw")
        chromium.run(SAYS, "API key is missing or wrong")
        chromium.run("document.getElementById('key').value = 'secret'")
        chromium.run(CLICK, "draw")
        chromium.run(SAYS, "^Done in ")
        chromium.open("about:blank")
