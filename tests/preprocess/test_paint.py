"""Pictures of streets: the kernel against plain torch bit for bit, and what can be told of a scene by hand."""

from dataclasses import replace
from math import pi

import numpy as np
import pytest
import torch

from reid3d.ops import backend, rasterize
from reid3d.preprocess.synth.paint import (
    BAG,
    GROUNDS,
    MATERIAL,
    OUTFIT,
    PATTERNS,
    QUAD,
    TEXTURES,
    TOP,
    VIEW,
    Picture,
    Scene,
    pack,
    paint,
)
from reid3d.preprocess.synth.painter import blur, cell, noise, paint_reference, scramble
from reid3d.preprocess.synth.people import ACTIONS, BAGS, HATS, People, sample_people, sample_poses
from reid3d.preprocess.synth.render import Renderer, half_kernel
from reid3d.preprocess.synth.street import Shots, Streets, make_quads, sample_shots, sample_streets

compiled = pytest.mark.skipif(
    backend() == "torch", reason="THE EXTENSION IS NOT BUILT: the reference would be compared with itself"
)
TABLES = {"quad": QUAD, "material": MATERIAL, "view": VIEW}
PLACE = {name: dict(zip(t, np.cumsum([0, *t.values()])[:-1].tolist(), strict=True)) for name, t in TABLES.items()}
PER_IMAGE = ("rest", "transforms", "worn", "outfit", "part_material", "material", "quad", "view", "taps", "tone")


def changed(scene: Scene, table: str, **values: float) -> Scene:
    """The scene with other columns of width 1 in all rows of a table."""
    rows = getattr(scene, table).clone()
    for name, value in values.items():
        rows[..., PLACE[table][name]] = value
    return scene._replace(**{table: rows})


def column(scene: Scene, table: str, name: str) -> torch.Tensor:
    return getattr(scene, table)[..., PLACE[table][name]]


def contiguous(scene: Scene) -> list:
    return [x.contiguous() if isinstance(x, torch.Tensor) else x for x in scene]


def capture(people: People, poses: np.ndarray, action: np.ndarray, streets: Streets, shots: Shots) -> Scene:
    """What the renderer hands to paint."""
    scenes = []

    def spy(scene: Scene, height: int) -> Picture:
        scenes.append(scene)
        return paint(scene, height)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reid3d.preprocess.synth.render.paint", spy)
        Renderer()(people, poses, action, streets, shots)
    (scene,) = scenes
    return scene


@pytest.fixture(scope="module")
def captured() -> Scene:
    """Random crops: one with walls of each texture and a top of each pattern, and between them all that is worn, held
    and ridden.
    """
    n, rng = len(TEXTURES), np.random.default_rng(0)
    people = sample_people(n, rng)
    pattern = people.pattern.copy()
    pattern[:, TOP] = 1 + np.arange(n) % (len(PATTERNS) - 1)
    scale = np.select([pattern == 4, pattern == 9, (pattern == 5) | (pattern == 6)], [0.3, 0.03, 0.12], 8.0)
    people = replace(
        people, pattern=pattern, scale=scale, bag=1 + np.arange(n) % (len(BAGS) - 1), hat=np.arange(n) % len(HATS),
        hairdo=np.arange(n) % 4, skirt=np.arange(n) % 3 * 0.3,
    )  # fmt: skip
    action = np.arange(n) % len(ACTIONS)
    poses = sample_poses(people, rng.uniform(0, 2 * pi, n), action, rng)
    shots = sample_shots(n, rng)
    shots = replace(
        shots, height=np.full(n, 1.5), fill=np.full(n, 0.9), shift=np.zeros((n, 2)), noise=shots.noise + 0.005,
        heading=np.arange(n) % 2 * pi + 0.6,  # the panel from the front, the print from behind
    )  # fmt: skip
    streets = sample_streets(n, rng, np.hypot(shots.x, shots.z), occluders=0.3)
    quads = streets.quads.copy()
    wall = quads[..., PLACE["quad"]["width"]] > 5
    quads[..., PLACE["quad"]["kind"]] = np.where(wall, np.arange(n)[:, None], quads[..., PLACE["quad"]["kind"]])
    streets = replace(streets, quads=quads, ground=np.arange(n) % len(GROUNDS), shadow=np.arange(n) % 2 * 0.5)
    return capture(people, poses, action, streets, shots)


