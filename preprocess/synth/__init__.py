"""Synthetic pedestrians: people, streets, renderer, and worlds as data sets in Market-1501's layout."""

from .world import synth as synth
