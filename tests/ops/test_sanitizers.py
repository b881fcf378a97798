"""The kernels in C++ under the sanitizers: cpu_*.cpp those of the CPU, warp_*.cpp the logic of CUDA on the host."""

import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

PROGRAMS = sorted(Path(__file__).parent.glob("*.cpp"))
# -march=native: an fma of the machine where it has one. No contraction: csrc/rounding.h.
NATIVE = ["-march=native"] if platform.machine() == "x86_64" else []
FLAGS = ["-std=c++17", "-Og", "-g1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", *NATIVE]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(command[0]) is None:
        pytest.skip(f"NO C++ COMPILER ({command[0]}): the kernels are not tested here with the sanitizers")
    return command


def test_there_is_something_to_run():
    assert PROGRAMS


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_program_with_the_sanitizers(program, tmp_path):
    binary = tmp_path / program.stem
    build = [*compiler(), *FLAGS, *SANITIZERS, program, "-o", binary]
    process = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    # A preloaded library would stand before the sanitizer's.
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    process = subprocess.run([binary], env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
