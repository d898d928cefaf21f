from __future__ import annotations

import subprocess
import sys

import srds_fast


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
