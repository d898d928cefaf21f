"""Headless Chromium, by the WebDriver protocol: JSON over HTTP, to Debian's chromium-driver."""

from __future__ import annotations

import base64
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from served import free_port
from waiting import until

INSTALLED = all(shutil.which(name) for name in ("chromium", "chromedriver"))
# it may run as root, and is to look for nothing on the network
ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    *("--window-size=900,820", "--force-device-scale-factor=1", "--hide-scrollbars"),
)


class Browser:
    def __init__(self, http: Any, session: str) -> None:
        self._http, self._session = http, session

    def ask(self, method: str, path: str, **body: Any) -> Any:
        content = body if method == "POST" else None
        found = self._http.request(method, f"/session/{self._session}{path}", json=content)
        assert found.is_success, found.text
        return found.json()["value"]

    def open(self, address: str) -> None:
        self.ask("POST", "/url", url=address)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a piece of JavaScript returns; a promise is waited for."""
        return self.ask("POST", "/execute/sync", script=script, args=list(arguments))

    def screenshot(self) -> bytes:
        return base64.b64decode(self.ask("GET", "/screenshot"))

    def errors(self) -> list[str]:
        """What the console of the page told since this was asked last."""
        return [each["message"] for each in self.ask("POST", "/se/log", type="browser")]


@contextmanager
def browser() -> Iterator[Browser]:
    import httpx2 as httpx

    port = free_port()
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120.0) as http,
    ):
        try:
            assert until(lambda seconds: _is_up(http, seconds))
            options = {"args": [*ARGUMENTS, f"--user-data-dir={folder}"]}
            asked = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            found = http.post("/session", json={"capabilities": {"alwaysMatch": asked}})
            assert found.is_success, found.text
            made = Browser(http, found.json()["value"]["sessionId"])
            yield made
            made.ask("DELETE", "")
        finally:
            process.terminate()


def _is_up(http: Any, seconds: float) -> bool:
    import time

    time.sleep(seconds)
    try:
        return bool(http.get("/status").is_success)
    except Exception:  # it does not listen yet
        return False
