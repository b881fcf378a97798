"""Synthetic pedestrians: people, renderer, and data sets in Market-1501's layout."""

from .market import synth as synth
