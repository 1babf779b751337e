"""The Triton kernels compile for a GPU that is not there, and keep within its registers."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[1] / "scripts" / "maintain" / "compile_kernels.py"

pytestmark = [pytest.mark.compile, pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")]


def compile_kernels(*arguments, **environment):
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True)


def test_kernels_for_chunks_of_64_do_not_spill(tmp_path):
    # Compiled anew, rather than found where Triton keeps what it has compiled.
    result = compile_kernels(TRITON_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    rows = [[cell.strip() for cell in line.split("|")] for line in result.stdout.splitlines()]
    header = ["kernel", "shape", "type", "warps", "registers", "spilled B", "shared B", "CTAs/SM", "wgmma"]
    assert rows[0] == header
    table = {(row[0], re.sub(" +", " ", row[1])): [int(cell) for cell in row[3:]] for row in rows[1:]}
    for direction in ("forward", "backward"):
        warps, registers, spilled, shared, programs, wgmma = table[f"{direction}: LSH", "C 64 D 64"]
        assert (warps, spilled) == (4, 0)
        assert 0 < registers <= 255
        assert 0 < shared <= 227 * 1024
        assert programs >= 2
        # Products on the large tensor core instruction, rather than the one of older devices.
        assert wgmma > 0
    assert {shape for _, shape in table} == {"C 64 D 64"}


def test_the_interpreter_is_refused():
    result = compile_kernels(TRITON_INTERPRET="1")
    assert result.returncode == 1
    assert "unset it" in result.stderr
