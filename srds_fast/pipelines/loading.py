"""From the name of a model to a pipeline. What its small files tell is checked before its weights are read."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import torch
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

from .. import zoo
from ..errors import InvalidArgument, PlanMismatch
from ..planner.plan import Plan
from ..schedulers.verify import check_scheduler
from ..solvers.registry import SEQUENTIAL
from .compile import compile
from .devices import device_of

# seconds until the hub counts as out of reach
PATIENCE = 10.0
SAVED = "Give the folder that pipe.save_pretrained wrote."


def open_pipeline(model: str, device: str, dtype: str, ddim: bool, steps: int) -> Any:
    """A pipeline that makes images of prompts, on its device, without a progress bar.

    Args:
        model: name of a bundled pipeline, folder of a saved one, or id on the hub.
        device: see `device_of`. dtype: of the networks, as "float32".
        ddim: replace its scheduler by DDIM.
        steps: most steps of a call.

    Raises:
        InvalidArgument: there is no such model or device, or the pipeline takes no prompt, or not so many steps.
        UnsupportedScheduler: its scheduler is not supported.
    """
    place, weights = device_of(device), getattr(torch, dtype)
    if model in zoo.names():
        pipe = zoo.load(model)
    elif Path(model).is_dir():
        folder = Path(model)
        _look_at(ddim, lambda name: _text_of(folder / name), steps)
        pipe = _from_pretrained(model, folder, SAVED, weights)
    else:
        pipe = _from_hub(model, ddim, steps, weights)
    if ddim:
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe = pipe.to(place, weights)
    pipe.set_progress_bar_config(disable=True)
    _check(pipe.scheduler, steps)
    compile(pipe)
    _check_prompt(type(pipe))
    return pipe


def steps_for(pipe: Any, plan: Plan) -> int:
    """The `num_inference_steps` of a call that a plan is for: loops of second order take two turns a step."""
    sequential = compile(pipe, method=SEQUENTIAL)
    turns = plan.num_inference_steps
    for steps in range(turns, 0, -1):
        if sequential.plan_for(num_inference_steps=steps).num_inference_steps == turns:
            return steps
    raise PlanMismatch(
        f"The plan is for {turns} network calls, and there is no number of steps with which the loop of "
        f"{type(pipe).__name__} makes so many. Write a plan of this model by srds-fast plan --save FILE."
    )


def _from_hub(model: str, ddim: bool, steps: int, dtype: torch.dtype) -> Any:
    """The pipeline of an id on the hub: as it is there now, or as it was last downloaded if the hub is out of reach."""
    offline: str | None = None
    try:
        huggingface_hub.model_info(model, timeout=PATIENCE)
    except GatedRepoError as error:
        raise InvalidArgument(
            f"The hub lets only some accounts read {model!r}. Ask for access on its page there, and log in: hf auth "
            "login."
        ) from error
    except RepositoryNotFoundError as error:
        raise InvalidArgument(
            f"There is no model {model!r}: it is no folder here, and the hub has none that you may read. Look at the "
            "spelling, or log in if it is private: hf auth login."
        ) from error
    except Exception as error:  # no network, no DNS, HF_HUB_OFFLINE, a proxy: what it raises depends on which
        offline = "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else _first_line(error)

    def text_of(name: str) -> str | None:
        try:
            path = huggingface_hub.hf_hub_download(model, name, local_files_only=offline is not None)
        except Exception:  # it has none, or it cannot be reached
            return None
        return _text_of(Path(path))

    if offline is not None and text_of("model_index.json") is None:
        raise InvalidArgument(
            f"The model {model!r} was not found: it is no folder here, it was not downloaded before, and the hub "
            f"cannot be reached ({offline}). Connect to the internet, or give the folder of a saved pipeline."
        )
    _look_at(ddim, text_of, steps)
    return _from_pretrained(model, model, "Look at its page on the hub.", dtype, local_files_only=offline is not None)


def _from_pretrained(
    model: str, place: str | Path, advice: str, dtype: torch.dtype, local_files_only: bool = True
) -> Any:
    try:
        return diffusers.DiffusionPipeline.from_pretrained(place, torch_dtype=dtype, local_files_only=local_files_only)
    except Exception as error:  # what damaged files raise depends on which of them is damaged
        raise InvalidArgument(f"The pipeline in {model} cannot be loaded: {error} {advice}") from error


def _look_at(ddim: bool, text_of: Callable[[str], str | None], steps: int) -> None:
    """Raise what `open_pipeline` would, from the configurations of pipeline and scheduler alone.

    Whatever cannot be read here is left to the loading.
    """
    kind = _class_of(text_of("model_index.json"))
    if kind is not None:
        _check_prompt(kind)
    text = text_of("scheduler/scheduler_config.json")
    scheduler = diffusers.DDIMScheduler if ddim else _class_of(text)
    if text is None or scheduler is None:
        return
    try:
        made = scheduler.from_config(json.loads(text))
    except Exception:  # as above
        return
    _check(made, steps)


def _text_of(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return None


def _class_of(config: str | None) -> Any:
    """The class of diffusers that a configuration names; None if it names none."""
    try:
        return getattr(diffusers, json.loads(config or "{}")["_class_name"], None)
    except (ValueError, KeyError, TypeError):
        return None


def _check(scheduler: Any, steps: int) -> None:
    check_scheduler(scheduler)
    trained = scheduler.config.get("num_train_timesteps")
    if trained is not None and steps > trained:
        raise InvalidArgument(f"{steps} steps are too many. The model was trained with {trained}. Ask for fewer.")


def _check_prompt(kind: Any) -> None:
    if "prompt" not in inspect.signature(kind.__call__).parameters:
        raise InvalidArgument(f"{kind.__name__} takes no prompt. Give a text-to-image pipeline.")


def _first_line(error: Exception) -> str:
    """Why, in one line: what the library writes after it is advice for programs."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(". ")[:200]
