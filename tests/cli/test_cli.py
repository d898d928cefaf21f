"""The command `srds-fast`: what it prints, writes and answers to mistakes."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import RePaintScheduler
from PIL import Image

import srds_fast
import srds_fast.cli.generate
from srds_fast.cli import main

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


@pytest.mark.parametrize("command", ["demo", "generate", "compare", "plan", "env"])
def test_help_teaches_by_example(command: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    examples = capsys.readouterr().out.split("examples:\n")[1]
    assert all(line.startswith(f"  srds-fast {command}") for line in examples.splitlines())


@pytest.mark.parametrize("argv", [[], ["paint"], ["plan"], ["plan", "--steps", "0"], ["plan", "--steps", "ten"]])
def test_wrong_usage_ends_with_2(argv: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: srds-fast" in capsys.readouterr().err


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
    assert main(["generate", "A cat!", "b", "--model", folder, "--out", str(out), *options]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert sorted(path.name for path in out.iterdir()) == ["a-cat-seed0.png", "b-seed1.png"]
    assert str(out / "a-cat-seed0.png") in printed.out
    assert "converged   2 of 2 samples (exact)" in printed.out
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    expected = stock_images(["A cat!", "b"], 8, guidance_scale=3.0, negative_prompt=["no", "no"])
    for name, image in zip(["a-cat-seed0.png", "b-seed1.png"], expected, strict=True):
        assert abs(opened(out / name) - image).max() <= 1


def test_generate_gives_every_image_its_own_seed(folder: str, tmp_path: Path, capsys: Capture) -> None:
    argv = ["generate", "a", "b", "--images-per-prompt", "2", "--seed", "3", "--steps", "6", "--method", "sequential"]
    assert main([*argv, "--model", folder, "--out", str(tmp_path)]) == 0
    images = {path.name: opened(path).tobytes() for path in tmp_path.iterdir()}
    assert sorted(images) == ["a-seed3.png", "a-seed4.png", "b-seed5.png", "b-seed6.png"]
    assert len(set(images.values())) == 4
    assert "sequential: 6 waves for 6 steps" in capsys.readouterr().out


def test_plan_prints_and_saves_the_plan_of_the_call(folder: str, tmp_path: Path, capsys: Capture) -> None:
    argv = ["plan", "--model", folder, "--steps", "30", "--blocks", "6", "--iterations", "2", "--coarse-solver", "ddim"]
    assert main([*argv, "--save", str(tmp_path / "plan.json")]) == 0
    settings = {"num_blocks": 6, "max_iterations": 2, "coarse_solver": "ddim", "method": "srds"}
    expected = srds_fast.compile(tiny.stable_diffusion(), **settings).plan_for(num_inference_steps=30)
    assert srds_fast.Plan.load(tmp_path / "plan.json") == expected
    assert capsys.readouterr().out.startswith(f"{expected}\n")


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
    assert main([*argv, "--unmeasured", "--plot", str(plot)]) == 2
    assert "Leave --unmeasured out" in complaint(capsys)


def test_compare_writes_the_table_it_prints(folder: str, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "deep" / "table.json"
    argv = ["compare", "--steps", "4,9", "--methods", "sequential,paper,exact", "--calls", "1", *PROMPTS]
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


def test_demo_draws_and_tells_where_the_tolerance_stops(folder: str, tmp_path: Path, capsys: Capture) -> None:
    argv = ["demo", "--model", folder, *PROMPTS, "--steps", "12", "--blocks", "4", "--iterations", "9"]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    stages = cells(out, "iteration")
    assert [int(line[1]) for line in stages] == [4, 6, 8, 10, 12]
    (final,) = (line for line in out.splitlines() if line.startswith("srds "))
    (marked,) = (line for line in stages if "<-" in line)
    assert final.split()[1:4] == marked[1:4]
    assert "This run: the SRDS loop was " in out
    assert str(tmp_path / "contact-sheet.png") in out

    sheet = opened(tmp_path / "contact-sheet.png")
    sequential, tile = stock_images(["a", "b"], 12, guidance_scale=3.0), 96
    step = tile + 8
    for row, image in enumerate(sequential):
        top = 50 + row * step
        shown = sheet[top : top + tile, -step - 8 - step : -step - 8 - 8]
        assert abs(shown[::3, ::3] - image).max() <= 1
        assert np.array_equal(shown, shown[::3, ::3].repeat(3, 0).repeat(3, 1))
    assert sheet.shape[0] == 50 + 2 * step
    columns = 5 + 3
    assert sheet[60, -columns * step - 8 - 20 : -columns * step - 8].min() == 255  # the margin: no ninth column
    assert opened(tmp_path / "convergence.png").shape == (675, 1125, 3)


def test_demo_without_matplotlib_and_with_fewer_iterations_than_the_tolerance_takes(
    folder: str, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    argv = ["demo", "--model", folder, "--prompt", "a", "--steps", "9", "--blocks", "3", "--iterations", "0"]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "see them all with --iterations" in out
    assert "<-" not in out
    assert "pip install 'srds-fast[plot]'" in out.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["contact-sheet.png"]


def test_the_bundled_digits_converge(tmp_path: Path, capsys: Capture) -> None:
    assert main(["demo", "--steps", "9", "--iterations", "2", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    p95 = [float(line[5]) for line in cells(out, "iteration")]
    assert p95 == sorted(p95, reverse=True)
    (final,) = (line.split() for line in out.splitlines() if line.startswith("srds "))
    assert float(final[6]) < 0.5
    assert opened(tmp_path / "contact-sheet.png").shape[0] == 50 + 10 * 104


MISTAKES = {
    "no such model": (["generate", "a", "--model", "nowhere"], "no model 'nowhere'"),
    "no such device": (["generate", "a", "--device", "toaster"], "no device 'toaster'"),
    "no such card": (["generate", "a", "--device", "cuda:99"], "no device 'cuda:99'"),
    "no such method": (["compare", "--methods", "srds,magic"], "no method 'magic'"),
    "no prompt for a folder": (["compare", "--model", "FOLDER"], "Give a --prompt"),
    "blocks": (["generate", "a", "--model", "FOLDER", "--steps", "8", "--blocks", "9"], "num_blocks is 9"),
    "solver": (["generate", "a", "--model", "FOLDER", "--coarse-solver", "magic"], "coarse_solver is 'magic'"),
    "tolerance": (["generate", "a", "--model", "FOLDER", "--tolerance", "-1"], "tolerance is -1.0"),
    "steps": (["generate", "a", "--model", "FOLDER", "--steps", "5000"], "5000 steps are too many"),
    "a file in the way": (["generate", "a", "--model", "FOLDER", "--out", "taken"], "taken"),
}


@pytest.mark.parametrize(("argv", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_told_in_one_line(
    folder: str, tmp_path: Path, argv: list[str], words: str, capsys: Capture, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    assert main([folder if word == "FOLDER" else word for word in argv]) == 2
    assert words in complaint(capsys)


def test_a_folder_without_a_pipeline(tmp_path: Path, capsys: Capture) -> None:
    for words in ("cannot be loaded: Error no file named model_index.json", "cannot be loaded: It looks like"):
        assert main(["generate", "a", "--model", str(tmp_path)]) == 2
        assert words in complaint(capsys)
        (tmp_path / "model_index.json").write_text("{broken")


def test_an_unsupported_pipeline_is_told_in_one_line(tmp_path: Path, capsys: Capture) -> None:
    unconditional = tiny.ddim()
    unconditional.save_pretrained(tmp_path / "ddim")
    assert main(["generate", "a", "--model", str(tmp_path / "ddim")]) == 2
    assert "takes no prompt" in complaint(capsys)


def test_an_unsupported_scheduler_is_replaced_only_on_request(tmp_path: Path, capsys: Capture) -> None:
    model, out = tmp_path / "repaint", tmp_path / "out"
    tiny.stable_diffusion(RePaintScheduler()).save_pretrained(model)
    argv = ["generate", "a", "--steps", "4", "--method", "srds", "--model", str(model), "--out", str(out)]
    assert main(argv) == 2
    assert complaint(capsys).endswith("On the command line: --ddim.")
    assert main([*argv, "--ddim"]) == 0
    assert capsys.readouterr().err == ""
    assert [path.name for path in out.iterdir()] == ["a-seed0.png"]


def test_verbose_shows_where_the_error_came_from(capsys: Capture) -> None:
    assert main(["generate", "a", "--model", "nowhere", "--verbose"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("srds-fast: There is no model")


def test_ctrl_c_ends_with_130(capsys: Capture, monkeypatch: Patch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(srds_fast.cli.generate, "open_for", interrupted)
    assert main(["generate", "a"]) == 130
    assert capsys.readouterr().err == "srds-fast: interrupted\n"