@compiled
@pytest.mark.parametrize("height", [128, 37])
def test_equals_the_reference_bit_for_bit(captured, height):
    got, want = paint(captured, height), Picture(*paint_reference(*contiguous(captured), height))
    for name in Picture._fields:
        assert torch.equal(getattr(got, name), getattr(want, name)), name


@compiled
def test_those_scenes_show_everything(captured):
    whole = paint(captured, 128)

    def shows(other: Scene) -> bool:
        return not torch.equal(paint(other, 128).image, whole.image)

    for kind, name in enumerate(TEXTURES):
        some = column(captured, "quad", "kind") == kind
        width = torch.where(some, 0.0, column(captured, "quad", "width"))
        assert shows(changed(captured, "quad", width=width)), name
    for kind, name in enumerate(PATTERNS[1:], 1):
        pattern = column(captured, "material", "pattern")
        assert shows(changed(captured, "material", pattern=torch.where(pattern == kind, 0.0, pattern))), name
    for kind, name in enumerate(GROUNDS):
        ground = column(captured, "view", "ground")
        assert shows(changed(captured, "view", ground=torch.where(ground == kind, (kind + 1.0) % 3, ground))), name
    for part in range(7):  # skirt, bag, hat, brim, hair, load, wheel
        assert whole.shown[:, captured.faces[captured.part == part].unique()].any(), part
    straps = captured.material.clone()
    straps[:, BAG, :3] += 0.2
    skin = captured._replace(part_material=torch.zeros_like(captured.part_material))  # but for straps, no bag is drawn
    assert not torch.equal(paint(skin, 128).image, paint(skin._replace(material=straps), 128).image)
    shadow = column(captured, "view", "shadow")
    assert (shadow > 0).any() and (shadow == 0).any() and shows(changed(captured, "view", shadow=0.0))
    assert (whole.seen != whole.mask).any()
    for lens in range(2):
        taps = captured.taps.clone()
        taps[:, lens] = torch.tensor([1.0, 0, 0, 0, 0])
        assert shows(captured._replace(taps=taps)), lens
    assert shows(changed(captured, "view", noise=0.0))


def test_pictures_agree_with_themselves(captured):
    picture = paint(captured, 128)
    assert not (picture.seen & ~picture.mask).any() and 0.1 < picture.mask.float().mean() < 0.6
    assert (picture.depth[~picture.mask] == 0).all() and picture.depth[picture.mask].abs().max() < 1.5
    third = captured._replace(**{name: getattr(captured, name)[2:3] for name in PER_IMAGE})
    alone = paint(third, 128)
    assert all(torch.equal(one[0], every[2]) for one, every in zip(alone, picture, strict=True))


def test_scramble_against_whole_numbers():
    for v in (0, 1, 77, 2**24 - 1, 2**31, 2**32 - 1, -1, -3):
        state = (v % 2**32 * 747796405 + 2891336453) % 2**32
        word = ((state >> ((state >> 28) + 4)) ^ state) * 277803737 % 2**32
        assert scramble(torch.tensor(v)).item() == (word >> 22) ^ word


def test_noise_is_random_at_whole_places_and_continuous_between():
    x, y = torch.rand(2, 50_000, generator=torch.Generator().manual_seed(0)) * 400 - 200
    value = noise(x, y, 5)
    assert abs(value.mean() - 0.5) < 0.01 and value.min() >= 0 and value.max() < 1 and value.std() > 0.15
    # The steepest that it can be is 1.5, the slope of 3 t^2 - 2 t^3 in the middle.
    assert (noise(x + 0.01, y, 5) - value).abs().max() < 0.016 and (noise(x, y - 0.01, 5) - value).abs().max() < 0.016
    whole = torch.arange(-20.0, 20)
    torch.testing.assert_close(noise(whole, -whole, 5), cell(whole, -whole, 5))
    near = noise(whole - 1e-4, -whole + 1e-4, 5)
    torch.testing.assert_close(near, cell(whole, -whole, 5), atol=1e-3, rtol=0)
    assert (noise(x, y, 6) - value).abs().mean() > 0.1


