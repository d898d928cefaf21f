"""The arguments of `srds-fast`. Nothing here imports torch, so that help is quick."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from .. import __version__


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; `command` is the name of the subcommand."""
    top = argparse.ArgumentParser(
        prog="srds-fast",
        description="Parallel-in-time diffusion sampling: SRDS reaches the image of the sequential sampler after fewer "
        "waves. A wave is one batched network call.",
        epilog="Start with `srds-fast demo`, which needs no download. `srds-fast COMMAND --help` has examples.",
    )
    top.add_argument("--version", action="version", version=f"srds-fast {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for add in (_demo, _generate, _compare, _plan, _env):
        add(commands)
    return top


def _demo(commands: Any) -> None:
    add = _sampling_command(
        commands,
        "demo",
        "show SRDS converging to the sequential images",
        "Samples the prompts with the stock pipeline and with SRDS. Prints waves, rows and the difference after every\n"
        "iteration, says whether this run was faster, and writes a contact sheet and a convergence plot.",
        "demo",
        "demo --coarse-solver ddim --blocks 10 --iterations 6   # as in the paper",
        "demo --device cuda --dtype float16 --steps 200",
    )
    _call(add, POSITIVE, default=100)
    _waves(add)
    _option(add, "--iterations", "P", "iterations to show, past the tolerance too", NATURAL, 4, dest="shown")
    _option(add, "--out", "DIR", "folder to write to", Path, Path("demo-output"))


def _generate(commands: Any) -> None:
    add = _sampling_command(
        commands,
        "generate",
        "write images for prompts",
        "Writes one PNG for every prompt and image. Image i is drawn with seed + i.",
        'generate "the digit three" "the digit seven" --show-report',
        'generate "a lighthouse at dusk" --model ./stable-diffusion --guidance 7.5 --device cuda --dtype float16',
        'generate "the digit one" --exact --out exact',
        'generate "the digit two" --profile trace.json',
    )
    add("prompts", nargs="+", metavar="PROMPT", help="what to draw")
    _option(add, "--steps", "N", "steps of the sequential sampler", POSITIVE, 50)
    _option(add, "--guidance", "W", "guidance scale (the pipeline's own)", float)
    _option(add, "--negative-prompt", "TEXT", "what not to draw")
    _option(add, "--images-per-prompt", "K", "images of each prompt", POSITIVE, 1)
    _settings(add)
    _option(add, "--out", "DIR", "folder to write to", Path, Path("generated"))
    add("--show-report", action="store_true", help="print the whole report of the run")


def _compare(commands: Any) -> None:
    add = _sampling_command(
        commands,
        "compare",
        "measure step counts and methods side by side",
        "Prints waves, rows, difference to the stock pipeline, and seconds as a ratio to the sequential loop.\n"
        "On a CPU the full comparison takes minutes; name fewer steps or methods to make it shorter.",
        "compare",
        "compare --steps 50 --methods sequential,srds,exact",
        "compare --device cuda --calls 5 --json compare.json",
    )
    _call(add, _numbers, "N,N,...", default="25,50,100")
    about = (
        "methods by name, a wrong one lists all; paper: SRDS as published; auto: the fastest here; exact: srds run "
        "until it is the sequential result, ten times the rows at 100 steps"
    )
    _option(add, "--methods", "NAME,...", about, _names, "sequential,paper,srds,collocation")
    _option(add, "--calls", "R", "calls of each method, of which the fastest counts", POSITIVE, 2)
    _option(add, "--json", "FILE", "also write the table and all versions to FILE", Path)


def _plan(commands: Any) -> None:
    add = _sampling_command(
        commands,
        "plan",
        "print the plan of a call, and why it is the fastest here",
        "With method auto the cost of network calls is measured first: every candidate with its predicted time.",
        "plan --steps 100",
        "plan --steps 50 --plot plan.png",
        "plan --steps 50 --calibrate 8 --save plan.json",
        "plan --steps 100 --blocks 10 --coarse-solver ddim --method srds",
    )
    _call(add, POSITIVE, required=True)
    _settings(add)
    add("--unmeasured", action="store_true", help="run nothing: print the plan that is taken when no costs are known")
    _option(add, "--calibrate", "K", "measure with K samples how many iterations each plan needs", POSITIVE)
    _option(add, "--save", "FILE", "write the plan to FILE, for Plan.load", Path)
    _option(add, "--plot", "FILE", "run the candidates and plot measured over predicted times (PNG)", _picture)


def _env(commands: Any) -> None:
    more = "For bug reports, and to keep with measurements. It imports none of the packages."
    parser = _command(commands, "env", "print versions and hardware", more, "env", "env --json")
    parser.add_argument("--json", action="store_true", help="as JSON")


def _command(commands: Any, name: str, about: str, more: str, *examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.\n{more}",
        epilog="examples:\n" + "".join(f"  srds-fast {line}\n" for line in examples),
        # keeps the examples as they are written, and the column of options narrow
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=30),
    )
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error")
    return parser


