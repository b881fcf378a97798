"""Streets and cameras: where synthetic people walk, and how they are filmed."""

from dataclasses import dataclass, fields, replace
from math import pi
from typing import TypeVar

import numpy as np

from .paint import QUAD, TEXTURES
from .people import sample_colours

T = TypeVar("T", "Streets", "Shots")
COLUMN = dict(zip(QUAD, np.cumsum([0, *QUAD.values()])[:-1].tolist(), strict=True))
WALLS, BUSHES, TREES, CARS, FIGURES, POLES, OCCLUDERS = 4, 3, 2, 2, 4, 2, 3
PLAIN, BRICKS, WINDOWS, SLATS, BLOCKS, FOLIAGE, FIGURE, CAR, FENCE = range(len(TEXTURES))


@dataclass(frozen=True)
class Streets:
    """n places, each before a camera that stands at x = z = 0; every field is an array with leading size n."""

    quads: np.ndarray  # (n,S,columns of paint.QUAD), the farther first; "before" is left to the shot
    ground: np.ndarray  # (n,) index of paint.GROUNDS
    ground_scale: np.ndarray  # (n,) repeats per metre
    ground_seed: np.ndarray  # (n,)
    ground_colour: np.ndarray  # (n,3)
    ground_second: np.ndarray  # (n,3)
    sky: np.ndarray  # (n,3)
    haze: np.ndarray  # (n,3)
    towards_sun: np.ndarray  # (n,3) unit vector in the world
    ambient: np.ndarray  # (n,)
    sun: np.ndarray  # (n,)
    shadow: np.ndarray  # (n,) how dark the person's shadow is, 0 under clouds

    def __getitem__(self, index: np.ndarray) -> "Streets":
        return _rows(self, index)


@dataclass(frozen=True)
class Shots:
    """How n images are taken; every field is an array with leading size n. Angles are radians."""

    x: np.ndarray  # (n,) where on the ground the person is, metres to the right of the camera
    z: np.ndarray  # (n,) and before it
    heading: np.ndarray  # (n,) where they face: 0 towards the camera, pi/2 to the image's right
    height: np.ndarray  # (n,) of the camera above the ground, metres
    roll: np.ndarray  # (n,)
    fill: np.ndarray  # (n,) height of the person relative to the crop's
    shift: np.ndarray  # (n,2) of the person's box from the crop's centre, in crop widths and heights
    gain: np.ndarray  # (n,3) exposure and white balance
    gamma: np.ndarray  # (n,)
    contrast: np.ndarray  # (n,) 0 for none: how far the tone curve bends
    defocus: np.ndarray  # (n,) blur of what is behind the person, pixels
    blur: np.ndarray  # (n,) of everything, pixels
    noise: np.ndarray  # (n,) standard deviation, of 1
    seed: np.ndarray  # (n,) of the noise
    quality: np.ndarray  # (n,) of JPEG

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: np.ndarray) -> "Shots":
        return _rows(self, index)


def _rows(table: T, index: np.ndarray) -> T:
    return replace(table, **{f.name: getattr(table, f.name)[index] for f in fields(table)})


def make_quads(**values: np.ndarray) -> np.ndarray:
    """Quads (...,columns of paint.QUAD), standing on the middle of their foot at (x, z).

    x, z, turn (radians from facing the camera), width, bottom, top, kind, size, seed: (...). colour, second: (...,3).
    """
    shape = np.broadcast_shapes(*(np.shape(v) for k, v in values.items() if k not in ("colour", "second")))
    full = {k: np.broadcast_to(v, shape) for k, v in values.items() if k not in ("colour", "second")}
    out = np.zeros((*shape, sum(QUAD.values())))
    along = np.stack([np.cos(full["turn"]), np.sin(full["turn"])], -1)
    foot = np.stack([full["x"], full["z"]], -1) - along * full["width"][..., None] / 2
    out[..., [COLUMN["x"], COLUMN["z"]]], out[..., [COLUMN["dx"], COLUMN["dz"]]] = foot, along
    for name in ("width", "bottom", "top", "kind", "size", "seed"):
        out[..., COLUMN[name]] = full[name]
    for name in ("colour", "second"):
        out[..., COLUMN[name] : COLUMN[name] + 3] = values[name]
    return out


