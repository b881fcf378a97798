"""From features to answers: the feature file, search, exact or by an index, and the metrics of the field."""

from .calibrate import Calibration, Threshold, calibrate
from .features import Features, extract, pair_scores
from .index import build_index
from .metrics import Chance, PerQuery, Result, evaluate
from .rerank import GalleryGraph, expand, rerank
from .roc import ROC, roc
from .search import Ranks, search
from .tlift import clock_seconds, tlift

__all__ = ["ROC", "Calibration", "Chance", "Features", "GalleryGraph", "PerQuery", "Ranks", "Result", "Threshold"]
__all__ += ["build_index", "calibrate", "clock_seconds", "evaluate", "expand", "extract", "rerank", "roc", "search"]
__all__ += ["pair_scores", "tlift"]
