from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import srds_fast

ROOT = Path(__file__).parent.parent


def test_import_is_light_and_touches_no_cuda() -> None:
    code = """
import sys, srds_fast
heavy = {"diffusers", "transformers", "triton", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
srds_fast.sample, srds_fast.compile, srds_fast.kernels, srds_fast.program
heavy = {"diffusers", "transformers", "triton", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
import torch
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_resolves() -> None:
    for name in srds_fast.__all__:
        assert getattr(srds_fast, name) is not None, name


def test_only_public_names_are_shown() -> None:
    assert set(dir(srds_fast)) == {"__version__", *srds_fast.__all__}
    assert {"compile", "sample", "Compiled", "Report", "Stream", "errors"} - set(dir(srds_fast)) == {"errors"}


def test_the_packages_that_are_installed_are_the_folders() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    files = [*ROOT.glob("srds_fast/**/__init__.py"), *ROOT.glob("kernels/**/__init__.py")]
    folders = [".".join(file.parent.relative_to(ROOT).parts) for file in files]
    assert sorted(listed) == sorted(f"srds_fast.{name}" if name.startswith("kernels") else name for name in folders)
