"""The command `srds-fast`: arguments, and what becomes of errors. torch is imported only once there is work."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from .._version import __version__
from ..errors import SrdsFastError
from .environment import environment

USER_MISTAKE = 2
INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit code: 0, 2 after a mistake of the user's, 130 after Ctrl-C.
    """
    args = _parser().parse_args(argv)
    try:
        with _profiled(args):
            args.run(args)
    except KeyboardInterrupt:
        print("srds-fast: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (SrdsFastError, OSError) as error:
        if args.verbose:
            traceback.print_exc()
        print(f"srds-fast: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_MISTAKE
    return 0


def _profiled(args: argparse.Namespace) -> AbstractContextManager[None]:
    setting = getattr(args, "profile", None)
    if setting is None:
        return nullcontext()
    from ..telemetry import profile_as

    return profile_as(setting)


def _demo(args: argparse.Namespace) -> None:
    from .demo import demo

    demo(args)


def _generate(args: argparse.Namespace) -> None:
    from .commands import generate

    generate(args)


def _compare(args: argparse.Namespace) -> None:
    from .commands import comparison

    comparison(args)


def _plan(args: argparse.Namespace) -> None:
    from .planning import plan

    plan(args)


def _env(args: argparse.Namespace) -> None:
    found = environment()
    if args.json:
        print(json.dumps(found, indent=2))
        return
    devices = found.pop("cuda_devices")
    lines = {name: "not installed" if value is None else value for name, value in found.items()}
    for number, device in enumerate(devices):
        lines[f"cuda:{number}"] = "{name}, driver {driver}, {memory_mib} MiB".format(**device)
    if not devices:
        lines["cuda"] = "no device"
    for name, value in lines.items():
        print(f"{name:<14}{value}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="srds-fast",
        description="Diffusion sampling parallel in time (SRDS): the sequential sampler's image after fewer waves, a "
        "wave being one batched network call.",
        epilog="Start with `srds-fast demo`, which needs no download. `srds-fast COMMAND --help` has examples.",
    )
    parser.add_argument("--version", action="version", version=f"srds-fast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str,
        run: Callable[[argparse.Namespace], None],
        about: str,
        more: str,
        examples: str,
        *,
        runs: bool = True,
    ) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.\n{more}",
            epilog="examples:\n" + "".join(f"  srds-fast {line}\n" for line in examples.splitlines()),
            formatter_class=_HelpFormatter,
        )
        added.add_argument("--verbose", action="store_true", help="show the traceback of an error")
        if runs:
            added.add_argument(
                "--profile",
                metavar="FILE",
                help="write what every call does to FILE, a trace for Perfetto or chrome://tracing; "
                "the word nvtx: ranges for Nsight alone",
            )
        added.set_defaults(run=run)
        return added

    demo = command(
        "demo",
        _demo,
        "show SRDS converging to the sequential images",
        "Samples the prompts with the stock pipeline and with SRDS, prints waves, rows and the difference after every\n"
        "iteration, says whether this run was faster, and writes a contact sheet and a convergence plot.",
        "demo\n"
        "demo --coarse-solver ddim --blocks 10 --iterations 6   # the paper's choice\n"
        "demo --device cuda --dtype float16 --steps 200",
    )
    _add_model(demo)
    _add_prompt(demo)
    _add_sampling(demo, steps=100, guidance=3.0)
    _add_blocks(demo)
    demo.add_argument(
        "--iterations",
        type=_natural,
        default=4,
        metavar="P",
        help="iterations to show, whatever the tolerance says (4)",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("demo-output"), metavar="DIR", help="where to write (demo-output)"
    )

    generate = command(
        "generate",
        _generate,
        "write images for prompts",
        "One PNG for every prompt and image; image i is drawn with seed + i.",
        'generate "the digit three" "the digit seven" --show-report\n'
        'generate "a lighthouse at dusk" --model ./stable-diffusion --guidance 7.5 --device cuda --dtype float16\n'
        'generate "the digit one" --exact --out exact\n'
        'generate "the digit two" --profile trace.json',
    )
    generate.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to draw")
    _add_model(generate)
    _add_sampling(generate, steps=50, guidance=None)
    generate.add_argument("--negative-prompt", metavar="TEXT", help="what not to draw")
    generate.add_argument(
        "--images-per-prompt", type=_positive, default=1, metavar="K", help="images of each prompt (1)"
    )
    _add_settings(generate)
    generate.add_argument(
        "--out", type=Path, default=Path("generated"), metavar="DIR", help="where to write (generated)"
    )
    generate.add_argument("--show-report", action="store_true", help="print the whole report of the run")

    compare = command(
        "compare",
        _compare,
        "measure step counts and methods side by side",
        "Waves, rows, difference to the stock pipeline, and seconds as a ratio to the sequential loop.\n"
        "On a CPU the full comparison takes minutes; name fewer steps or methods for less.",
        "compare\n"
        "compare --steps 50 --methods sequential,srds,exact\n"
        "compare --device cuda --calls 5 --json compare.json",
    )
    _add_model(compare)
    _add_prompt(compare)
    compare.add_argument(
        "--steps", type=_numbers, default=[25, 50, 100], metavar="N,N,...", help="step counts (25,50,100)"
    )
    compare.add_argument(
        "--methods",
        type=_names,
        default=["sequential", "paper", "srds", "collocation"],
        metavar="NAME,...",
        help="sequential; paper: SRDS as published; srds and collocation: our defaults; parataa; paradigms; chords; "
        "auto: the fastest here; exact: srds until it is the sequential result, ten times the rows at 100 steps "
        "(the first four)",
    )
    compare.add_argument(
        "--calls", type=_positive, default=2, metavar="R", help="of each method; the fastest counts (2)"
    )
    _add_guidance_and_seed(compare, 3.0)
    compare.add_argument("--json", type=Path, metavar="FILE", help="write the table and all versions here as well")

    plan = command(
        "plan",
        _plan,
        "print the plan of a call, and why it is the fastest here",
        "With method auto the cost of network calls is measured first: every candidate with its predicted time.",
        "plan --steps 100\nplan --steps 50 --plot plan.png\nplan --steps 50 --calibrate 8 --save plan.json\n"
        "plan --steps 100 --blocks 10 --coarse-solver ddim --method srds",
    )
    plan.add_argument("--steps", type=_positive, required=True, metavar="N", help="steps of the sequential sampler")
    _add_model(plan)
    _add_settings(plan)
    plan.add_argument("--prompt", action="append", metavar="TEXT", help="of the calls to come; several times for more")
    _add_guidance_and_seed(plan, 3.0)
    plan.add_argument("--unmeasured", action="store_true", help="run nothing: what is taken where nothing is known")
    plan.add_argument(
        "--calibrate", type=_positive, metavar="K", help="measure with K samples how many iterations each plan needs"
    )
    plan.add_argument("--save", type=Path, metavar="FILE", help="write the plan here, for Plan.load")
    plan.add_argument(
        "--plot", type=Path, metavar="FILE", help="run the candidates and plot measured over predicted times (PNG)"
    )

    env = command(
        "env",
        _env,
        "print versions and hardware",
        "For bug reports and beside measurements. No package is imported for it.",
        "env\nenv --json",
        runs=False,
    )
    env.add_argument("--json", action="store_true", help="as JSON")
    return parser


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps examples as they are written, and the option column narrow enough to read."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--model",
        default="digits",
        metavar="NAME|DIR",
        help="bundled pipeline, or a folder that pipe.save_pretrained wrote (digits)",
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (auto)")
    group.add_argument(
        "--dtype",
        default="float32",
        choices=["float16", "bfloat16", "float32", "float64"],
        metavar="DTYPE",
        help="of the networks: float16, bfloat16, float32, float64 (float32)",
    )
    group.add_argument(
        "--ddim",
        action="store_true",
        help="put DDIM in the place of the model's scheduler (PNDM, UniPC and their like)",
    )


def _add_prompt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="what to draw; repeat for more images (ten digits)"
    )


