"""Images that shared a call are those made alone, within the tolerance. The same call gives the same bits."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

import srds_fast
from srds_fast import zoo
from srds_fast.serving.batching import PARALLEL, WAYS
from srds_fast.serving.contract import ImageRequest
from srds_fast.serving.settings import ServerSettings
from srds_fast.serving.worker import Worker

STEPS = 12


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    file, pipe = tmp_path_factory.mktemp("plan") / "plan.json", zoo.load("digits")
    srds_fast.compile(pipe, method="srds").plan_for(num_inference_steps=STEPS).save(file)
    return Worker(pipe, ServerSettings(steps=(STEPS,), batch_sizes=(1, 2), plan=str(file)))


@pytest.mark.parametrize("way", WAYS)
def test_an_image_that_shared_a_call_is_the_one_that_is_made_alone(worker: Worker, way: str) -> None:
    digits = ("three", "seven")
    common = {"steps": STEPS, "guidance_scale": zoo.GUIDANCE}
    requests = [ImageRequest(f"the digit {digit}", seed=seed, **common) for seed, digit in enumerate(digits)]
    shared = worker.generate(requests, None, way)
    again = worker.generate(requests, None, way)
    assert [each.images for each in shared] == [each.images for each in again]
    for request, found in zip(requests, shared, strict=True):
        assert found.usage.batch == 2
        (alone,) = worker.generate([request], None, way)
        assert worker.generate([request], None, way)[0].images == alone.images
        off = [np.asarray(Image.open(io.BytesIO(each.images[0])), dtype=float) for each in (found, alone)]
        # rounding may move a stop by an iteration, so what holds is the tolerance, half a grey level on average
        assert np.abs(off[0] - off[1]).mean() <= (0.5 if way == PARALLEL else 0.05)
