"""Settings of a server: plain JSON and back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from srds_fast.errors import InvalidArgument
from srds_fast.serving.settings import ServerSettings

SETTINGS = ServerSettings(
    steps=(50, 25, 50), sizes=((64, 32), (32, 32)), replicas=2, batch_sizes=(4, 2), guidance=(3, 5), host="::1"
)


def test_settings_survive_json() -> None:
    assert SETTINGS.steps == (50, 25), "each once, the default first"
    assert SETTINGS.batch_sizes == (1, 2, 4)
    assert [type(each) for each in SETTINGS.guidance] == [float, float]
    assert ServerSettings.from_dict(json.loads(json.dumps(SETTINGS.to_dict()))) == SETTINGS
    assert ServerSettings.from_dict({}) == ServerSettings()
    assert ServerSettings().host == "127.0.0.1"


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"step": [50]}, "no setting 'step'"),
        ({"steps": []}, "steps is empty"),
        ({"steps": 50}, "must be a list"),
        ({"steps": [0]}, "each of steps is 0"),
        ({"sizes": ["32"]}, "'32'"),
        ({"sizes": [[32]]}, "width and height"),
        ({"sizes": ["32x99999"]}, "99999"),
        ({"batch_sizes": [0]}, "batch_sizes"),
        ({"model": ""}, "model"),
        ({"port": 70000}, "port"),
        ({"latency": "low"}, "latency"),
        ({"batching": "always"}, "batching"),
        ({"request_seconds": 0}, "request_seconds"),
        ({"max_queue": -1}, "max_queue"),
        ({"guidance": [float("nan")]}, "each of guidance"),
        ({"guidance": 3.0}, "guidance is 3.0. It must be a list"),
        ({"guidance_scale": 3.0}, "no setting 'guidance_scale'"),
        ({"negative_prompts": "yes"}, "negative_prompts"),
        ({"batch_sizes": "many"}, "batch_sizes is 'many'"),
        ({"replicas": 0, "devices_per_replica": 2}, "Leave one of the two out"),
        ({"plan": "plan.json", "latency": "constant"}, "plan was given together with latency"),
        ({"api_key_file": ""}, "api_key_file"),
    ],
)
def test_wrong_settings_are_named(given: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        ServerSettings.from_dict(given)


def test_keys_are_the_lines_of_a_file(tmp_path: Path) -> None:
    assert ServerSettings().api_keys() == ()
    file = tmp_path / "keys"
    for content, why in ((None, "cannot be read"), (b" \n\n", "holds no key")):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(InvalidArgument, match=why):
            ServerSettings(api_key_file=str(file)).api_keys()
    file.write_bytes(b"one\n\n two \r\n")
    assert ServerSettings(api_key_file=str(file)).api_keys() == (b"one", b"two")


def test_a_folder_is_known_by_its_name_alone(tmp_path: Path) -> None:
    assert ServerSettings(model=str(tmp_path)).model_name == tmp_path.name
    assert ServerSettings(model="owner/name").model_name == "owner/name"
