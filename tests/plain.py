"""Scenes of the kind that the shipped fitter was trained on: people who walk or stand in tops and trousers."""

from dataclasses import replace
from math import pi

import numpy as np

from reid3d.preprocess.synth.people import STAND, WALK, sample_poses
from reid3d.preprocess.synth.render import sample_scenes


def plain_scenes(n: int, rng: np.random.Generator) -> tuple:
    """As sample_scenes, without skirts, coats, hats, loads and cycles; of bags only backpacks."""
    people, _, _, streets, shots = sample_scenes(n, rng)
    none = np.zeros(n, dtype=np.int64)
    backpack = (people.bag == 1).astype(np.int64)
    people = replace(people, skirt=np.zeros(n), hat=none, hairdo=none, bag=backpack)
    action = np.where(rng.random(n) < 0.2, STAND, WALK)
    return people, sample_poses(people, rng.uniform(0, 2 * pi, n), action, rng), action, streets, shots