@pytest.mark.parametrize("sigma", [0.0, 0.4, 1.1, 2.0])
def test_blur_keeps_what_is_constant_and_spreads_a_dot(sigma):
    taps = torch.from_numpy(half_kernel(np.array([sigma]))[0]).float()
    assert abs(taps[0] + 2 * taps[1:].sum() - 1) < 1e-6
    torch.testing.assert_close(blur(torch.full((3, 9, 64), 0.7), taps), torch.full((3, 9, 64), 0.7))
    dot = torch.zeros(3, 20, 64)
    dot[:, 10, 30] = 1
    kernel = torch.cat([taps[1:].flip(0), taps])
    torch.testing.assert_close(blur(dot, taps)[1, 6:15, 26:35], kernel[:, None] * kernel)


CAMERA = torch.tensor([[1.0, 0, 0], [0, -1, 0], [0, 0, 1]])  # right, down and forward in the world: upright, level


def figure_of_cardboard(camera: torch.Tensor = CAMERA, quads: np.ndarray | None = None, **view: object) -> Scene:
    """A black board, 1 m wide and 2 m high, 4 m before a camera that is 1 m above the ground; all about it is black."""
    rest = torch.tensor([[[-0.5, -1, 0], [-0.5, 1, 0], [0.5, 1, 0], [0.5, -1, 0]]])
    body = torch.eye(4)[:3]
    body[:, :3] = camera.T @ CAMERA  # upright in the world
    dark = dict.fromkeys(("sky", "haze", "ground_colour", "ground_second"), np.zeros(3))
    flags = dict.fromkeys(("ambient", "sun", "shadow", "noise", "seed", "ground", "ground_seed", "x", "z"), 0.0)
    values = {
        "up": camera.T @ torch.tensor([0.0, 1, 0]), "light": camera.T @ torch.tensor([0.0, 1, 0]), "distance": 4.0,
        "tall": 64.0, "column": 32.0, "row": 64.0, "rotation": camera.flatten(), "gain": np.ones(3),
        "ground_scale": 1.0,
    }  # fmt: skip
    outfit = {name: np.zeros(1) for name in OUTFIT} | {"boot": np.full(1, 2.0)}
    material = {
        name: np.full((1, 1, width), 0.5) if width == 3 else np.zeros((1, 1)) for name, width in MATERIAL.items()
    }
    return Scene(
        rest=rest,
        transforms=body.reshape(1, 1, 12),
        joint=torch.zeros(4, 4, dtype=torch.int64),
        weight=torch.full((4, 4), 0.25),
        worn=torch.zeros(1, 0, 3),
        framed=4,
        faces=torch.tensor([[0, 1, 2], [0, 2, 3]]),
        part=torch.tensor([-1, -1]),
        fields=torch.zeros(4, 8),
        outfit=pack(OUTFIT, outfit),
        part_material=torch.zeros(1, 1, dtype=torch.int64),
        material=pack(MATERIAL, material),
        quad=torch.zeros(1, 0, sum(QUAD.values())) if quads is None else torch.from_numpy(quads[None]).float(),
        view=pack(VIEW, {k: np.asarray(v)[None] for k, v in (dark | flags | values | view).items()}),
        taps=torch.tensor([[[1.0, 0, 0, 0, 0]] * 2]),
        tone=(torch.arange(257) / 255).clamp(max=1)[None],
    )  # fmt: skip


def board(x: float, z: float, turn: float, width: float, bottom: float, top: float, before: bool) -> np.ndarray:
    """White, one of (1,columns of QUAD)."""
    numbers = dict(x=x, z=z, turn=turn, width=width, bottom=bottom, top=top, kind=0, size=1, seed=1)
    white = np.ones((1, 3))
    quad = make_quads(**{name: np.full(1, value) for name, value in numbers.items()}, colour=white, second=white)
    quad[:, PLACE["quad"]["before"]] = before
    return quad


EVERYWHERE = dict(x=0.0, turn=0.0, width=40.0, bottom=-30.0, top=30.0)
PERSON = torch.zeros(128, 64, dtype=torch.bool)
PERSON[32:96, 16:48] = True  # 64 pixels for 2 m