def _add_sampling(parser: argparse.ArgumentParser, steps: int, guidance: float | None) -> None:
    parser.add_argument(
        "--steps", type=_positive, default=steps, metavar="N", help=f"steps of the sequential sampler ({steps})"
    )
    _add_guidance_and_seed(parser, guidance)


def _add_guidance_and_seed(parser: argparse.ArgumentParser, guidance: float | None) -> None:
    default = "the pipeline's own" if guidance is None else f"{guidance:g}"
    parser.add_argument("--guidance", type=float, default=guidance, metavar="W", help=f"guidance scale ({default})")
    parser.add_argument("--seed", type=int, default=0, help="of the first image; image i has seed + i (0)")


def _add_blocks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--blocks", type=_positive, metavar="B", help="blocks the steps are cut into (the plan's choice)"
    )
    parser.add_argument("--coarse-solver", default="auto", metavar="G", help="2m, ddim or auto (auto)")
    parser.add_argument(
        "--in-flight", type=_positive, metavar="K", help="iterations of srds under way at once (the plan's choice)"
    )
    parser.add_argument("--max-rows", type=_positive, metavar="R", help="widest wave allowed; memory grows with it")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--method", default="auto", help="srds, collocation, parataa, paradigms, chords, sequential or auto (auto)"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=4e-3,
        metavar="T",
        help="bound of the mean absolute difference to the sequential latents, per sample (0.004)",
    )
    parser.add_argument("--exact", action="store_true", help="run until the result is the sequential one")
    parser.add_argument("--iterations", type=_natural, metavar="P", help="iterations at most")
    _add_blocks(parser)


def _positive(text: str) -> int:
    return _whole(text, 1)


def _natural(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, {least} or more")
    return number


def _numbers(text: str) -> list[int]:
    return [_positive(part) for part in _names(text)]


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]
