"""The build script: when it compiles, and what it leaves behind."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[1] / "setup.py"


@pytest.fixture
def tree(tmp_path):
    """A source tree with no more in it than setup.py asks for, and the libraries of an earlier build."""
    shutil.copy(SETUP, tmp_path)
    (tmp_path / "reid3d").mkdir()
    (tmp_path / "reid3d" / "__init__.py").write_text('__version__ = "0.0.0"\n')
    (tmp_path / "preprocess").mkdir()
    (tmp_path / "preprocess" / "__init__.py").touch()
    for name in ("_C.so", "_C_cuda.so"):
        (tmp_path / "reid3d" / name).touch()
    return tmp_path


def setup(tree, *words, **environment):
    command = [sys.executable, "setup.py", *words]
    environment = {**os.environ, "REID3D_NO_EXTENSION": "0", **environment}
    process = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    return process.stderr


@pytest.mark.parametrize(("command", "found"), [("{} -m64", True), ("{}", True), ("/nowhere/c++ {}", False)])
def test_the_compiler_may_be_a_command_line(tree, command, found):
    compiler = tree / "my compiler"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    said = setup(tree, "--version", CXX=command.format(f"'{compiler}'"))
    assert ("no C++ compiler" in said) != found


def test_installed_without_the_extension_no_library_is_left(tree):
    said = setup(tree, "editable_wheel", "--dist-dir", str(tree / "dist"), REID3D_NO_EXTENSION="1")
    assert "installing without the compiled extension (REID3D_NO_EXTENSION=1)" in said
    assert not list((tree / "reid3d").glob("*.so"))


def test_a_wheel_without_the_extension_leaves_the_tree_alone(tree):
    setup(tree, "build_py", REID3D_NO_EXTENSION="1")
    assert len(list((tree / "reid3d").glob("*.so"))) == 2
    assert not list((tree / "build").rglob("*.so"))
