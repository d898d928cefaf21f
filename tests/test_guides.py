"""README and the guides: their code runs, their diffs apply, their links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import modulars
import pytest
import tiny
import torch
from diffusers import DDIMScheduler

import srds_fast
from srds_fast.solvers import registry

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
GUIDES = [
    ROOT / "srds_fast" / "GUIDE.md",
    ROOT / "srds_fast" / "README.md",
    ROOT / "srds_fast" / "pipelines" / "README.md",
    ROOT / "kernels" / "README.md",
    ROOT / "bench" / "README.md",
    ROOT / "profiling" / "README.md",
]
PAGES = [README, *GUIDES]
WORDS_OF_README = 900
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def title(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def every_block(language: str) -> list[object]:
    return [
        pytest.param(page, number, id=f"{title(page)}, {number}")
        for page in PAGES
        for number, block in enumerate(blocks(page, language))
        if "openai" not in block and "serving." not in block  # these need packages: tests/serving/test_guide.py
    ]


def test_readme_has_two_commands_and_ci_runs_the_second_as_printed() -> None:
    demo, tests = blocks(README, "sh")
    assert demo.rstrip().endswith("srds-fast demo")
    assert ".venv/bin/pytest" in tests
    for command in (demo, tests):
        assert command.startswith("python3 -m venv"), "each sets itself up on a fresh machine"
        assert len(command.strip().splitlines()) == 1
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines(keepends=True)


def test_readme_is_one_page_and_says_when_it_does_not_help() -> None:
    text = README.read_text()
    assert len(text.split()) <= WORDS_OF_README
    assert "does not help" in text
    for page in GUIDES:
        assert f"]({title(page)})" in text, "README leads to every guide"


@pytest.mark.parametrize(("page", "number"), every_block("python"))
def test_every_python_block_runs(page: Path, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    block = blocks(page, "python")[number].replace('"cuda"', f'"{DEVICE}"')
    names: dict[str, object] = {"pipe": tiny.stable_diffusion()}
    if "compile(modular" in block:
        names["modular"] = modulars.sdxl()
    exec(compile(block, f"{title(page)}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_every_public_name_exists(page: Path) -> None:
    for name in re.findall(r"`srds_fast\.([A-Za-z_]+)", page.read_text()):
        if name not in ("zoo", "kernels", "methods"):
            assert hasattr(srds_fast, name) or importlib.util.find_spec(f"srds_fast.{name}"), name


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            file, _, heading = target.partition("#")
            found = (page.parent / file).resolve() if file else page
            assert found.exists(), target
            assert not heading or heading in headings(found), target


def headings(page: Path) -> set[str]:
    """The anchors of a page, as they are made of its headings on GitHub."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def hunks(diff: str) -> dict[str, list[tuple[str, str]]]:
    """What each hunk of a diff replaces by what, by the name of the file."""
    files: dict[str, list[tuple[str, str]]] = {}
    for part in re.split(r"^--- .*\n", diff, flags=re.MULTILINE)[1:]:
        head, *found = re.split(r"^@@.*\n", part, flags=re.MULTILINE)
        name = head.removeprefix("+++ b/").strip()
        lines = [hunk.splitlines(keepends=True) for hunk in found]
        files[name] = [
            ("".join(line[1:] for line in each if line[0] != "+"), "".join(line[1:] for line in each if line[0] != "-"))
            for each in lines
        ]
    return files


def applied(diff: str) -> dict[str, str]:
    """The files of a diff as they are after it."""
    texts = {}
    for name, found in hunks(diff).items():
        text = (ROOT / name).read_text() if (ROOT / name).exists() else ""
        for before, after in found:
            assert text.count(before) == 1 or not text, f"{name} has this once: {before}"
            text = text.replace(before, after) if text else after
        texts[name] = text
    return texts


@pytest.mark.parametrize(("page", "number"), every_block("diff"))
def test_every_diff_applies(page: Path, number: int) -> None:
    for text in applied(blocks(page, "diff")[number]).values():
        compile(text, title(page), "exec")


def load(name: str, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    file = folder / f"{name.rpartition('.')[2]}.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_the_method_of_the_guide_gives_the_sequential_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = applied(blocks(ROOT / "srds_fast" / "README.md", "diff")[0])
    new, registered = files
    load("srds_fast.solvers.picard", files[new], tmp_path, monkeypatch)
    changed = load("srds_fast.solvers.registry_of_the_guide", files[registered], tmp_path, monkeypatch)
    for name in ("REGISTERED", "BY_NAME", "METHODS"):
        monkeypatch.setattr(registry, name, getattr(changed, name))

    def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) * (t[:, None] / 1000)

    noise = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    expected = srds_fast.sample(denoiser, noise, DDIMScheduler(clip_sample=False), 12, method="sequential").sample
    found = srds_fast.sample(denoiser, noise, DDIMScheduler(clip_sample=False), 12, method="picard", exact=True)
    assert found.report.method == "picard"
    torch.testing.assert_close(found.sample, expected)