def sample_figures(rng: np.random.Generator, x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Passers-by who stand at (x, z), any shape."""
    shape = x.shape
    tall = rng.uniform(1.5, 1.9, shape)
    return make_quads(
        x=x, z=z, turn=np.arctan2(-x, z), width=0.4 * tall, bottom=np.zeros(shape), top=tall,
        kind=np.full(shape, FIGURE), size=rng.uniform(0.0, 0.35, shape), seed=rng.integers(1 << 20, size=shape),
        colour=sample_colours(rng, shape), second=sample_colours(rng, shape) * 0.7,
    )  # fmt: skip


def sample_obstacles(rng: np.random.Generator, x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Posts, bins, hedges, railings and now and then a car at (x, z), any shape."""

    def uniform(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, x.shape)

    kind = rng.choice([PLAIN, SLATS, CAR, FOLIAGE, FENCE], x.shape, p=[0.38, 0.08, 0.08, 0.2, 0.26])
    post = (kind == PLAIN) & (uniform(0, 1) < 0.5)
    wide = np.select(
        [post, kind == CAR, kind == FOLIAGE, kind == FENCE],
        [uniform(0.08, 0.3), 4.3 + 0 * x, uniform(0.8, 2.5), uniform(2, 6)],
        uniform(0.4, 1.0),
    )
    tall = np.select(
        [post, kind == CAR, kind == FENCE], [3.5 + 0 * x, 1.45 + 0 * x, uniform(0.8, 1.15)], uniform(0.4, 1.05)
    )
    leaves = (kind == FOLIAGE)[..., None]
    paint = np.where(leaves, np.array([0.13, 0.2, 0.07]), sample_colours(rng, x.shape, 0.4))
    return make_quads(
        x=x, z=z, turn=0 * x, width=wide, bottom=np.where(kind == FOLIAGE, -0.2, 0.0), top=tall, kind=kind,
        size=np.where(kind == FENCE, uniform(0.12, 0.3), 1.0), seed=rng.integers(1 << 20, size=x.shape), colour=paint,
        second=np.where((kind == CAR)[..., None], 0.12, paint * 1.8),
    )  # fmt: skip


def sample_streets(n: int, rng: np.random.Generator, lane: np.ndarray, occluders: float = 0.15) -> Streets:
    """n streets whose people walk about lane (n,) metres away; each occluder is there with that probability."""

    def uniform(low: float, high: float, count: int) -> np.ndarray:
        return rng.uniform(low, high, (n, count))

    def seeds(count: int) -> np.ndarray:
        return rng.integers(1 << 20, size=(n, count))

    lane = lane[:, None]
    back = lane + 2 + 22 * uniform(0, 1, 1) ** 1.5
    muted = uniform(0.5, 1.1, 1)[..., None]

    # Walls side by side; some low, with the sky above.
    width = uniform(5, 16, WALLS)
    right = np.cumsum(width, 1) - width.sum(1, keepdims=True) / 2 + uniform(-3, 3, 1)
    kind = rng.choice(
        [PLAIN, BRICKS, WINDOWS, SLATS, BLOCKS, FOLIAGE], (n, WALLS), p=[0.22, 0.2, 0.26, 0.1, 0.14, 0.08]
    )
    size = np.select(
        [kind == BRICKS, kind == WINDOWS, kind == SLATS],
        [uniform(0.3, 0.6, WALLS), uniform(1.6, 3.2, WALLS), uniform(0.5, 1.5, WALLS)],
        uniform(0.5, 2.5, WALLS),
    )
    wall, trim = sample_colours(rng, (n, WALLS), 0.35) * muted, sample_colours(rng, (n, WALLS), 0.4) * muted
    glass = np.array([0.16, 0.2, 0.24]) * uniform(0.5, 2.2, WALLS)[..., None]
    near = np.where((kind == BRICKS)[..., None], wall * 0.6 + 0.1, trim)
    leaves = np.array([0.12, 0.2, 0.07]) * uniform(0.6, 1.6, WALLS)[..., None]
    walls = make_quads(
        x=right - width / 2, z=back + uniform(-0.5, 0.5, WALLS), turn=rng.normal(0, 0.12, (n, WALLS)),
        width=width * 1.08, bottom=np.zeros((n, WALLS)), top=uniform(2.2, 11, WALLS),
        kind=kind, size=size, seed=seeds(WALLS),
        colour=np.where((kind == FOLIAGE)[..., None], leaves, wall),
        second=np.where((kind == WINDOWS)[..., None], glass, np.where((kind == FOLIAGE)[..., None], leaves * 2, near)),
    )  # fmt: skip

    def somewhere(count: int, spread: float = 0.55) -> tuple[np.ndarray, np.ndarray]:
        """Between the lane and the walls."""
        z = lane + 1.2 + uniform(0, 1, count) * (back - lane - 1.4).clip(0.3)
        return uniform(-spread, spread, count) * z, z

    def there(count: int, p: float) -> np.ndarray:
        return rng.random((n, count)) < p

    x, z = somewhere(BUSHES)
    green = np.array([0.11, 0.19, 0.06]) * uniform(0.5, 1.8, BUSHES)[..., None]
    bush = uniform(0.8, 2.2, BUSHES)
    bushes = make_quads(
        x=x, z=z, turn=0 * x, width=uniform(1.2, 5, BUSHES) * there(BUSHES, 0.5), bottom=0 * x - 0.15 * bush, top=bush,
        kind=np.full(x.shape, FOLIAGE), size=x * 0 + 1, seed=seeds(BUSHES), colour=green, second=green * 2.2 + 0.03,
    )  # fmt: skip
    x, z = somewhere(TREES)
    standing, stem = there(TREES, 0.5), np.array([0.2, 0.16, 0.12]) * uniform(0.6, 1.5, TREES)[..., None]
    green = np.array([0.12, 0.19, 0.06]) * uniform(0.5, 1.8, TREES)[..., None]
    low = uniform(1.6, 2.6, TREES)
    trees = make_quads(
        x=x, z=z, turn=0 * x, width=uniform(2, 5, TREES) * standing, bottom=low, top=low + uniform(2, 4, TREES),
        kind=np.full(x.shape, FOLIAGE), size=x * 0 + 1, seed=seeds(TREES), colour=green, second=green * 2.2,
    )  # fmt: skip
    stems = make_quads(
        x=x, z=z, turn=0 * x, width=uniform(0.15, 0.4, TREES) * standing, bottom=0 * x, top=low + 0.7,
        kind=np.full(x.shape, PLAIN), size=x * 0 + 1, seed=seeds(TREES), colour=stem, second=stem,
    )  # fmt: skip
    x, z = somewhere(CARS, 0.8)
    glass = np.array([0.1, 0.12, 0.14]) * uniform(0.6, 2, CARS)[..., None]
    cars = make_quads(
        x=x, z=z, turn=rng.normal(0, 0.25, x.shape), width=uniform(3.8, 4.8, CARS) * there(CARS, 0.4), bottom=0 * x,
        top=uniform(1.4, 1.8, CARS), kind=np.full(x.shape, CAR), size=x * 0 + 1, seed=seeds(CARS),
        colour=sample_colours(rng, x.shape, 0.4), second=glass,
    )  # fmt: skip
    figures = sample_figures(rng, *somewhere(FIGURES, 0.3))
    figures[..., COLUMN["width"]] *= there(FIGURES, 0.3)
    x, z = somewhere(POLES, 0.4)
    poles = make_quads(
        x=x, z=z, turn=0 * x, width=uniform(0.08, 0.3, POLES) * there(POLES, 0.5),
        bottom=0 * x, top=uniform(2, 7, POLES),
        kind=np.full(x.shape, PLAIN), size=x * 0 + 1, seed=seeds(POLES), colour=sample_colours(rng, x.shape, 0.2),
        second=sample_colours(rng, x.shape),
    )  # fmt: skip

    z = lane * uniform(0.55, 0.9, OCCLUDERS)
    front = sample_obstacles(rng, uniform(-0.28, 0.28, OCCLUDERS) * z, z)
    front[..., COLUMN["width"]] *= there(OCCLUDERS, occluders)

    quads = np.concatenate([walls, bushes, trees, stems, cars, figures, poles, front], 1)
    middle = (
        quads[..., [COLUMN["x"], COLUMN["z"]]]
        + quads[..., [COLUMN["dx"], COLUMN["dz"]]] * quads[..., [COLUMN["width"]]] / 2
    )
    order = np.argsort(-(middle**2).sum(-1), axis=1, kind="stable")
    ground = rng.choice(3, n, p=[0.4, 0.45, 0.15])
    grey = uniform(0.22, 0.62, 1) + rng.normal(0, 0.03, (n, 3))
    grass = np.array([0.2, 0.27, 0.12]) * uniform(0.7, 1.4, 1)
    soil = np.where((ground == 2)[:, None], grass, grey).clip(0.05, 0.9)
    azimuth, elevation = rng.uniform(-pi, pi, n), rng.uniform(0.35, 1.2, n)
    clear = rng.random(n) < 0.5
    overcast = uniform(0.55, 0.95, 1) * np.array([1.0, 1.01, 1.03])
    blue = np.array([0.4, 0.6, 0.88]) * uniform(0.8, 1.1, 1)
    return Streets(
        quads=np.take_along_axis(quads, order[..., None], 1),
        ground=ground,
        ground_scale=np.where(ground == 1, rng.uniform(0.8, 2.5, n), rng.uniform(0.8, 1.5, n)),
        ground_seed=rng.integers(1 << 20, size=n),
        ground_colour=soil,
        ground_second=np.where(
            (ground == 0)[:, None], 0.8, np.where((ground == 1)[:, None], soil * uniform(0.55, 1.3, 1), soil * 0.6)
        ),
        sky=np.where(clear[:, None], blue, overcast),
        haze=overcast,
        towards_sun=np.stack(
            [np.cos(elevation) * np.sin(azimuth), np.sin(elevation), -np.cos(elevation) * np.cos(azimuth)], 1
        ),
        ambient=np.where(clear, rng.uniform(0.35, 0.6, n), rng.uniform(0.7, 1.0, n)),
        sun=np.where(clear, rng.uniform(0.55, 0.95, n), rng.uniform(0.05, 0.3, n)),
        shadow=np.where(clear, rng.uniform(0.3, 0.55, n), 0.0),
    )  # fmt: skip


def sample_shots(n: int, rng: np.random.Generator) -> Shots:
    """Shots far more varied than any camera's, for training."""
    far = 3.5 * 4.5 ** rng.random(n)
    steep = (rng.normal(0, 0.1, n) + np.array([0.05, 0.2, 0.4])[rng.choice(3, n, p=[0.5, 0.35, 0.15])]).clip(-0.12, 0.7)
    shift = rng.normal(0, 1, (n, 2)) * np.array([0.05, 0.025])
    fill = (0.92 + rng.normal(0, 0.05, n)).clip(0.75, 1.12)
    cut = rng.random(n) < 0.12  # the box ends at the knees
    shift[:, 1] += np.where(cut, rng.uniform(0.05, 0.3, n), 0.0)
    bearing = rng.normal(0, 0.15, n)
    dark = rng.random(n) < 0.12
    return Shots(
        x=far * np.sin(bearing),
        z=far * np.cos(bearing),
        heading=rng.uniform(-pi, pi, n),
        height=(0.92 + far * np.tan(steep)).clip(0.25),
        roll=rng.normal(0, 0.035, n),
        fill=np.where(cut, fill * rng.uniform(1.0, 1.25, n), fill),
        shift=shift,
        gain=(
            np.where(dark, rng.uniform(0.3, 0.55, n), rng.uniform(0.75, 1.4, n))[:, None]
            * (1 + rng.normal(0, 0.07, (n, 3)))
        ).clip(0.1),
        gamma=rng.uniform(0.6, 1.15, n),
        contrast=rng.uniform(0.0, 0.7, n),
        defocus=rng.uniform(0.0, 2.0, n),
        blur=np.where(rng.random(n) < 0.75, rng.uniform(0.4, 0.9, n), rng.uniform(0.9, 1.8, n)),
        noise=np.where(dark, rng.uniform(0.01, 0.045, n), rng.uniform(0.0, 0.025, n)),
        seed=rng.integers(1 << 24, size=n),
        quality=rng.integers(35, 95, n),
    )  # fmt: skip
