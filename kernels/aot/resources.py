"""Registers, spills and shared memory of each kernel, found by compiling it ahead of time. No GPU is needed.

    python -m srds_fast.kernels.aot.resources

This compiles every specimen for sm_80, sm_90 and sm_100, and prints what it needs and its widest accesses to global
memory. It does not work in a process that interprets kernels (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

OPERATIONS = ("wave_update", "fixed_point_wave", "secant_sweep")
CAPABILITIES = (80, 90, 100)


class Specimen(NamedTuple):
    """One way to compile a kernel. Each module of this package named after an operation lists its own as SPECIMENS.

    Pointers and sizes count as multiples of 16, as they are for contiguous states of 16 elements and more; except those
    in `do_not_specialize`.
    """

    name: str
    kernel: Any
    types: dict[str, str]  # of arguments that are neither constant nor "i32", such as "*fp32"
    constants: dict[str, Any]
    num_warps: int
    most_registers: int  # upper bound, per thread
    wide: tuple[int, int]  # the fewest loads, and the fewest stores, of 16 bytes that the kernel must make
    fuses: bool = False  # products and sums may be rounded together
    registers: int | None = None  # limit passed to the assembler; None: it decides


class Resources(NamedTuple):
    registers: int  # of a thread
    spills: int  # of a thread: bytes that it stores and loads because registers do not suffice
    shared: int  # bytes of shared memory of a program
    load_bits: list[int]  # of each access to global memory by a thread, as in the PTX
    store_bits: list[int]


def specimens() -> Iterator[tuple[str, Specimen]]:
    """All specimens, each with the name of its operation."""
    for operation in OPERATIONS:
        for specimen in importlib.import_module(f".{operation}", __package__).SPECIMENS:
            yield operation, specimen


def compiled(specimen: Specimen, capability: int) -> Resources:
    """What a specimen needs, compiled for a compute capability (80 for sm_80)."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set. Interpreted kernels cannot be compiled. Unset it.")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    names = specimen.kernel.arg_names
    signature = {name: "constexpr" if name in specimen.constants else specimen.types.get(name, "i32") for name in names}
    constants = {(names.index(name),): value for name, value in specimen.constants.items()}
    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, (name, parameter) in enumerate(zip(names, specimen.kernel.params, strict=True))
        if (signature[name][0] == "*" or signature[name] in ("i32", "i64")) and not parameter.do_not_specialize
    }
    source = ASTSource(fn=specimen.kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": specimen.num_warps, "enable_fp_fusion": specimen.fuses, "maxnreg": specimen.registers}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = kernel.asm["ptx"]
    (target,) = re.findall(r"\.target (\w+)", ptx)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernel.ptx").write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={target}", "kernel.ptx", "-o", "kernel.cubin"]
        said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", said)
    ((stored, loaded),) = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    # cp.async has its size in bytes as a hexadecimal number behind both addresses
    copied = re.findall(r"\bcp\.async\.[\w.]+ \[[^]]*\], \[[^]]*\], (0x\w+)", ptx)
    return Resources(
        int(registers),
        int(stored) + int(loaded),
        kernel.metadata.shared,
        _widths(ptx, "ld") + [8 * int(each, 16) for each in copied],
        _widths(ptx, "st"),
    )


def _widths(ptx: str, access: str) -> list[int]:
    """Bits of each access to global memory: 4 x 32 for ld.global.v4.b32."""
    found = re.findall(rf"\b{access}\.global[\w.:]*?(?:\.v(\d))?\.[bfus](\d+)\b", ptx)
    return [int(count or 1) * int(size) for count, size in found]


def main() -> None:
    print(f"{'kernel':46}{'target':>8}{'registers':>11}{'bound':>7}{'spills':>8}{'shared':>8}{'load':>6}{'store':>7}")
    for (operation, specimen), capability in product(specimens(), CAPABILITIES):
        found = compiled(specimen, capability)
        print(
            f"{operation + ', ' + specimen.name:46}{'sm_' + str(capability):>8}{found.registers:>11}"
            f"{specimen.most_registers:>7}{found.spills:>8}{found.shared:>8}"
            f"{max(found.load_bits):>6}{max(found.store_bits):>7}"
        )


if __name__ == "__main__":
    main()
