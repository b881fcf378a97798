"""Person re-identification in 3D space: a crop becomes a coloured point cloud, and OG-Net finds the same person.

Public names are loaded when they are first used, so that `import reid3d` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "PointCloud": "reid3d.cloud",
    "open_dataset": "reid3d.data",
    "create_model": "reid3d.models",
    "list_models": "reid3d.models",
    "Features": "reid3d.retrieval",
    "Ranks": "reid3d.retrieval",
    "Result": "reid3d.retrieval",
    "evaluate": "reid3d.retrieval",
    "extract": "reid3d.retrieval",
    "rerank": "reid3d.retrieval",
    "search": "reid3d.retrieval",
    "tlift": "reid3d.retrieval",
    "view": "reid3d.viewer",
    "convert": "reid3d.preprocess.convert",
    "synth": "reid3d.preprocess.synth",
}

if TYPE_CHECKING:
    from . import explain as explain
    from . import ops as ops
    from .cloud import PointCloud as PointCloud
    from .data import open_dataset as open_dataset
    from .models import create_model as create_model
    from .models import list_models as list_models
    from .preprocess.convert import convert as convert
    from .preprocess.synth import synth as synth
    from .retrieval import Features as Features
    from .retrieval import Ranks as Ranks
    from .retrieval import Result as Result
    from .retrieval import evaluate as evaluate
    from .retrieval import extract as extract
    from .retrieval import rerank as rerank
    from .retrieval import search as search
    from .retrieval import tlift as tlift
    from .viewer import view as view

__all__ = [*_HOMES, "explain", "ops"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in ("explain", "ops", "retrieval"):
        return import_module(f"reid3d.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'reid3d' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
