"""The public names, and what importing the package costs."""

import subprocess
import sys

import pytest

import reid3d

PUBLIC = {
    "Features",
    "PointCloud",
    "Ranks",
    "Result",
    "convert",
    "create_model",
    "evaluate",
    "explain",
    "extract",
    "list_models",
    "open_dataset",
    "ops",
    "rerank",
    "search",
    "synth",
    "tlift",
    "view",
}
MODULES = {"explain", "ops"}
OPTIONAL = (
    "torch_geometric smplx trimesh open3d faiss ray tensorboard onnx onnxruntime torch_cluster pytorch3d scipy".split()
)


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_the_list_of_public_names():
    assert set(reid3d.__all__) == PUBLIC
    assert PUBLIC <= set(dir(reid3d))


@pytest.mark.parametrize("name", sorted(PUBLIC - MODULES))
def test_each_name_is_there_and_documented(name):
    value = getattr(reid3d, name)
    assert callable(value) and value.__name__ == name and value.__doc__
    assert reid3d.ops.knn and reid3d.ops.backend()
    assert all(getattr(reid3d.explain, name).__doc__ for name in reid3d.explain.__all__)


def test_star_import_and_unknown_names():
    scope: dict = {}
    exec("from reid3d import *", scope)
    assert PUBLIC <= set(scope)
    with pytest.raises(AttributeError, match="module 'reid3d' has no attribute 'serach'"):
        _ = reid3d.serach
    with pytest.raises(ImportError):
        exec("from reid3d import nothing_of_that_name")


def test_no_sub_package_takes_the_place_of_a_function():
    """Importing a module binds its name in the package: no module may have the name of a public function."""
    code = f"""
import importlib, pkgutil, reid3d
for module in pkgutil.iter_modules(reid3d.__path__):
    if not module.name.startswith("_"):
        importlib.import_module("reid3d." + module.name)
import reid3d.viewer.html, reid3d.retrieval.search, reid3d.preprocess.convert, reid3d.preprocess.synth
print(*[name for name in reid3d.__all__ if name not in {MODULES} and not callable(getattr(reid3d, name))])
"""
    assert run(code).split() == []


def test_import_loads_nothing():
    """Neither torch nor any dependency until a name is used; nothing printed; the version is there at once."""
    code = """
import sys
before = set(sys.modules)
import reid3d
print(reid3d.__version__, *sorted({name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
"""
    assert run(code).split() == [reid3d.__version__, "reid3d"]


def test_using_the_package_imports_no_optional_package():
    code = f"""
import sys, reid3d
for name in reid3d.__all__:
    getattr(reid3d, name)
print(*[name for name in {OPTIONAL} if name in sys.modules])
"""
    assert run(code).split() == []


def test_features_and_search_need_no_preprocessing_and_no_command_line():
    code = """
import sys, reid3d
reid3d.open_dataset, reid3d.create_model, reid3d.extract, reid3d.evaluate, reid3d.search, reid3d.view, reid3d.ops
print(*[name for name in sys.modules if name == "jsonargparse" or name.startswith("reid3d.preprocess")])
"""
    assert run(code).split() == []
