"""What a user writes, for type checkers: mypy and pyright must accept it, and refuse what is marked as wrong.

mypy checks it with the rest of the package (see pyproject.toml), where a mark of a fault that it does not find is an
error; `test_types.py` runs pyright on it. Nothing is run.
"""

from __future__ import annotations

from typing import assert_type

import srds_fast


class Output:
    images: list[object]


class Pipeline:
    """A pipeline class of the user's; those of diffusers are of this form."""

    guidance_scale: float

    def __call__(self, prompt: str, *, num_inference_steps: int = 50) -> Output:
        raise NotImplementedError

    def load_lora_weights(self, name: str) -> None:
        raise NotImplementedError


def serve(pipe: Pipeline) -> list[object]:
    fast = srds_fast.compile(pipe, tolerance=1e-2)
    assert_type(fast, srds_fast.Compiled[Pipeline])
    assert_type(fast.original, Pipeline)
    # the pipeline's own
    fast.load_lora_weights("a name")
    fast.to("cuda")
    assert_type(fast("a cat", num_inference_steps=20), Output)
    assert_type(fast("a cat", num_inference_steps=20).images, list[object])
    # what this package adds
    fast.warmup("a cat", num_inference_steps=20)
    fast.calibrate(["a cat"], num_samples=4).save("plan.json")
    assert_type(fast.plan_for("a cat"), srds_fast.Plan)
    with fast.using(on_wave=print):
        fast("a cat", keep_trajectory=True)
    with fast.stream("a cat") as stream:
        assert_type(stream, srds_fast.Stream)
        images = [refinement.images for refinement in stream if not refinement.final]
    assert_type(fast.report, srds_fast.Report | None)
    if fast.report is not None:
        assert_type(fast.report.speedup, float | None)
        print(fast.report.speed_up)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    fast.reset()
    again = srds_fast.compile(fast, method="srds")
    return [*images, *again("a cat").images, again.report]


def mistaken(pipe: Pipeline) -> None:
    srds_fast.compile(pipe, tolerence=1e-2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    srds_fast.compile(pipe, tolerance="small")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    srds_fast.compile()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    fast = srds_fast.compile(pipe)
    fast.plan_for().sav("plan.json")  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    fast.calibrate(num_samples=4)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