def test_without_light_the_person_is_black():
    grey = np.full(3, 0.6)
    picture = paint(figure_of_cardboard(sky=grey, haze=grey, ground_colour=grey, ground_second=grey), 128)
    assert torch.equal(picture.mask[0], PERSON) and torch.equal(picture.seen[0], PERSON) and picture.shown.all()
    assert (picture.image[0][PERSON] == 0).all() and (picture.image[0][~PERSON] > 0).all()
    torch.testing.assert_close(picture.frame[0], torch.tensor([128.0, 32, 64, 1]))
    assert picture.depth.abs().max() < 1e-5
    # of light that falls straight on it the board gives back its colour, one half
    lit = paint(figure_of_cardboard(sun=1.0, light=np.array([0.0, 0, -1])), 128)
    assert (lit.image[0][PERSON] == 128).all() and (lit.image[0][~PERSON] == 0).all()


def test_a_wall_hides_the_person_only_from_before_them():
    behind = paint(figure_of_cardboard(quads=board(z=9.0, before=False, **EVERYWHERE)), 128)
    assert torch.equal(behind.mask[0], PERSON) and torch.equal(behind.seen[0], PERSON) and behind.shown.all()
    assert (behind.image[0][PERSON] == 0).all() and (behind.image[0][~PERSON] > 200).all()
    before = paint(figure_of_cardboard(quads=board(z=2.0, before=True, **EVERYWHERE)), 128)
    assert torch.equal(before.mask[0], PERSON) and not before.seen.any() and not before.shown.any()
    assert (before.image > 200).all() and torch.equal(before.depth, behind.depth)
    # one that ends at the middle of the image hides neither face as a whole
    half = paint(figure_of_cardboard(quads=board(-10.0, 2.0, 0.0, 20.0, -30.0, 30.0, True)), 128)
    assert torch.equal(half.seen[0], PERSON & (torch.arange(64) >= 32)) and half.shown.all()


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(
    ("x", "z", "width", "bottom", "top"),
    [(-0.05, 2.0, 0.5, 0.2, 1.3), (0.4, 5.0, 1.1, 0.0, 2.5), (3.0, 8.0, 4.0, -1.0, 1.7), (0.0, 0.9, 0.2, 0.9, 1.05)],
)
def test_a_board_that_faces_the_camera_covers_the_pixels_between_its_corners(x, z, width, bottom, top, before):
    picture = paint(figure_of_cardboard(quads=board(x, z, 0.0, width, bottom, top, before)), 128)
    left, right = ((x + side * width / 2) / z * 128 + 32 for side in (-1, 1))
    above, below = ((1 - level) / z * 128 + 64 for level in (top, bottom))
    column, row = torch.arange(64) + 0.5, (torch.arange(128) + 0.5)[:, None]
    want = (left <= column) & (column < right) & (above <= row) & (row < below)
    assert 30 < want.sum() < 64 * 128 / 2
    assert torch.equal((picture.image[0] > 0).all(-1), want if before else want & ~PERSON)
    assert torch.equal(picture.seen[0], PERSON & ~want if before else PERSON)


@pytest.mark.parametrize("seed", range(4))
def test_a_turned_board_lies_where_its_corners_are_projected_to(seed):
    rng = np.random.default_rng(seed)
    pan, pitch, roll = rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.4), rng.uniform(-0.2, 0.2)
    ahead = np.array([np.cos(pitch) * np.sin(pan), -np.sin(pitch), np.cos(pitch) * np.cos(pan)])
    right = np.array([np.cos(pan), 0, -np.sin(pan)])
    down = np.cross(right, ahead)
    level = np.stack([right, down, ahead], 1)
    turned = np.array([[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1]])
    camera = torch.from_numpy(level @ turned).float()
    x, z, turn, width, top = 6 * np.sin(pan), 6.0, rng.uniform(-1.2, 1.2), rng.uniform(0.5, 1.5), rng.uniform(1, 2)
    picture = paint(figure_of_cardboard(camera, board(x, z, turn, width, 0.0, top, True)), 128)
    zoom, x0, y0, height = picture.frame[0]
    ends = np.array([x, z]) + np.array([[-0.5], [0.5]]) * width * np.array([np.cos(turn), np.sin(turn)])
    corners = torch.tensor([[e[0], y, e[1]] for e, y in ((ends[0], top), (ends[0], 0), (ends[1], 0), (ends[1], top))])
    local = (corners.float() - torch.tensor([0, height, 0])) @ camera
    points = torch.cat([local[:, :2] / local[:, 2:] * zoom + torch.stack([x0, y0]), local[:, 2:]], 1)
    want = rasterize(points[None], torch.tensor([[0, 1, 2], [0, 2, 3]]), 128, 64).face[0] >= 0
    assert want.sum() > 100
    assert ((picture.image[0] > 0).all(-1) != want).sum() <= 2  # a centre on an edge


