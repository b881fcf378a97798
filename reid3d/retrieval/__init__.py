"""From features to answers: the feature file, exact search, and the metrics of the field."""

from .calibrate import Calibration, Threshold, calibrate
from .features import Features, extract
from .metrics import Chance, PerQuery, Result, evaluate
from .rerank import GalleryGraph, expand, rerank
from .roc import ROC, roc
from .search import Ranks, search
from .tlift import clock_seconds, tlift

__all__ = ["ROC", "Calibration", "Chance", "Features", "GalleryGraph", "PerQuery", "Ranks", "Result", "Threshold"]
__all__ += ["calibrate", "clock_seconds", "evaluate", "expand", "extract", "rerank", "roc", "search", "tlift"]
