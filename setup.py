"""Builds and installs reid3d. CMakeLists.txt says how the extension is built; this file only drives it.

    pip install --no-build-isolation -e ".[test]" -c constraints-cpu.txt

Without a C++ compiler or cmake, or with REID3D_NO_EXTENSION=1, the package installs without the extension and computes
its ops in plain torch. With a compiler, a compile failure is an error.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# pip's cmake and ninja live beside the interpreter, on PATH only where the environment has been activated.
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def why_no_extension() -> str | None:
    if os.environ.get("REID3D_NO_EXTENSION") == "1":
        return "REID3D_NO_EXTENSION=1"
    words = shlex.split(os.environ.get("CXX", ""))  # a command line, such as "ccache g++"
    if not any(shutil.which(name, path=TOOLS) for name in words[:1] or ("c++", "g++", "clang++")):
        return "no C++ compiler"
    if not all(shutil.which(name, path=TOOLS) for name in ("cmake", "ninja")):
        return "cmake or ninja is missing: pip install cmake ninja"
    return None


def remove_libraries(folder: Path) -> None:
    """Of an earlier build: what this one does not make must not be loaded in its place."""
    for library in folder.glob("_C*.so"):
        library.unlink()


class PythonBuild(build_py):
    """Leaves no compiled library in a source tree that is installed without the extension."""

    def run(self) -> None:
        if reason and self.editable_mode:
            remove_libraries(ROOT / "reid3d")
        super().run()


class CMakeBuild(build_ext):
    """Hands the whole build to cmake and ninja; the objects stay in build/cmake, so that a second build is short."""

    def run(self) -> None:
        try:
            import torch
        except ModuleNotFoundError:
            sys.exit("reid3d: install torch first, then reid3d with pip install --no-build-isolation")
        target = (ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()) / "reid3d"
        cmake, ninja = shutil.which("cmake", path=TOOLS), shutil.which("ninja", path=TOOLS)
        build = ROOT / "build" / "cmake"
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "TORCH_DIR": Path(torch.__file__).parent,
            "OUTPUT_DIR": target,
        }
        flags = [f"-D{name}={value}" for name, value in options.items()]
        remove_libraries(target)
        subprocess.run([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *flags], check=True)
        subprocess.run([cmake, "--build", build], check=True)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in sorted((Path(self.build_lib) / "reid3d").glob("_C*.so"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


reason = why_no_extension()
if reason:
    print(f"reid3d: installing without the compiled extension ({reason})", file=sys.stderr)

setup(
    name="reid3d",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "reid3d" / "__init__.py").read_text())[1],
    description="Person re-identification in 3D space",
    license="Apache-2.0",
    python_requires=">=3.10",
    install_requires=["torch>=2.10", "numpy", "safetensors", "pillow", "tqdm", "jsonargparse[signatures]"],
    extras_require={
        "graph": ["torch-geometric"],
        "body": ["trimesh"],
        "ray": ["ray[data]"],
        "cuhk03": ["h5py", "scipy"],
        "search": ["faiss-cpu"],
        "track": ["tensorboard"],
        # The same Open3D without CUDA, at a third of the size, where there is one.
        "view": [
            "open3d-cpu; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "open3d; sys_platform != 'linux' or platform_machine != 'x86_64'",
        ],
        "study": ["matplotlib"],
        # smplx, for non-commercial use, is an oracle of the tests and nothing else.
        "test": [
            *("pytest", "pytest-xdist", "hypothesis", "ruff", "mypy"),
            *("torch-geometric", "trimesh", "ray[data]", "smplx", "h5py", "scipy", "pytorch-metric-learning"),
            *("tensorboard", "faiss-cpu", "matplotlib", "playwright"),
        ],
        # What `reid3d bench` compares with. torch-cluster is built from source against the torch that is there, which
        # takes minutes and needs --no-build-isolation.
        "peers": ["fpsample", "scipy", "pykeops", "torch-cluster"],
    },
    entry_points={"console_scripts": ["reid3d = reid3d.cli:main"]},
    # preprocess/ stands at the top of the repository and is installed as reid3d.preprocess
    packages=find_packages(include=["reid3d", "reid3d.*"])
    + ["reid3d." + name for name in find_packages(include=["preprocess", "preprocess.*"])],
    package_dir={"reid3d.preprocess": "preprocess"},
    package_data={
        "reid3d": ["py.typed", "recipes/*.yaml", "viewer/*.html"],
        "reid3d.preprocess": ["assets/*"],
    },
    ext_modules=[] if reason else [Extension("reid3d._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": PythonBuild},
    # The extension uses neither the C API of Python nor unstable parts of torch: one wheel serves them all.
    options={} if reason else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