@pytest.mark.parametrize("name", ["outfit", "material", "quad", "view"])
@pytest.mark.parametrize("op", [torch.ops.reid3d.paint, paint_reference], ids=["op", "reference"])
def test_tables_of_other_columns_are_refused(op, name):
    scene = figure_of_cardboard(quads=board(z=9.0, before=False, **EVERYWHERE))
    rows = getattr(scene, name)
    for wrong in (rows[..., :-1], torch.cat([rows, rows[..., :1]], -1)):
        with pytest.raises(RuntimeError, match=f"{name} must have {rows.shape[-1]} columns, got {wrong.shape[-1]}"):
            op(*contiguous(scene._replace(**{name: wrong})), 128)


@pytest.mark.skipif(backend() == "torch", reason="the kernel's own check")
@pytest.mark.parametrize("name", ["rest", "transforms", "joint", "weight", "worn", "part", "fields", "taps", "tone"])
def test_tensors_of_other_shapes_are_refused(name):
    scene = figure_of_cardboard(quads=board(z=9.0, before=False, **EVERYWHERE))
    whole = getattr(scene, name)
    for wrong in (whole[..., :-1], torch.cat([whole, whole]), whole[None]):
        with pytest.raises(RuntimeError, match=r"\w+ must (have|be|hold)"):
            torch.ops.reid3d.paint(*contiguous(scene._replace(**{name: wrong})), 128)


@pytest.mark.skipif(backend() == "torch", reason="the kernel's own check")
@pytest.mark.parametrize("framed", [-1, 0, 5])
def test_nothing_or_too_much_to_frame_is_refused(framed):
    scene = figure_of_cardboard(quads=board(z=9.0, before=False, **EVERYWHERE))
    with pytest.raises(RuntimeError, match="framed must be between 1 and 4"):
        torch.ops.reid3d.paint(*contiguous(scene._replace(framed=framed)), 128)


@pytest.mark.skipif(backend() == "torch", reason="no kernels were built")
@pytest.mark.parametrize("name", ["material", "view", "rest", "worn", "quad", "taps", "tone"])
def test_what_is_no_number_does_no_harm(name):
    scene = figure_of_cardboard(quads=board(z=9.0, before=False, **EVERYWHERE))
    bad = torch.full_like(getattr(scene, name), torch.nan)
    image = torch.ops.reid3d.paint(*contiguous(scene._replace(**{name: bad})), 128)[0]
    assert image.shape == (1, 128, 64, 3)


@pytest.mark.parametrize(
    ("name", "bad", "rule"),
    [
        ("faces", -1, "faces must hold indices between 0 and 3"),
        ("faces", 4, "faces must hold indices between 0 and 3"),
        ("joint", 1, "joint must hold indices between 0 and 0"),
        ("part", -2, "part must hold indices between -1 and 0"),
        ("part", 1, "part must hold indices between -1 and 0"),
        ("part_material", 1, "part_material must hold indices between 0 and 0"),
    ],
)
@pytest.mark.parametrize("op", [torch.ops.reid3d.paint, paint_reference], ids=["op", "reference"])
def test_indices_out_of_range_are_refused(op, name, bad, rule):
    scene = figure_of_cardboard()
    indices = getattr(scene, name).clone()
    indices.view(-1)[-1] = bad
    with pytest.raises(RuntimeError, match=rule):
        op(*contiguous(scene._replace(**{name: indices})), 128)
