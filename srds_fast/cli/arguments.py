"""The arguments of `srds-fast`. Nothing here imports torch, so that help and slips of the pen are answered at once."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__

USER_MISTAKE = 2
# a name for --method and --exact together
EXACT = "exact"
# where --json writes if no file is named
STDOUT = "-"
EXIT_CODES = """\
exit codes:
  0    done
  1    the run failed: for example, the network returned NaN
  2    a wrong argument, model or file; one line on stderr says what to do
  130  ended by Ctrl-C
"""


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command line; `command` is the name of the subcommand. Ends the process after a mistake."""
    top, commands = _parsers()
    if not any(word in ("-h", "--help", "--version") or not word.startswith("-") for word in argv):
        top.error(f"No command was given. Use one of {', '.join(commands)}.")
    first = next((word for word in argv if not word.startswith("-")), None)
    if first is not None and first not in commands:
        top.error(f"There is no command {first!r}.{did_you_mean(first, commands)} Known are {', '.join(commands)}.")
    args, unknown = top.parse_known_args(argv)
    command = commands[args.command]
    if unknown:
        command.error(_about(unknown[0], command))
    if (why := contradiction(args)) is not None:
        command.error(why)
    return args


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """A question with the known name that is nearest, and a space before it; empty if none is near."""
    near = difflib.get_close_matches(given.lower(), list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""


def contradiction(args: argparse.Namespace) -> str | None:
    """Why some arguments cannot stand together; None if all can."""
    given = {name for name, value in vars(args).items() if value is not None and value is not False}
    if vars(args).get("method") == EXACT:
        given.add("exact")
    if "exact" in given and "tolerance" in given:
        return "--exact and --tolerance were given. An exact run has no tolerance. Leave one of the two out."
    if "exact" in given and "max_iterations" in given:
        return "--exact and --iterations were given. An exact run takes the iterations it needs. Leave one of them out."
    if "plan" in given:
        # compare measures a plan beside the methods that it is given
        fixed = {"steps": "--steps", **FIXED_BY_A_PLAN}
        if args.command == "compare":
            fixed = {"steps": "--steps"}
        if args.command == "serve":  # some loops take more turns than steps, so the steps may be given too
            del fixed["steps"]
        for name, flag in fixed.items():
            if name in given:
                return f"--plan and {flag} were given. The plan fixes it already. Leave one of the two out."
    if args.command == "serve":
        for name, flag in NEED_RAY.items():
            if name in given and "local" in given:
                return f"--local and {flag} were given. --local serves without Ray. Leave one of the two out."
    if "unmeasured" in given:
        for name in ("plot", "calibrate"):
            if name in given:
                return f"--unmeasured and --{name} were given. --{name} measures. Leave one of the two out."
    if args.command == "demo" and "shown" in given and "method" not in given:
        return "--iterations was given without --method. It shows the iterations of one method. Add --method srds."
    return None


# settings of a call, and how they are spelled
FIXED_BY_A_PLAN = {
    "method": "--method",
    "tolerance": "--tolerance",
    "exact": "--exact",
    "max_iterations": "--iterations",
    "num_blocks": "--blocks",
    "coarse_solver": "--coarse-solver",
    "in_flight": "--in-flight",
    "max_rows": "--max-rows",
    "same": "--same",
}

# what `serve --local` does not do
NEED_RAY = {
    "replicas": "--replicas",
    "devices_per_replica": "--devices-per-replica",
    "print_config": "--print-config",
}


class _Parser(argparse.ArgumentParser):
    """It complains in one line, as the commands do."""

    def error(self, message: str) -> NoReturn:
        message = message if message.endswith((".", "?")) else f"{message}."
        self.exit(USER_MISTAKE, f"srds-fast: {message} See `{self.prog} --help`.\n")


def _about(unknown: str, command: argparse.ArgumentParser) -> str:
    if not unknown.startswith("-"):
        return f"{unknown!r} is no option. A prompt is given as --prompt {unknown!r}."
    flag = unknown.partition("=")[0]
    known = [each for action in command._actions for each in action.option_strings]
    return f"`{command.prog}` has no option {flag}.{did_you_mean(flag, known)}"


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser of the whole command line, and those of the subcommands by name."""
    top = _Parser(
        prog="srds-fast",
        description="Runs a diffusion sampler parallel in time: the same image in fewer waves. A wave is one batched "
        "call of the network.",
        epilog="Start with `srds-fast demo`, which needs no download. `srds-fast COMMAND --help` shows an example.\n\n"
        + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"srds-fast {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for add in (_demo, _generate, _compare, _plan, _serve, _env):
        add(commands)
    return top, commands.choices


def _demo(commands: Any) -> None:
    add = _sampling_command(
        commands,
        "demo",
        "show what this machine gains",
        "Times one image and one decision of a robot policy against the loops of these models, in turn, and says when\n"
        "the first calls have paid back. Writes a contact sheet and a plot of the image. With --method it shows how\n"
        "that method converges, iteration by iteration.",
        "demo",
        "demo --method srds --batch 10      # every iteration of ten digits",
    )
    _call(add)
    _method(add)
    _waves(add)
    _option(add, "--batch", "K", "images in one call; prompts are used in turn (1, or one for each --prompt)", POSITIVE)
    _option(add, "--iterations", "P", "with --method: iterations to show, past the tolerance too (4)", NATURAL, "shown")
    _option(add, "--out", "DIR", "folder to write to (demo-output)", Path, default=Path("demo-output"))


def _generate(commands: Any) -> None:
    add = _sampling_command(
        commands,
        "generate",
        "write images for prompts",
        "Writes one PNG for every prompt and image. Image i is drawn with seed + i.",
        'generate --prompt "the digit three" --prompt "the digit seven" --show-report',
        'generate --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompt "a lighthouse" --device cuda',
        "generate --plan plan.json --prompts prompts.txt",
    )
    _call(add)
    _option(add, "--negative-prompt", "TEXT", "what not to draw")
    _option(add, "--images-per-prompt", "K", "images of each prompt (1)", POSITIVE, default=1)
    _settings(add)
    _option(add, "--plan", "FILE", "run the plan that `srds-fast plan --save FILE` wrote", Path)
    _option(add, "--out", "DIR", "folder to write to (generated)", Path, default=Path("generated"))
    add("--show-report", action="store_true", help="print the whole report of the run")


def _compare(commands: Any) -> None:
    add = _sampling_command(
        commands,
        "compare",
        "measure step counts and methods side by side",
        "Prints waves, rows, the difference to the pipeline's own images, and seconds as a ratio to the sequential\n"
        "loop. On a CPU the whole comparison takes minutes: name fewer steps or methods to make it shorter.",
        "compare --steps 25,50 --method sequential --method srds --method auto",
        "compare --plan plan.json --method auto",
    )
    _call(add, numbers=True)
    _method(add, several=True)
    _option(add, "--tolerance", "T", TOLERANCE, _number)
    _same(add)
    _option(add, "--plan", "FILE", "also measure the plan that `srds-fast plan --save FILE` wrote", Path)
    _option(add, "--calls", "R", "calls of each method, of which the fastest counts (2)", POSITIVE, default=2)


def _plan(commands: Any) -> None:
    add = _sampling_command(
        commands,
        "plan",
        "print the plan of a call, and why it is the fastest here",
        "Without --method it first measures what calls of the network cost, and shows every candidate with its\n"
        "predicted time. `generate --plan FILE` and `compare --plan FILE` run a saved plan.",
        "plan --steps 50 --save plan.json",
        "plan --steps 50 --calibrate 8 --plot plan.png",
    )
    _call(add)
    _settings(add)
    add("--unmeasured", action="store_true", help="run nothing: print the plan that is taken when no costs are known")
    _option(add, "--calibrate", "K", "measure with K samples how many iterations each plan needs", POSITIVE)
    _option(add, "--save", "FILE", "write the plan to FILE", Path)
    _option(add, "--plot", "FILE", "run the candidates and plot measured and predicted times (PNG)", _picture)


def _serve(commands: Any) -> None:
    parser = _command(
        commands,
        "serve",
        "serve a model over HTTP, as OpenAI's images API",
        "It warms up, and then answers POST /v1/images/generations, one call after another on each device. There is a\n"
        "page at /. It runs on Ray Serve, or with --local in this process alone. It needs `pip install\n"
        "'srds-fast[serve]'`. GUIDE.md has its answers, limits and security.",
        "serve --local",
        "serve --model stable-diffusion-v1-5/stable-diffusion-v1-5 --sizes 512x512 --steps 50,100 --device cuda",
        "serve --replicas 4 --print-config      # what `serve deploy` of Ray takes on a cluster",
    )
    _model(parser)
    add = parser.add_argument_group("what is served").add_argument
    _option(add, "--steps", "N,N,...", "step counts that requests may ask for; the first is the default (50)", _numbers)
    about = "sizes that requests may ask for; the first is the default (the pipeline's own size alone)"
    _option(add, "--sizes", "WxH,...", about, _names)
    about = "guidance scales that requests may ask for; the first is the default (3 for a bundled pipeline)"
    _option(add, "--guidance", "W,W,...", about, lambda text: [_number(part) for part in _names(text)])
    add("--negative-prompts", action="store_true", help="requests may have a negative prompt; warms up for these too")
    _option(add, "--tolerance", "T", TOLERANCE, _number)
    about = "adaptive, or constant: all calls of a kind take the same waves (adaptive)"
    _option(add, "--latency", "KIND", about, partial(_one_of, known=["adaptive", "constant"]))
    _option(add, "--plan", "FILE", "run the plan that `srds-fast plan --save FILE` wrote", Path)
    add = parser.add_argument_group("where it runs").add_argument
    add("--local", action="store_true", help="in this process, without Ray, on one device")
    _option(add, "--replicas", "K|auto", "copies of the model; auto: one for each device (auto)", _replicas)
    _option(add, "--devices-per-replica", "G", "devices that make each image together (1)", POSITIVE)
    about = "requests that wait: adaptive (they share a call where that is faster), never, sequential (adaptive)"
    _option(add, "--batching", "KIND", about)
    about = "images of a call, at most and on the way there; auto: those of 1,2,4,8 that make more a second (auto)"
    _option(add, "--batch-sizes", "K,K,...", about, lambda text: text if text == "auto" else _numbers(text))
    add("--print-config", action="store_true", help="print a configuration for `serve deploy`, and serve nothing")
    add = parser.add_argument_group("who may ask, and for how much").add_argument
    _option(add, "--host", "HOST", "where it listens (127.0.0.1: this machine alone)")
    _option(add, "--port", "PORT", "0: any free one (8000)", _port)
    _option(add, "--api-key-file", "FILE", "file with one key a line, of which requests must carry one", Path)
    _option(add, "--max-images", "K", "images of a request (4)", POSITIVE)
    _option(add, "--max-prompt-chars", "K", "characters of a prompt (4000)", POSITIVE)
    _option(add, "--max-queue", "K", "requests that wait for each replica; others are refused (64)", NATURAL)
    _option(add, "--request-seconds", "S", "time limit of a request (120)", _seconds)
    _option(add, "--drain-seconds", "S", "how long it goes on with its requests when it is told to end (30)", _seconds)


def _env(commands: Any) -> None:
    more = "For bug reports, and to keep with measurements. It imports none of the packages."
    _command(commands, "env", "print versions and hardware", more, "env --json")


def _command(commands: Any, name: str, about: str, more: str, *examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.\n{more}",
        epilog="examples:\n" + "".join(f"  srds-fast {line}\n" for line in examples),
        # keeps the examples as they are written, and the column of options narrow
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=30),
        allow_abbrev=False,
    )
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error")
    about = "print JSON on stdout and all else on stderr; with FILE, write the JSON there"
    parser.add_argument("--json", nargs="?", const=STDOUT, metavar="FILE", help=about)
    return parser


def _sampling_command(*args: Any) -> Any:
    parser = _command(*args)
    trace = "write a trace of every call to FILE, for Perfetto or chrome://tracing; the word nvtx: only NVTX ranges"
    _option(parser.add_argument, "--profile", "FILE", trace)
    _model(parser)
    return parser.add_argument


def _model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the model").add_argument
    about = "name of a bundled pipeline, folder of a saved one, or id on the Hugging Face hub (digits)"
    _option(add, "--model", "NAME|DIR|ID", about, default="digits")
    _option(add, "--device", "DEVICE", "auto, cpu, cuda, cuda:1 (auto)", default="auto")
    dtypes = ["float16", "bfloat16", "float32", "float64"]
    about = f"dtype of the networks: {', '.join(dtypes)} (float32)"
    _option(add, "--dtype", "DTYPE", about, partial(_one_of, known=dtypes), default="float32")
    add("--ddim", action="store_true", help="replace the model's scheduler by DDIM")


def _call(add: Any, numbers: bool = False) -> None:
    """What is asked of a call: prompts, steps, guidance, seed."""
    _option(add, "--prompt", "TEXT", "what to draw; repeat it for more images", action="append")
    _option(add, "--prompts", "FILE", "text file with one prompt a line; they come after those of --prompt", Path)
    if numbers:
        _option(add, "--steps", "N,N,...", "step counts (25,50,100)", _numbers)
    else:
        _option(add, "--steps", "N", "steps of the sequential sampler (50)", POSITIVE)
    about = "guidance scale (3 for a bundled pipeline, else the pipeline's own)"
    _option(add, "--guidance", "W", about, _number)
    _option(add, "--seed", "SEED", "seed of the first image; image i has seed + i (0)", _seed, default=0)


TOLERANCE = "bound of the mean absolute difference to the sequential latents, per sample (0.004, half a grey level)"


def _method(add: Any, several: bool = False) -> None:
    about = "auto: the fastest here; or a method, such as srds (an unknown name lists all)"
    if several:
        _option(add, "--method", "NAME", f"{about}; repeat it to compare several", _names, action="extend")
    else:
        _option(add, "--method", "NAME", f"{about} (auto)")


def _settings(add: Any) -> None:
    _method(add)
    _option(add, "--tolerance", "T", TOLERANCE, _number)
    add("--exact", action="store_true", help="run until the result is the sequential one")
    _option(add, "--iterations", "P", "iterations at most", NATURAL, "max_iterations")
    _same(add)
    _waves(add)


def _same(add: Any) -> None:
    about = "what auto keeps of the sequential sampler where it adds noise: its sample, or only its law (sample)"
    _option(add, "--same", "KIND", about, partial(_one_of, known=["sample", "law"]))


def _waves(add: Any) -> None:
    about = "of srds: number of blocks that the steps are cut into (chosen by the plan)"
    _option(add, "--blocks", "B", about, POSITIVE, "num_blocks")
    _option(add, "--coarse-solver", "G", "of srds: the jump across a block, 2m, ddim or auto (auto)")
    _option(add, "--in-flight", "K", "of srds: iterations that run at the same time (chosen by the plan)", POSITIVE)
    _option(add, "--max-rows", "R", "most rows, evaluations of the network, in a wave; memory grows with it", POSITIVE)


def _option(
    add: Any, flag: str, metavar: str, about: str, type: Any = str, dest: str | None = None, **more: Any
) -> None:
    """Add an option that takes a value. What was not given is None, so that it is known what was given."""
    named = {} if dest is None else {"dest": dest}
    add(flag, metavar=metavar, help=about, type=type, **named, **more)


def _whole(text: str, least: int) -> int:
    if text.strip().isdecimal() and int(text) >= least:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, {least} or more.")


POSITIVE = partial(_whole, least=1)
NATURAL = partial(_whole, least=0)


def _seed(text: str) -> int:
    seed = NATURAL(text)
    if seed < 2**62:  # torch takes 64 bits, and later images add to it
        return seed
    raise argparse.ArgumentTypeError(f"{text!r} is too large. Give a seed below 2 to the power of 62.")


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isfinite(number):
        return number
    raise argparse.ArgumentTypeError(f"{text!r} is not a number.")


def _one_of(text: str, known: list[str]) -> str:
    if text in known:
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not known.{did_you_mean(text, known)} Use {', '.join(known)}.")


def _picture(text: str) -> Path:
    if Path(text).suffix.lower() == ".png":
        return Path(text)
    raise argparse.ArgumentTypeError(f"{text!r} does not end in .png. Plots are written as PNG.")


def _numbers(text: str) -> list[int]:
    return [POSITIVE(part) for part in _names(text)]


def _replicas(text: str) -> int | str:
    return text if text == "auto" else POSITIVE(text)


def _port(text: str) -> int:
    if (port := NATURAL(text)) < 2**16:
        return port
    raise argparse.ArgumentTypeError(f"{text!r} is no port. Ports end at 65535.")


def _seconds(text: str) -> float:
    if (seconds := _number(text)) > 0:
        return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0.")


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]
