"""The command `srds-fast`: what it prints, writes and answers to mistakes."""

from __future__ import annotations

import json
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import numpy as np
import pytest
import safetensors
import tiny
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, HeunDiscreteScheduler, RePaintScheduler, configuration_utils
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError
from PIL import Image

import srds_fast
import srds_fast.cli.generate
from srds_fast.cli import FAILED, INTERRUPTED, demo, main
from srds_fast.cli.arguments import USER_MISTAKE, parsed
from srds_fast.errors import DivergenceError

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
PROMPTS = ["--prompt", "a", "--prompt", "b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    where = tmp_path_factory.mktemp("model")
    tiny.stable_diffusion().save_pretrained(where)
    return str(where)


def stock_images(prompts: list[str], steps: int, **options: Any) -> list[np.ndarray]:
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    call = tiny.stable_diffusion()(prompts, num_inference_steps=steps, generator=generators, **options)
    return [np.asarray(image, dtype=int) for image in call.images]


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"), dtype=int)


def complaint(capsys: Capture) -> str:
    """The one line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("srds-fast: ")
    return lines[0]


def cells(out: str, heading: str) -> list[list[str]]:
    """The rows of all tables whose heading starts with a word. A table ends with an empty line or the output."""
    tables = re.findall(rf"^{heading} .*\n((?:.+\n)+)", out, flags=re.MULTILINE)
    return [line.split() for table in tables for line in table.splitlines()]


@pytest.mark.parametrize("command", ["demo", "generate", "compare", "plan", "serve", "env"])
def test_help_teaches_by_example(command: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    examples = shown.split("examples:\n")[1]
    assert all(line.startswith(f"  srds-fast {command}") for line in examples.splitlines())
    # the same in every command
    assert "--json [FILE]" in shown
    if command not in ("env", "serve"):
        for spelling in ("--model NAME|DIR|ID", "--prompt TEXT", "--prompts FILE", "--steps N", "--method NAME"):
            assert spelling in shown


@pytest.mark.parametrize("command", ["demo", "generate", "compare", "plan", "serve"])
def test_examples_are_commands(command: str, capsys: Capture) -> None:
    """The parser takes what help shows."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    for line in capsys.readouterr().out.split("examples:\n")[1].splitlines():
        assert parsed(shlex.split(line, comments=True)[1:]).command == command


def test_help_tells_the_exit_codes(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    codes = re.findall(r"^  (\d+) ", capsys.readouterr().out, flags=re.MULTILINE)
    assert codes == ["0", str(FAILED), str(USER_MISTAKE), str(INTERRUPTED)]


USAGE = {
    "": "No command was given. Use one of demo, generate",
    "demp": "There is no command 'demp'. Did you mean demo?",
    "--nonsense": "No command was given",
    "plan --steps 0": "'0' is not a whole number, 1 or more",
    "plan --steps ten": "'ten' is not a whole number, 1 or more",
    "plan --plot plan.jpg": "does not end in .png",
    "plan --unmeasured --plot p.png": "--unmeasured and --plot were given",
    "plan --unmeasured --calibrate 2": "--unmeasured and --calibrate were given",
    "generate a-cat": "A prompt is given as --prompt 'a-cat'",
    "generate --promt a": "no option --promt. Did you mean --prompt?",
    "generate --tolerence=0.1": "no option --tolerence. Did you mean --tolerance?",
    "compare --methods srds": "no option --methods. Did you mean --method?",
    "serve --local --replicas 2": "--local and --replicas were given",
    "serve --plan p.json --tolerance 0.1": "--plan and --tolerance were given",
    "serve --replicas many": "'many' is not a whole number, 1 or more",
    "serve --port 70000": "Ports end at 65535",
    "serve --request-seconds 0": "'0' is not a number above 0",
    "serve --latency low": "'low' is not known",
    "env --jsn": "no option --jsn. Did you mean --json?",
    "generate --tol 0.1": "no option --tol.",
    "generate --prompt": "expected one argument.",
    "generate --tolerance nan": "'nan' is not a number",
    "generate --dtype float8": "'float8' is not known",
    "generate --same lw": "'lw' is not known. Did you mean law? Use sample, law.",
    "demo --same law": "no option --same.",
    "plan --method srds --same": "expected one argument.",
    "generate --plan p.json --same law": "--plan and --same were given",
    "generate --seed 99999999999999999999": "is too large",
    "generate --exact --tolerance 0.1": "--exact and --tolerance were given",
    "plan --method exact --tolerance 0.1": "--exact and --tolerance were given",
    "generate --exact --iterations 0": "--exact and --iterations were given",
    "generate --plan p.json --method srds": "--plan and --method were given",
    "generate --plan p.json --iterations 0": "--plan and --iterations were given",
    "generate --plan p.json --steps 9": "--plan and --steps were given",
    "compare --plan p.json --steps 9": "--plan and --steps were given",
    "demo --iterations 0": "Add --method srds",
}


@pytest.mark.parametrize("line", USAGE)
def test_wrong_usage_is_told_in_one_line(line: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    assert stop.value.code == 2
    told = complaint(capsys)
    assert USAGE[line] in told
    assert re.search(r"[.?] See `srds-fast( \w+)? --help`\.$", told)


@pytest.mark.parametrize("argv", [["--help"], ["env"], ["demo", "--help"]])
def test_help_and_env_import_no_heavy_package(argv: list[str]) -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'PIL', 'matplotlib'}"
    script = "import sys\nfrom srds_fast.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    script += f"sys.exit(' '.join({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True, check=False)
    assert done.stdout
    assert done.stderr.strip() == ""


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "srds_fast.cli", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"srds-fast {srds_fast.__version__}\n")


def test_env_tells_versions(capsys: Capture) -> None:
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["srds_fast"] == srds_fast.__version__
    assert found["torch"] == version("torch")
    assert found["python"] == platform.python_version()
    assert len(found["cuda_devices"]) >= torch.cuda.device_count()
    assert main(["env"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["diffusers"] == found["diffusers"]
    assert lines["xformers"] == (found["xformers"] or "not installed")


def test_env_reads_the_devices_from_the_driver(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'NVIDIA H200, 570.86.15, 143771'\necho 'NVIDIA GB10, 580.95.05, [N/A]'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cuda_devices"] == [
        {"name": "NVIDIA H200", "driver": "570.86.15", "memory_mib": 143771},
        {"name": "NVIDIA GB10", "driver": "580.95.05", "memory_mib": None},
    ]
    assert main(["env"]) == 0
    assert "cuda:0        NVIDIA H200, driver 570.86.15, 143771 MiB" in capsys.readouterr().out
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert main(["env"]) == 0
    assert "cuda          no device" in capsys.readouterr().out


def test_generate_writes_what_the_pipeline_draws(folder: str, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "new" / "images"
    options = ["--steps", "8", "--guidance", "3", "--negative-prompt", "no", "--exact", "--method", "srds"]
    options += ["--show-report", "--profile", str(tmp_path / "trace.json")]
    (tmp_path / "prompts.txt").write_text("\n  b \n")
    options += ["--prompt", "A cat!", "--prompts", str(tmp_path / "prompts.txt")]
    assert main(["generate", "--model", folder, "--out", str(out), *options]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert sorted(path.name for path in out.iterdir()) == ["a-cat-seed0.png", "b-seed1.png"]
    assert str(out / "a-cat-seed0.png") in printed.out
    assert re.search(r"^stop +exact$", printed.out, flags=re.MULTILINE)
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    expected = stock_images(["A cat!", "b"], 8, guidance_scale=3.0, negative_prompt=["no", "no"])
    for name, image in zip(["a-cat-seed0.png", "b-seed1.png"], expected, strict=True):
        assert abs(opened(out / name) - image).max() <= 1


def test_generate_gives_every_image_its_own_seed(folder: str, tmp_path: Path, capsys: Capture) -> None:
    argv = ["generate", *PROMPTS, "--images-per-prompt", "2", "--seed", "3", "--steps", "6", "--method", "sequential"]
    assert main([*argv, "--model", folder, "--out", str(tmp_path), "--json"]) == 0
    images = {path.name: opened(path).tobytes() for path in tmp_path.iterdir()}
    assert sorted(images) == ["a-seed3.png", "a-seed4.png", "b-seed5.png", "b-seed6.png"]
    assert len(set(images.values())) == 4
    found = json.loads(capsys.readouterr().out)
    assert (found["report"]["method"], found["report"]["waves"]) == ("sequential", 6)
    assert [(each["prompt"], each["seed"]) for each in found["images"]] == list(zip("aabb", range(3, 7), strict=True))
    assert {Path(each["path"]).name for each in found["images"]} == set(images)


def test_a_terminal_sees_the_steps_settle(folder: str, tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich looks at this too
    argv = ["generate", "--model", folder, "--prompt", "a", "--steps", "6", "--method", "srds", "--out", str(tmp_path)]
    assert main(argv) == 0
    printed = capsys.readouterr()
    assert "a-seed0.png" in printed.out
    shown = [int(done) for done in re.findall(r"(\d+)/6", printed.err)]
    assert shown == sorted(shown)
    assert shown[-1] > 0


def test_plan_prints_and_saves_the_plan_of_the_call(folder: str, tmp_path: Path, capsys: Capture) -> None:
    argv = ["plan", "--model", folder, "--steps", "30", "--blocks", "6", "--iterations", "2", "--coarse-solver", "ddim"]
    assert main([*argv, "--save", str(tmp_path / "plan.json")]) == 0
    settings = {"num_blocks": 6, "max_iterations": 2, "coarse_solver": "ddim", "method": "srds"}
    expected = srds_fast.compile(tiny.stable_diffusion(), **settings).plan_for(num_inference_steps=30)
    assert srds_fast.Plan.load(tmp_path / "plan.json") == expected
    assert capsys.readouterr().out.startswith(f"{expected}\n")


def test_auto_takes_other_samples_of_the_same_law_only_if_asked(tmp_path: Path, capsys: Capture) -> None:
    model = str(tmp_path / "ddpm")
    tiny.stable_diffusion(DDPMScheduler.from_config(tiny.SD_NOISE)).save_pretrained(model)
    place, found = ["--model", model, "--prompt", "a", "--steps", "9"], []
    for more in ([], ["--same", "sample"], ["--same", "law"]):
        assert main(["plan", *place, *more, "--json"]) == 0
        candidates = json.loads(capsys.readouterr().out)["plan"]["prediction"]["candidates"]
        found.append({each["name"].split()[0].rstrip(",") for each in candidates})
    assert "speculative" not in found[0] | found[1]
    assert "speculative" in found[2]
    assert main(["compare", *place, "--method", "sequential,speculative", "--same", "law", "--calls", "1"]) == 0
    assert "Other images of the same law, whose differences are no errors: speculative." in capsys.readouterr().out


def test_plan_measures_calibrates_and_plots(folder: str, tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plan.png"
    argv = ["plan", "--model", folder, "--steps", "6", "--prompt", "a"]
    assert main([*argv, "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert "predicted ms" in printed
    assert "measured ms" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main([*argv, "--calibrate", "1", "--save", str(tmp_path / "plan.json")]) == 0
    assert srds_fast.Plan.load(tmp_path / "plan.json").context is not None
    capsys.readouterr()


def test_a_saved_plan_is_run_by_generate_and_compare(folder: str, tmp_path: Path, capsys: Capture) -> None:
    plan = str(tmp_path / "plan.json")
    place = ["--model", folder, "--prompt", "a"]
    asked = ["--steps", "9", "--method", "srds", "--blocks", "3", "--iterations", "1"]
    assert main(["plan", "--model", folder, *asked, "--save", plan, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"] == json.loads(Path(plan).read_text())
    assert main(["generate", *place, "--plan", plan, "--out", str(tmp_path / "out"), "--json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)["report"]
    assert [report[name] for name in ("num_inference_steps", "num_blocks", "iterations")] == [9, 3, 1]
    assert "a-seed0.png" in printed.err
    assert main(["compare", *place, "--plan", plan, "--method", "sequential", "--calls", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["entries"]
    assert [(row["method"], row["steps"], row["blocks"], row["ran"]) for row in rows] == [
        ("sequential", 9, 0, "sequential"),
        ("plan", 9, 3, "srds"),
    ]


def test_a_plan_of_a_second_order_loop_finds_its_steps(tmp_path: Path, capsys: Capture) -> None:
    model, plan = str(tmp_path / "heun"), str(tmp_path / "plan.json")
    tiny.stable_diffusion(HeunDiscreteScheduler()).save_pretrained(model)
    assert main(["plan", "--model", model, "--steps", "5", "--method", "srds", "--save", plan]) == 0
    assert srds_fast.Plan.load(plan).num_inference_steps == 9
    argv = ["generate", "--model", model, "--prompt", "a", "--plan", plan, "--out", str(tmp_path / "out"), "--json"]
    capsys.readouterr()
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["report"]["num_inference_steps"] == 9


def test_compare_writes_the_table_it_prints(folder: str, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "deep" / "table.json"
    argv = ["compare", "--steps", "4,9", "--method", "sequential,paper", "--method", "exact", "--calls", "1", *PROMPTS]
    assert main([*argv, "--model", folder, "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    assert document["prompts"] == ["a", "b"]
    assert document["environment"]["torch"] == version("torch")
    entries = document["entries"]
    asked = [(steps, method) for steps in (4, 9) for method in ("sequential", "paper", "exact")]
    assert [(entry["steps"], entry["method"]) for entry in entries] == asked
    lines = cells(capsys.readouterr().out, "steps")
    for entry, line in zip(entries, lines, strict=True):
        assert line[:2] == [str(entry["steps"]), entry["method"]]
        assert [int(cell) for cell in line[4:7]] == [entry["waves"], entry["rows"], entry["peak_rows"]]
        shown = [float(cell) for cell in line[7:10]]
        assert shown == pytest.approx([entry["difference"][key] for key in ("mean", "p95", "max")], rel=0.05)
        assert float(line[10]) == pytest.approx(entry["ratio"], abs=0.006)
        if entry["method"] == "paper":
            blocks, iterations = entry["blocks"], entry["iterations"]
            assert line[2:4] == [str(blocks), str(iterations)]
            assert blocks**2 == entry["steps"]
            assert entry["waves"] == iterations * blocks + blocks - iterations
        else:
            assert entry["difference"]["max"] < 1e-3
            assert entry["waves"] == entry["steps"]


def test_demo_times_one_image_as_a_user_makes_it(
    folder: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(demo.PARTS, "policy")  # which has tests of its own
    argv = ["demo", "--model", folder, "--prompt", "a", "--steps", "5", "--out", str(tmp_path), "--json"]
    assert main(argv) == 0
    printed = capsys.readouterr()
    (part,) = json.loads(printed.out)["parts"].values()
    assert min(part["seconds"], part["ratio"]) > 0
    assert part["difference"] < 0.5
    assert part["report"]["num_inference_steps"] == 5
    assert printed.err.splitlines()[-1] == part["text"]
    assert ("nothing is faster here" in part["text"]) != ("pays back after" in part["text"])
    assert {path.name for path in tmp_path.iterdir()} == {"contact-sheet.png", "convergence.png"}


def test_demo_of_a_method_draws_and_tells_where_the_tolerance_stops(
    folder: str, tmp_path: Path, capsys: Capture
) -> None:
    argv = ["demo", "--model", folder, *PROMPTS, "--method", "srds", "--steps", "12", "--blocks", "4"]
    assert main([*argv, "--iterations", "9", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    stages = cells(out, "iteration")
    assert [int(line[1]) for line in stages] == [4, 6, 8, 10, 12]
    (final,) = (line for line in out.splitlines() if line.startswith("srds "))
    (marked,) = (line for line in stages if "<-" in line)
    assert final.split()[1:4] == marked[1:4]
    assert "This run: the loop of srds was " in out
    assert str(tmp_path / "contact-sheet.png") in out
    # from the left: five iterations, the final images, the sequential ones
    sheet, tile = opened(tmp_path / "contact-sheet.png"), 4 * 32
    assert sheet.shape[0] == 76 + 2 * (tile + 12)
    for row, image in enumerate(stock_images(["a", "b"], 12, guidance_scale=7.5)):
        scale = tile // len(image)
        expected = image.repeat(scale, 0).repeat(scale, 1)
        shown = sheet[76 + row * (tile + 12) :][: len(expected)]
        places = [x for x in range(shown.shape[1] - len(expected)) if near(shown[:, x : x + len(expected)], expected)]
        assert len(places) >= 3, "the last iteration, which is exact, the final image and the sequential one"
    assert opened(tmp_path / "convergence.png").shape == (750, 1125, 3)


def near(shown: np.ndarray, expected: np.ndarray) -> bool:
    return bool(abs(shown - expected).max() <= 1)


@pytest.mark.parametrize("method", ["collocation", "chords"])
def test_demo_shows_any_method_that_has_iterations_without_matplotlib(
    method: str, folder: str, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    argv = ["demo", "--model", folder, "--prompt", "a", "--method", method, "--steps", "9", "--iterations", "1"]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert cells(out, "iteration")
    assert "pip install 'srds-fast[plot]'" in out.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["contact-sheet.png"]


def test_the_bundled_digits_converge(tmp_path: Path, capsys: Capture) -> None:
    argv = ["demo", "--method", "srds", "--batch", "2", "--steps", "9", "--iterations", "2", "--out", str(tmp_path)]
    assert main(argv) == 0
    out = capsys.readouterr().out
    p95 = [float(line[5]) for line in cells(out, "iteration")]
    assert p95 == sorted(p95, reverse=True)
    (final,) = (line.split() for line in out.splitlines() if line.startswith("srds "))
    assert float(final[6]) < 0.5


ASKED = ["--model", "FOLDER", "--prompt", "a"]
MISTAKES = {
    "no such model": (["generate", "--model", "digitz"], "no model 'digitz'. Did you mean digits?"),
    "no such folder": (["generate", "--model", "./nowhere"], "no model './nowhere'"),
    "no such device": (["generate", "--device", "toaster"], "no device 'toaster'"),
    "no such card": (["generate", "--device", "cuda:99"], "no device 'cuda:99'"),
    "no such method": (["generate", "--method", "colocation"], "no method 'colocation'. Did you mean collocation?"),
    "an empty method": (["demo", "--method", ""], "There is no method ''."),
    "an empty method of an image": (["generate", "--method", ""], "There is no method ''."),
    "one of the methods": (["compare", "--method", "srds,magic"], "no method 'magic'"),
    "no prompt for a folder": (["compare", "--model", "FOLDER"], "Give a --prompt"),
    "no prompt for a hub model": (["demo", "--model", "owner/name"], "Give a --prompt"),
    "no file of prompts": (["generate", "--prompts", "nowhere.txt"], "cannot be read: No such file"),
    "no prompt in the file": (["generate", "--prompts", "taken"], "holds no prompt"),
    "no plan": (["generate", "--plan", "nowhere.json"], "srds-fast plan --save FILE"),
    "a broken plan": (["compare", "--plan", "taken"], "holds no plan of this version"),
    "blocks": (["generate", "--steps", "8", "--blocks", "9"], "--blocks is 9"),
    "blocks of a folder": (["generate", *ASKED, "--steps", "8", "--blocks", "9"], "num_blocks is 9"),
    "blocks of another method": (["plan", "--method", "chords", "--blocks", "2"], "together with --method chords"),
    "exact and another sample": (
        ["generate", "--exact", "--method", "speculative"],
        "--exact was given together with --method speculative. It asks for the sample of the sequential sampler, and "
        "this method gives another one of the same law.",
    ),
    "solver": (["generate", *ASKED, "--coarse-solver", "magic"], "--coarse-solver is 'magic'"),
    "tolerance": (["generate", *ASKED, "--tolerance", "-1"], "--tolerance is -1.0"),
    "steps": (["generate", *ASKED, "--steps", "5000"], "5000 steps are too many"),
    "steps of any model": (["plan", "--steps", "20000"], "20000 steps are too many"),
    "a file in the way": (["generate", *ASKED, "--out", "taken"], "taken is no folder"),
    "a file in the way of the demo": (["demo", *ASKED, "--out", "taken/in"], "taken is no folder"),
    "a file in the way of JSON": (["env", "--json", "taken/x.json"], "taken is no folder"),
    "no folder": (["plan", "--save", "nowhere/plan.json"], "no folder nowhere"),
    "no iterations": (["demo", "--method", "paradigms"], "no whole image before its end"),
    "fewer images": (["demo", "--batch", "1", "--prompt", "a", "--prompt", "b"], "--batch is 1"),
    "a plot of one plan": (["plan", "--method", "srds", "--plot", "p.png"], "candidates of auto"),
}


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("nothing may be loaded")


@pytest.mark.parametrize(("argv", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_told_in_one_line_before_weights_are_loaded(
    folder: str, tmp_path: Path, argv: list[str], words: str, capsys: Capture, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    if words != "num_blocks is 9":  # how many turns the loop of a folder takes is known of the loaded pipeline alone
        monkeypatch.setattr(torch, "load", never)
        monkeypatch.setattr(safetensors, "safe_open", never)
        monkeypatch.setattr(DiffusionPipeline, "from_pretrained", never)
    assert main([folder if word == "FOLDER" else word for word in argv]) == 2
    assert words in complaint(capsys)


def test_a_folder_without_a_pipeline(tmp_path: Path, capsys: Capture) -> None:
    for words in ("cannot be loaded: Error no file named model_index.json", "cannot be loaded: It looks like"):
        assert main(["generate", "--prompt", "a", "--model", str(tmp_path)]) == 2
        assert words in complaint(capsys)
        (tmp_path / "model_index.json").write_text("{broken")


def test_an_unsupported_pipeline_is_told_in_one_line(tmp_path: Path, capsys: Capture) -> None:
    unconditional = tiny.ddim()
    unconditional.save_pretrained(tmp_path / "ddim")
    assert main(["generate", "--prompt", "a", "--model", str(tmp_path / "ddim")]) == 2
    assert "takes no prompt" in complaint(capsys)


def test_an_unsupported_scheduler_is_replaced_only_on_request(tmp_path: Path, capsys: Capture) -> None:
    model, out = tmp_path / "repaint", tmp_path / "out"
    tiny.stable_diffusion(RePaintScheduler()).save_pretrained(model)
    argv = ["generate", "--prompt", "a", "--steps", "4", "--method", "srds", "--model", str(model), "--out", str(out)]
    assert main(argv) == 2
    assert complaint(capsys).endswith("On the command line: --ddim.")
    assert main([*argv, "--ddim"]) == 0
    assert capsys.readouterr().err == ""
    assert [path.name for path in out.iterdir()] == ["a-seed0.png"]


HUB = {
    "out of reach": (ConnectionError("Name or service not known"), "cannot be reached (Name or service not known)"),
    "offline": (OfflineModeIsEnabled("offline mode is enabled"), "cannot be reached (HF_HUB_OFFLINE is set)"),
    "missing": (RepositoryNotFoundError("404", response=Mock()), "the hub has none that you may read"),
    "gated": (GatedRepoError("403", response=Mock()), "lets only some accounts read"),
}


@pytest.mark.parametrize(("error", "words"), HUB.values(), ids=HUB.keys())
def test_a_model_of_the_hub_that_cannot_be_had_is_told_in_one_line(
    error: Exception, words: str, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "model_info", fails)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", never)
    assert main(["generate", "--model", "owner/name", "--prompt", "a"]) == 2
    told = complaint(capsys)
    assert words in told
    assert "'owner/name'" in told


def test_a_downloaded_model_of_the_hub_is_run_without_the_hub(
    folder: str, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    """And its configurations alone tell that it has no so many steps."""

    def fails(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    asked: dict[str, Any] = {}

    def loaded(name: str, **options: Any) -> Any:
        asked.update(options, name=name)
        return tiny.stable_diffusion()

    monkeypatch.setattr(huggingface_hub, "model_info", fails)

    def downloaded(_: str, filename: str, subfolder: str | None, **__: Any) -> str:
        return str(Path(folder, subfolder or "", filename))

    monkeypatch.setattr(configuration_utils, "hf_hub_download", downloaded)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", loaded)
    argv = ["generate", "--model", "owner/name", "--prompt", "a", "--out", str(tmp_path), "--method", "sequential"]
    assert main([*argv, "--steps", "3"]) == 0
    assert (asked["name"], asked["local_files_only"]) == ("owner/name", True)
    asked.clear()
    capsys.readouterr()
    assert main([*argv, "--steps", "2000"]) == 2
    assert "2000 steps are too many" in complaint(capsys)
    assert not asked


def test_a_run_that_fails_ends_with_1(capsys: Capture, monkeypatch: Patch) -> None:
    def diverges(*_: object) -> None:
        raise DivergenceError("The network returned NaN.")

    monkeypatch.setattr(srds_fast.cli.generate, "open_for", diverges)
    assert main(["generate"]) == 1
    assert complaint(capsys) == "srds-fast: The network returned NaN."


def test_a_file_that_fails_is_named_without_a_number(capsys: Capture, monkeypatch: Patch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "image.png")

    monkeypatch.setattr(srds_fast.cli.generate, "open_for", full)
    assert main(["generate"]) == USER_MISTAKE
    assert complaint(capsys) == (
        "srds-fast: image.png cannot be read or written: No space left on device. Name another file or folder."
    )


def test_verbose_shows_where_the_error_came_from(capsys: Capture) -> None:
    assert main(["generate", "--model", "nowhere", "--verbose"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("srds-fast: There is no model")


def test_ctrl_c_ends_with_130(capsys: Capture, monkeypatch: Patch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(srds_fast.cli.generate, "open_for", interrupted)
    assert main(["generate", "--prompt", "a"]) == 130
    assert capsys.readouterr().err == "srds-fast: interrupted\n"
