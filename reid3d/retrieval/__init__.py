"""From features to answers: the feature file, exact search, and the metrics of the field."""

from .features import Features, extract
from .metrics import Chance, PerQuery, Result, evaluate
from .search import Ranks, search

__all__ = ["Chance", "Features", "PerQuery", "Ranks", "Result", "evaluate", "extract", "search"]
