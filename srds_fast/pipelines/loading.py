"""From the name of a model to a pipeline. What its small files tell is checked before its weights are read."""

from __future__ import annotations

import inspect
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
        _look_at(model, ddim, steps)
        pipe = _from_pretrained(model, Path(model), SAVED, weights)
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

    local = offline is not None
    if local and _config_of(diffusers.DiffusionPipeline, model) is None:
        raise InvalidArgument(
            f"The model {model!r} was not found: it is no folder here, it was not downloaded before, and the hub "
            f"cannot be reached ({offline}). Connect to the internet, or give the folder of a saved pipeline."
        )
    _look_at(model, ddim, steps, local)
    return _from_pretrained(model, model, "Look at its page on the hub.", dtype, local)


def _from_pretrained(
    model: str, place: str | Path, advice: str, dtype: torch.dtype, local_files_only: bool = True
) -> Any:
    try:
        return diffusers.DiffusionPipeline.from_pretrained(place, torch_dtype=dtype, local_files_only=local_files_only)
    except Exception as error:  # what damaged files raise depends on which of them is damaged
        raise InvalidArgument(f"The pipeline in {model} cannot be loaded: {error} {advice}") from error


def _look_at(model: str, ddim: bool, steps: int, local: bool = True) -> None:
    """Raise what `open_pipeline` would, from the configurations of pipeline and scheduler alone.

    Whatever cannot be read here is left to the loading.
    """
    kind = _class_of(_config_of(diffusers.DiffusionPipeline, model, local))
    if kind is not None:
        _check_prompt(kind)
    config = _config_of(diffusers.DDIMScheduler, model, local, "scheduler")
    scheduler = diffusers.DDIMScheduler if ddim else _class_of(config)
    if config is None or scheduler is None:
        return
    try:
        made = scheduler.from_config(config)
    except Exception:  # as above
        return
    _check(made, steps)


def _config_of(kind: Any, model: str, local: bool = True, folder: str | None = None) -> dict[str, Any] | None:
    """The configuration in a folder of the model, under the name of this kind; None if there is none to be read."""
    try:
        found: dict[str, Any] = kind.load_config(model, local_files_only=local, subfolder=folder)
    except Exception:  # as above
        return None
    return found


def _class_of(config: dict[str, Any] | None) -> Any:
    """The class of diffusers that a configuration names; None if it names none."""
    name = (config or {}).get("_class_name")
    return getattr(diffusers, name, None) if isinstance(name, str) else None


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
