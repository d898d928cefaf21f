"""What the guide says about serving is run as it stands, against a server of a tiny pipeline."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from served import free_port, needs, served
from test_guides import ROOT, blocks
from waiting import until

needs("fastapi", "uvicorn", "openai", "prometheus_client")

import httpx2 as httpx

import srds_fast
from srds_fast.serving.local import create_local_app
from srds_fast.serving.settings import ServerSettings
from srds_fast.serving.worker import Worker

GUIDE = ROOT / "srds_fast" / "GUIDE.md"
IN_THE_GUIDE = "http://127.0.0.1:8000"
SETTINGS = ServerSettings(steps=(50,), guidance=(3.0,), batching="never", replicas=0)


def block(language: str, about: str) -> str:
    """The block of a language in which some text stands."""
    (found,) = [each for each in blocks(GUIDE, language) if about in each]
    return found


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    plan = tmp_path_factory.mktemp("plan") / "plan.json"  # nothing is timed to choose one
    srds_fast.compile(tiny.stable_diffusion(), method="srds").plan_for(num_inference_steps=50).save(plan)
    settings = dataclasses.replace(SETTINGS, plan=str(plan))
    with served(create_local_app(settings, lambda settings: Worker(tiny.stable_diffusion(), settings))) as found:
        assert until(lambda seconds: threading.Event().wait(seconds) or httpx.get(f"{found}/readyz").is_success)
        yield found


def test_the_client_of_openai(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = block("python", "from openai").replace(IN_THE_GUIDE, address)
    exec(compile(code, "the client", "exec"), {})
    assert sorted(each.name for each in tmp_path.iterdir()) == ["seven-7.png", "seven-8.png"]
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == "image_generation.completed"
    assert set(told[1:-1]) == {"image_generation.partial_image"}


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(address: str) -> None:
    command = block("bash", "curl").replace(IN_THE_GUIDE, address)
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout)["data"][0]["seed"] == 7


def test_the_application_in_a_process_of_ones_own() -> None:
    names: dict[str, Any] = {}
    exec(compile(block("python", "create_local_app"), "the application", "exec"), names)
    assert type(names["app"]).__name__ == "FastAPI"


def test_every_status_is_in_the_table() -> None:
    text = GUIDE.read_text()
    told = {int(each) for each in re.findall(r"\b[45]\d\d\b", text.split("| status | when |")[1].split("\n\n")[0])}
    raised = set()
    for file in (ROOT / "srds_fast" / "serving").glob("*.py"):
        raised |= {int(each) for each in re.findall(r"Refused\(\s*(\d+)", file.read_text())}
    assert told == raised


@pytest.mark.slow
@pytest.mark.exhaustive
def test_litserve(tmp_path: Path) -> None:
    pytest.importorskip("litserve")
    port = free_port()
    file = tmp_path / "images.py"
    file.write_text(block("python", "litserve").replace("port=8000", f"port={port}").replace("(50,)", "(6,)"))
    with subprocess.Popen([sys.executable, str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            place = f"http://127.0.0.1:{port}"
            assert until(lambda seconds: threading.Event().wait(seconds) or _answers(f"{place}/health"))
            body = {"prompt": "the digit seven", "seed": 7, "steps": 6}
            found = httpx.post(f"{place}/v1/images/generations", json=body, timeout=120.0)
            assert found.is_success, found.text
            assert found.json()["data"][0]["seed"] == 7
            wrong = httpx.post(f"{place}/v1/images/generations", json={**body, "steps": 7}, timeout=120.0)
            assert wrong.status_code == 400
        finally:
            process.terminate()
            process.wait()


def _answers(address: str) -> bool:
    try:
        return bool(httpx.get(address).is_success)
    except httpx.TransportError:
        return False
