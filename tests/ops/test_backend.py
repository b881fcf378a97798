"""What is in use, with the compiled kernels and without them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import reid3d
from reid3d import doctor, ops
from reid3d.ops import backend

PACKAGE = Path(reid3d.__file__).parent


def run(code: str, **environment: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_backend_names_what_was_built():
    built = {"cpp": (PACKAGE / "_C.so").is_file(), "cuda": (PACKAGE / "_C_cuda.so").is_file() and torch.version.cuda}
    if os.environ.get("REID3D_NO_EXTENSION") == "1":
        built = {}
    assert backend() == ("+".join(kind for kind, there in built.items() if there) or "torch")


OTHERS = ["torch", "portable"]  # than what the tests of this process use, which is the processor's best
if torch.backends.cpu.get_cpu_capability() == "AVX512":
    OTHERS.append("avx2")


@pytest.mark.parametrize("kernels", OTHERS)
def test_the_same_tests_pass_with_every_set_of_kernels(kernels):
    environment = {"REID3D_NO_EXTENSION": "1"} if kernels == "torch" else {"REID3D_ISA": kernels}
    here = Path(__file__)
    tests = [path for path in here.parent.glob("test_*.py") if path.name not in (here.name, "test_sanitizers.py")]
    process = subprocess.run(
        [sys.executable, "-m", "pytest", *sorted(tests), "-q", "-p", "no:cacheprovider"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout[-4000:]
    if kernels == "torch":
        assert run("from reid3d.ops import backend; print(backend())", **environment) == "torch"
    elif (PACKAGE / "_C.so").is_file():
        assert run("from reid3d import doctor; print(doctor.report()['isa'])", **environment) == kernels


@pytest.mark.skipif(not (PACKAGE / "_C.so").is_file(), reason="nothing is compiled")
@pytest.mark.parametrize("asked", ["portable", "avx2"])
def test_asked_for_kernels_are_used_where_the_processor_has_them(asked):
    has = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    isa = run("from reid3d import doctor; print(doctor.report()['isa'])", REID3D_ISA=asked, REID3D_NO_EXTENSION="0")
    assert isa == (asked if has else "portable")


def test_unknown_instructions_are_refused():
    text = run("import reid3d.doctor as d; print(d.format_report(d.report()))", REID3D_ISA="neon")
    assert "REID3D_ISA must be avx512, avx2 or portable, got neon" in text


def test_cuda_library_loads_beside_any_torch_and_registers_its_kernels():
    path = PACKAGE / "_C_cuda.so"
    ops = ["knn", "farthest_point_sample", "ball_query", "morton_order", "transpose_graph", "rasterize"]
    ops += ["group_max", "group_max_backward", "edge_pool", "edge_pool_backward", "match_maps"]
    found = run(
        "import sys, torch, reid3d.ops\n"
        f"if {path.is_file()}: torch.ops.load_library({str(path)!r})\n"
        f"print([torch._C._dispatch_has_kernel_for_dispatch_key('reid3d::' + op, 'CUDA') for op in {ops}])",
        REID3D_NO_EXTENSION="1",
    )
    assert found == str([path.is_file()] * len(ops))


def test_report_is_json_and_every_op_works():
    info = json.loads(json.dumps(doctor.report()))
    assert info["backend"] == backend()
    assert info["torch"] == torch.__version__ and info["reid3d"] == reid3d.__version__
    assert info["extension_error"] is None
    assert set(info["ops"]) == {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}
    names = ["knn", "farthest_point_sample", "ball_query", "group_max", "edge_pool", "morton_order", "transpose_graph"]
    names += ["rasterize", "gated_pool", "match_maps", "match_places"]
    assert all(results == dict.fromkeys(names, "ok") for results in info["ops"].values())
    assert "on cpu    ball_query: ok" in doctor.format_report(info).splitlines()


@pytest.mark.parametrize(
    ("broken", "line"),
    [
        (
            lambda *_: torch.zeros(1, 3),
            "on cpu    farthest_point_sample: failed: gives [[0.0, 0.0, 0.0]], not [[0, 2, 1]]",
        ),
        (lambda *_: 1 / 0, "on cpu    farthest_point_sample: failed: division by zero"),
    ],
)
def test_report_names_an_op_that_fails(monkeypatch, broken, line):
    monkeypatch.setattr(ops, "farthest_point_sample", broken)
    lines = doctor.format_report(doctor.report()).splitlines()
    assert line in lines and "on cpu    group_max: ok" in lines


def test_report_tells_of_an_extension_that_cannot_be_loaded():
    text = run(
        "import pathlib, torch\n"
        "def load(path): raise OSError('wrong ELF class')\n"
        "torch.ops.load_library, pathlib.Path.is_file = load, lambda path: True\n"
        "from reid3d.doctor import *\n"
        "print(format_report(report()))",
        REID3D_NO_EXTENSION="0",
    )
    kernels = next(line for line in text.splitlines() if line.startswith("kernels"))
    assert str(PACKAGE / "_C.so") in kernels and "(wrong ELF class): build it again" in kernels
    assert "on cpu" not in text


def test_report_says_that_the_extension_was_switched_off():
    code = "from reid3d.doctor import *; print(format_report(report()))"
    assert "plain torch: slow, switched off by REID3D_NO_EXTENSION=1" in run(code, REID3D_NO_EXTENSION="1")


def test_importing_the_ops_imports_no_optional_package():
    names = ["torch_geometric", "smplx", "trimesh", "open3d", "faiss", "ray", "tensorboard", "onnx"]
    assert run(f"import sys, reid3d.ops, reid3d.doctor; print([n for n in {names} if n in sys.modules])") == "[]"
