"""Synthetic pedestrians: people, streets, renderer, and worlds as data sets in Market-1501's layout."""

from .truth import TrueBodies as TrueBodies
from .truth import keep_person as keep_person
from .world import synth as synth
