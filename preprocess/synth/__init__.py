"""Synthetic pedestrians: people, streets, renderer, and worlds as data sets in Market-1501's layout."""

from .truth import TrueBodies as TrueBodies
from .world import synth as synth
