"""`srds-fast serve`: its arguments, and the server that it runs."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from waiting import until

import srds_fast
from srds_fast.cli import main
from srds_fast.cli.arguments import USER_MISTAKE, parsed
from srds_fast.cli.serve import server_settings
from srds_fast.serving import packages
from srds_fast.serving.settings import ServerSettings

Capture = pytest.CaptureFixture[str]


def settings(line: str) -> ServerSettings:
    return server_settings(parsed(["serve", *line.split()]))


def test_arguments_become_settings(tmp_path: Path) -> None:
    assert settings("") == ServerSettings()
    assert settings("--local --batch-sizes auto") == ServerSettings(replicas=0)
    found = settings(
        "--model a/b --device cpu --dtype float16 --ddim --steps 50,25 --sizes 64x32,32x32 --guidance 5,3 "
        "--negative-prompts --tolerance 0.01 --latency constant --replicas 2 --devices-per-replica 2 --batching never "
        "--batch-sizes 2,4 --host ::1 --port 0 --api-key-file k --max-images 2 --max-prompt-chars 9 --max-queue 0 "
        "--request-seconds 5 --drain-seconds 6"
    )
    what = {"model": "a/b", "device": "cpu", "dtype": "float16", "ddim": True, "steps": (50, 25)}
    which = {"sizes": ((64, 32), (32, 32)), "guidance": (5.0, 3.0), "negative_prompts": True}
    how = {"tolerance": 0.01, "latency": "constant", "request_seconds": 5.0, "drain_seconds": 6.0}
    where = {"replicas": 2, "devices_per_replica": 2, "batching": "never", "batch_sizes": (2, 4), "host": "::1"}
    who = {"port": 0, "api_key_file": "k", "max_images": 2, "max_prompt_chars": 9, "max_queue": 0}
    assert found == ServerSettings(**what, **which, **how, **where, **who)
    plan = tmp_path / "plan.json"
    srds_fast.compile(tiny.stable_diffusion(), method="srds").plan_for(num_inference_steps=12).save(plan)
    assert settings(f"--plan {plan}") == ServerSettings(plan=str(plan), steps=(12,))
    assert settings(f"--plan {plan} --steps 7").steps == (7,), "loops of second order take more turns than steps"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("--model digit", "Did you mean digits?"),
        ("--device tpu", "There is no device 'tpu'"),
        ("--sizes 32", "--sizes is '32'"),
        ("--steps 20000", "each of --steps is 20000"),
        ("--guidance -1", "each of --guidance is -1.0"),
        ("--plan nothing.json", "The plan nothing.json cannot be read"),
        ("--api-key-file nothing", "The keys in 'nothing' cannot be read"),
        ("", "Serving needs fastapi, uvicorn, prometheus_client, ray"),
        ("--local", "Serving needs fastapi, uvicorn, prometheus_client, and"),
    ],
)
def test_mistakes_are_told_in_one_line(
    line: str, why: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    assert main(["serve", *line.split()]) == USER_MISTAKE
    told = capsys.readouterr().err
    assert told.startswith("srds-fast: ")
    assert told.count("\n") == 1
    assert why in told


def test_it_serves_until_it_is_told_to_end() -> None:
    for name in ("fastapi", "uvicorn", "prometheus_client", "openai"):
        pytest.importorskip(name)
    import httpx2 as httpx
    from served import client

    command = [sys.executable, "-m", "srds_fast.cli", "serve", "--local", "--port", "0", "--steps", "6"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.match(r"Serving digits at (http://127\.0\.0\.1:\d+)\.", line)
            assert found, (line, process.stderr and process.stderr.read())
            address = found[1]
            assert until(lambda seconds: _waited(process, seconds) or httpx.get(f"{address}/readyz").is_success)
            assert client(address).images.generate(prompt="the digit seven").data
            process.send_signal(signal.SIGTERM)
            assert until(lambda seconds: _waited(process, seconds))
            assert process.stderr is not None
            told = process.stderr.read()
            assert "Traceback" not in told
            assert "Warmed up" in told
        finally:
            process.kill()


def _waited(process: subprocess.Popen[str], seconds: float) -> bool:
    """Whether it has ended, after so many seconds."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def test_an_address_that_is_taken_is_told(capsys: Capture) -> None:
    for name in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(name)
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--local", "--port", str(port)]) == USER_MISTAKE
    told = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1, port {port}" in told