def _sampling_command(*args: Any) -> Any:
    parser = _command(*args)
    trace = "write a trace of every call to FILE, for Perfetto or chrome://tracing; the word nvtx: only NVTX ranges"
    _option(parser.add_argument, "--profile", "FILE", trace)
    _option(parser.add_argument, "--seed", "SEED", "seed of the first image; image i has seed + i", int, 0)
    add = parser.add_argument_group("the model").add_argument
    _option(add, "--model", "NAME|DIR", "bundled pipeline, or a folder that pipe.save_pretrained wrote", str, "digits")
    _option(add, "--device", "DEVICE", "auto, cpu, cuda, cuda:1", str, "auto")
    dtypes = ["float16", "bfloat16", "float32", "float64"]
    _option(add, "--dtype", "DTYPE", f"dtype of the networks: {', '.join(dtypes)}", str, "float32", choices=dtypes)
    add("--ddim", action="store_true", help="replace the model's scheduler by DDIM")
    return parser.add_argument


def _call(add: Any, steps: Any, metavar: str = "N", **more: Any) -> None:
    """What is asked of a call: steps, prompts and guidance."""
    about = "step counts" if steps is _numbers else "steps of the sequential sampler"
    _option(add, "--steps", metavar, about, steps, **more)
    _option(add, "--prompt", "TEXT", "what to draw; repeat it for more images (the ten digits)", action="append")
    _option(add, "--guidance", "W", "guidance scale", float, 3.0)


def _settings(add: Any) -> None:
    _option(add, "--method", "METHOD", "name of a method, or auto; a name that is wrong lists all", str, "auto")
    bound = "bound of the mean absolute difference to the sequential latents, per sample"
    _option(add, "--tolerance", "T", bound, float, 4e-3)
    add("--exact", action="store_true", help="run until the result is the sequential one")
    _option(add, "--iterations", "P", "iterations at most", NATURAL, dest="max_iterations")
    _waves(add)


def _waves(add: Any) -> None:
    blocks = "number of blocks that the steps are cut into (chosen by the plan)"
    _option(add, "--blocks", "B", blocks, POSITIVE, dest="num_blocks")
    _option(add, "--coarse-solver", "G", "2m, ddim or auto", str, "auto")
    _option(add, "--in-flight", "K", "iterations of srds that run at the same time (chosen by the plan)", POSITIVE)
    _option(add, "--max-rows", "R", "most rows in a wave; memory grows with it", POSITIVE)


def _option(add: Any, flag: str, metavar: str, about: str, type: Any = str, default: Any = None, **more: Any) -> None:
    """Add an option that takes a value. argparse converts a default that is a string as if a user had typed it."""
    shown = about if default is None else f"{about} (%(default)s)"
    add(flag, metavar=metavar, help=shown, type=type, default=default, **more)


def _whole(text: str, least: int) -> int:
    if text.strip().isdecimal() and int(text) >= least:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, {least} or more")


POSITIVE = partial(_whole, least=1)
NATURAL = partial(_whole, least=0)


def _picture(text: str) -> Path:
    if Path(text).suffix.lower() == ".png":
        return Path(text)
    raise argparse.ArgumentTypeError(f"{text!r} does not end in .png: plots are written as PNG")


def _numbers(text: str) -> list[int]:
    return [POSITIVE(part) for part in _names(text)]


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]
