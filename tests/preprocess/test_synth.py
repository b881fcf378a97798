"""Synthetic people: truth that agrees with the pixels, worlds as their knobs say, the same bytes everywhere."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import fields, replace
from math import pi
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reid3d.data.layouts import list_images
from reid3d.io import hold_folder
from reid3d.ops import backend, rasterize
from reid3d.preprocess.body import THICKNESS, load_body
from reid3d.preprocess.camera import project
from reid3d.preprocess.synth import synth
from reid3d.preprocess.synth.paint import BAG, BOTTOM, HAIR, OUTFIT, PATTERNS, SKIN, TOP, pack, regions
from reid3d.preprocess.synth.people import (
    ACTIONS,
    BAGS,
    CARRY,
    CYCLE,
    HATS,
    LOAD,
    PHONE,
    STAND,
    WALK,
    WORN,
    People,
    change_clothes,
    dress_alike,
    hsv_to_rgb,
    rotations,
    sample_people,
    sample_poses,
)
from reid3d.preprocess.synth.render import Renderer, sample_scenes
from reid3d.preprocess.synth.street import BLOCKS, COLUMN, FENCE, FOLIAGE, SLATS
from reid3d.preprocess.synth.wardrobe import ACROSS, AROUND, PIECES, Wardrobe
from reid3d.preprocess.synth.world import PRESETS, Town, World
from reid3d.preprocess.train_fitter import project_joints

NAME = re.compile(r"(-1|\d{4})_c[1-6]s[1-6]_\d{6}_\d{2}\.jpg")
SMALL = {"ids": 6, "cams": 2, "images": 3, "seed": 3}
# Of SMALL in either world, with numpy 2.4.6 and Pillow 13.0.0: a change here is another benchmark, and a new FORMAT.
FROZEN = {
    "A": "63f75d6a36267fa65a4245532d3ffe4a99bda178ddd8576a0ad86b449d050202",
    "B": "597184c7bab1c3b3ef6616cc81b2fce8ccd932f3c720b5dc14d433407e31ee04",
}
CODE = "from reid3d.preprocess.synth import synth; synth({!r}, ids=6, cams=2, images=3, seed=3, workers={})"


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file() and p.name != ".lock"
    }


def note(root: Path) -> dict:
    return json.loads((root / "synth.json").read_text())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth(tmp_path_factory.mktemp("synth") / "set", **SMALL, workers=1, progress=False)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer()


def clear(scenes: tuple, distance: float | None = None) -> tuple:
    """Scenes without blur, noise, tone and cut legs; from a distance, if one is given."""
    *rest, shots = scenes
    n = len(shots)
    zero, far = np.zeros(n), np.full(n, distance) if distance else shots.z
    shots = replace(
        shots, blur=zero, defocus=zero, noise=zero, gamma=zero + 1, contrast=zero, z=far, shift=np.zeros((n, 2)),
        x=zero if distance else shots.x, height=zero + 1 if distance else shots.height, fill=zero + 0.9,
        gain=np.ones((n, 3)),
    )  # fmt: skip
    return (*rest, shots)


# Truth


def test_the_pixels_of_the_person_are_those_that_change_with_their_clothes(renderer: Renderer) -> None:
    people, *rest = clear(sample_scenes(32, np.random.default_rng(1)))
    image, truth = renderer(people, *rest)
    other = replace(people, colour=1 - 0.5 * people.colour, second=1 - 0.5 * people.second)
    changed = (image != renderer(other, *rest)[0]).any(-1)
    both, either = (changed & truth.seen).sum((1, 2)), (changed | truth.seen).sum((1, 2))
    assert (both >= 0.99 * either).all()
    assert (truth.seen <= truth.mask).all()
    hidden = (truth.mask & ~truth.seen).sum((1, 2))
    assert 0 < (hidden > 0).sum() < 32  # something stands before some


def test_joints_are_where_the_pixels_show_them(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ball about one joint of each person, the only thing that is not black, has its middle on the joint."""
    n, radius = 48, 0.2
    people, poses, action, streets, shots = clear(sample_scenes(n, np.random.default_rng(2)), 12.0)
    shots = replace(shots, fill=np.full(n, 0.65))
    colour = np.zeros_like(people.colour)
    colour[:, LOAD] = 1
    people = replace(people, colour=colour, second=colour, rough=np.zeros_like(people.rough))
    dark = {f: np.zeros_like(getattr(streets, f)) for f in ("quads", "ground_colour", "ground_second", "sky", "haze")}
    streets = replace(streets, **dark, sun=np.zeros(n), ambient=np.ones(n))
    which = np.arange(n) % 24

    def balls(self: Wardrobe, people: People, girth, rotation, joints, action, up):
        verts = np.zeros((n, PIECES, ACROSS, AROUND, 3))
        ball = np.stack([self.cw[:, None] * self.cu, self.sw[:, None] + 0 * self.cu, self.cw[:, None] * self.su], -1)
        verts[:, 0] = joints[np.arange(n), which][:, None, None] + radius * ball
        return verts.reshape(n, -1, 3), np.full((n, PIECES), LOAD)

    monkeypatch.setattr(Wardrobe, "pieces", balls)
    image, truth = renderer(people, poses, action, streets, shots)
    lit = (image > 40).all(-1)
    joints = truth.joints2d * 64 + torch.tensor([32.0, 64.0])
    # the ball has corners
    whole = 0.93 * pi * (radius * truth.camera[:, 0] / truth.camera[:, 3]) ** 2
    clear_view = 0
    for i in range(n):
        rows, columns = lit[i].nonzero(as_tuple=True)
        if len(rows) < 0.95 * whole[i]:
            continue  # partly behind another part of the body
        if not (0 < rows.min() and rows.max() < 127 and 0 < columns.min() and columns.max() < 63):
            continue  # partly outside
        clear_view += 1
        middle = torch.tensor([columns.float().mean() + 0.5, rows.float().mean() + 0.5])
        assert (middle - joints[i, which[i]]).norm() < 1
    assert clear_view >= 10


def test_truth_is_that_of_the_body_layer(renderer: Renderer) -> None:
    scenes = clear(sample_scenes(24, np.random.default_rng(3)))
    _, truth = renderer(*scenes)
    body = load_body("low")
    verts, joints = body(truth.rotmats, truth.betas[:, :10])
    focal, x0, y0, away = truth.camera.unbind(1)
    origin = torch.stack([x0, y0], 1)[:, None]

    def pixels(points: torch.Tensor) -> torch.Tensor:
        z = points[..., 2:] + away[:, None, None]
        return torch.cat([points[..., :2] / z * focal[:, None, None] + origin, z], -1)

    torch.testing.assert_close(
        pixels(joints)[..., :2], truth.joints2d * 64 + torch.tensor([32.0, 64.0]), atol=1e-3, rtol=0
    )
    naked = rasterize(pixels(verts), body.faces, 128, 64)
    inside = naked.face >= 0
    assert (truth.mask[inside]).float().mean() > 0.995  # clothes lie over the body
    behind = (naked.depth - away[:, None, None])[inside & truth.mask] - truth.depth[inside & truth.mask]
    assert behind.quantile(0.02) > -0.02 and 0 < behind.median() < 0.04  # and a little before it
    # A visible vertex lies at the depth that its pixel shows.
    shown = pixels(verts)[truth.vertices]
    who = truth.vertices.nonzero()[:, 0]
    column, row = shown[:, 0].long().clamp(0, 63), shown[:, 1].long().clamp(0, 127)
    at = truth.mask[who, row, column]
    depth = shown[at][:, 2] - away[who[at]] - truth.depth[who[at], row[at], column[at]]
    assert depth.abs().median() < 0.03 and (depth.abs() < 0.15).float().mean() > 0.95


def test_betas_of_clothes_are_what_is_worn(renderer: Renderer) -> None:
    n = 64
    people, poses, action, streets, shots = clear(sample_scenes(n, np.random.default_rng(5)))
    nothing = np.zeros(n, dtype=np.int64)
    people = replace(people, bag=nothing, hat=nothing)
    _, truth = renderer(people, poses, np.full(n, STAND), streets, shots)
    body = load_body("low")

    def overlap(betas: torch.Tensor) -> torch.Tensor:
        verts = body(truth.rotmats, betas).verts
        shape = rasterize(project(verts, truth.cam, 128, 64), body.faces, 128, 64).face >= 0
        return (shape & truth.mask).sum((1, 2)) / (shape | truth.mask).sum((1, 2))

    naked, dressed = overlap(truth.betas[:, :10]), overlap(truth.betas)
    assert (dressed > naked + 0.02).float().mean() > 0.9 and dressed.mean() > naked.mean() + 0.1
    skirt = torch.from_numpy(people.skirt > 0)
    assert dressed[~skirt].mean() > 0.91 and dressed[skirt].mean() > 0.83
    # Thick trousers and nothing else: legs of just that thickness, and not a beta of the person's changes.
    none, long = np.zeros(n), np.full(n, 1.05)
    depth = np.tile([0.0, 0.03, 0.0], (n, 1))
    bare = replace(people, thickness=depth, trouser=long, hem=none - 0.05, skirt=none, boot=none + 2)
    clothes = renderer(bare, poses, np.full(n, STAND), streets, shots)[1].betas[:, 10:]
    torch.testing.assert_close(clothes[:, 2], torch.full((n,), 0.03 / THICKNESS), atol=0.25, rtol=0)
    assert clothes[:, [1, 4]].abs().max() < 0.1  # arms, head
    torch.testing.assert_close(truth.betas[:, :10], torch.from_numpy(people.betas).float())


def test_some_clothes_and_places_are_kept_from_training() -> None:
    rows = {u: sample_scenes(256, np.random.default_rng(6), u) for u in (False, True)}
    kinds = {u: scenes[3].quads[..., COLUMN["kind"]] for u, scenes in rows.items()}
    there = {u: scenes[3].quads[..., COLUMN["width"]] > 0 for u, scenes in rows.items()}
    for pattern in map(PATTERNS.index, ("checks", "dots", "camouflage")):
        assert not (rows[False][0].pattern == pattern).any()
        assert 60 < (rows[True][0].pattern[:, TOP] == pattern).sum() < 110
    for thing, name in (("hat", "brimmed"), ("bag", "trolley")):
        index = {"hat": HATS, "bag": BAGS}[thing].index(name)
        assert not (getattr(rows[False][0], thing) == index).any() and (getattr(rows[True][0], thing) == index).any()
    assert not np.isin(kinds[False][there[False]], [SLATS, BLOCKS, FENCE]).any()
    assert (kinds[True][there[True]] == FENCE).any()
    walls = there[True] & (rows[True][3].quads[..., COLUMN["width"]] > 6) & (kinds[True] != FOLIAGE)
    assert np.isin(kinds[True][walls], [SLATS, BLOCKS]).all() and walls.any(1).all()
    # The same people before the same cameras; in training some of them move more freely.
    assert np.array_equal(rows[False][0].betas, rows[True][0].betas)
    same = (rows[False][1] == rows[True][1]).all((1, 2, 3))
    assert 0.7 < same.mean() < 0.9
    poses = torch.from_numpy(np.concatenate([rows[u][1] for u in rows]))
    torch.testing.assert_close(poses @ poses.mT, torch.eye(3, dtype=poses.dtype).expand_as(poses))


def test_truth_of_naked_people_far_away_is_exact(renderer: Renderer) -> None:
    # From 500 m perspective is weak, and without clothes the silhouette is the body's: labels a pixel off would show.
    people, poses, _, streets, shots = clear(sample_scenes(8, np.random.default_rng(0)), 500.0)
    none = np.zeros(8, dtype=np.int64)
    people = replace(
        people, thickness=np.zeros((8, 3)), bag=none, hat=none, hairdo=none, skirt=np.zeros(8), boot=np.full(8, 2.0)
    )
    _, truth = renderer(people, poses, np.full(8, WALK), streets, shots)
    body = load_body("low")
    verts, joints = body(truth.rotmats, truth.betas)
    assert (project_joints(joints, truth.cam) - truth.joints2d).abs().max() * 64 < 0.1
    naked = rasterize(project(verts, truth.cam, 128, 64), body.faces, 128, 64).face >= 0
    both, either = (naked & truth.mask).sum((1, 2)), (naked | truth.mask).sum((1, 2))
    assert (both / either).min() > 0.93  # shoes stand off by 8 mm


def test_people_stand_on_the_ground_and_face_where_they_should(renderer: Renderer) -> None:
    scenes = clear(sample_scenes(16, np.random.default_rng(4)))
    people, poses, action, streets, shots = scenes
    heading = np.arange(16) * pi / 8
    straight = rotations(0.0, 0.0, 0.0)[None].repeat(16, 0)
    poses = np.concatenate([straight[:, None], poses[:, 1:]], 1)
    shots = replace(shots, heading=heading, roll=np.zeros(16), height=np.full(16, 0.92))
    _, truth = renderer(people, poses, action, streets, shots)
    forward = truth.rotmats[:, 0, :, 2]  # 0 towards the camera, pi/2 to the image's right
    want = np.stack([np.sin(heading), 0 * heading, -np.cos(heading)], 1)
    np.testing.assert_allclose(forward.numpy(), want, atol=1e-5)
    left = truth.rotmats[0, 0, :, 0]  # who faces the camera has their left on the image's right
    assert left[0] > 0.99


# People


def test_people_differ() -> None:
    people = sample_people(400, np.random.default_rng(1))
    assert people.betas.std(0).min() > 0.7
    assert people.colour[:, TOP].std(0).min() > 0.2
    assert people.stride.std() > 0.1 and people.cadence.std() > 0.05  # gait
    for kinds, field in ((7, people.bag), (4, people.hat), (4, people.hairdo), (10, people.pattern[:, TOP])):
        assert set(field.tolist()) == set(range(kinds))
    assert 0.1 < (people.skirt > 0).mean() < 0.5 and 0.2 < (people.open > 0).mean() / (people.sleeve > 1).mean() < 0.8


def test_other_clothes_and_look_alikes() -> None:
    rng = np.random.default_rng(2)
    people, model = sample_people(50, rng), sample_people(50, rng)
    changed, alike = change_clothes(people, rng), dress_alike(people, model)
    for f in (f.name for f in fields(People) if f.name not in WORN):
        assert np.array_equal(getattr(changed, f), getattr(people, f))
        assert np.array_equal(getattr(alike, f), getattr(people, f))
    for other in (changed, alike):
        assert np.array_equal(other.colour[:, [SKIN, HAIR]], people.colour[:, [SKIN, HAIR]])
    assert (changed.colour[:, TOP] != people.colour[:, TOP]).any(1).all()
    assert np.array_equal(alike.colour[:, [TOP, BOTTOM]], model.colour[:, [TOP, BOTTOM]])
    assert np.array_equal(alike.sleeve, model.sleeve) and np.array_equal(alike.pattern, people.pattern)


def test_clothes_cover_what_they_should() -> None:
    wardrobe, body = Wardrobe(), load_body("low")
    usual = {"sleeve": 0.25, "hem": 0.05, "trouser": 1.05, "tail": 0.0, "crown": 0.1, "open": 0.0, "neck": 0.0,
             "boot": 2.0, "strap": 0.0, "seed": 0.0}  # fmt: skip

    def worn(**other: float) -> np.ndarray:
        row = pack(OUTFIT, {k: np.array(v) for k, v in {**usual, **other}.items()})
        return regions(wardrobe.own_fields, dict(zip(OUTFIT, row, strict=True))).numpy()

    shirt, coat, strapped = worn(), worn(sleeve=1.05, hem=0.5), worn(strap=1.0)
    assert (coat == TOP).sum() > (shirt == TOP).sum() + 100
    assert (shirt == BAG).sum() == 0
    front = body.v_template[torch.from_numpy(strapped == BAG)][:, 2]
    assert len(front) > 5 and (front > -0.02).all()  # of a backpack the straps; the pack is a piece of its own
    hair = body.v_template[torch.from_numpy(shirt == HAIR)]
    assert (hair[:, 1] > body.j_template[15, 1] - 0.02).all()
    assert (worn(trouser=0.3) == SKIN).sum() > (shirt == SKIN).sum() + 50


def test_skirts_enclose_the_legs_and_pieces_hang_where_they_should(renderer: Renderer) -> None:
    n, wardrobe = 24, renderer.wardrobe
    rng = np.random.default_rng(5)
    people = sample_people(n, rng)
    people = replace(people, skirt=np.full(n, 0.5), flare=np.full(n, 0.1), bag=np.arange(n) % 7)
    poses = sample_poses(people, rng.uniform(0, 2 * pi, n), np.full(n, WALK), rng)
    rotation, joints = (
        t.numpy() for t in wardrobe.exact.joints(torch.from_numpy(poses), torch.from_numpy(people.betas))
    )
    girth = wardrobe.measure(wardrobe.rest(people))
    skirt = wardrobe.skirts(people, girth.belt, rotation, joints).reshape(n, 9, 24, 3)
    knee = joints[:, [4, 5]].mean(1)
    assert (skirt[:, -1, :, 1].mean(1) - knee[:, 1] > -0.12).all()  # ends about the knees
    for i in range(n):
        ring = skirt[i, -1]
        for leg in (4, 5):  # the knee lies inside, seen from above
            off = ring[:, [0, 2]] - joints[i, leg][[0, 2]]
            turn = np.diff(np.unwrap(np.arctan2(off[:, 1], off[:, 0])), append=np.nan)[:-1].sum()
            assert abs(turn) > 1.6 * pi
    pieces, _ = wardrobe.pieces(people, girth, rotation, joints, np.full(n, WALK), np.array([[0.0, 1, 0]]).repeat(n, 0))
    bag = pieces.reshape(n, PIECES, -1, 3)[:, 0].mean(1)
    for i in range(n):
        side = (bag[i] - joints[i, 0]) @ rotation[i, 0, :, 0]  # towards their left
        back = (bag[i] - joints[i, 9]) @ rotation[i, 9, :, 2]
        kind = people.bag[i]
        assert kind != 1 or back < -0.1
        assert kind not in (2, 4) or side > 0.1
        assert kind not in (3, 5, 6) or side < -0.1


@pytest.mark.parametrize("action", range(len(ACTIONS)))
def test_poses_of_every_action(action: int) -> None:
    n, rng = 64, np.random.default_rng(action)
    people, phase = sample_people(n, rng), np.linspace(0, 2 * pi, n, endpoint=False)
    people = people[np.zeros(n, dtype=np.int64)]
    people = replace(people, bag=np.zeros(n, dtype=np.int64))
    poses = sample_poses(people, phase, np.full(n, action), rng, np.zeros(n, dtype=np.int64))
    np.testing.assert_allclose(poses @ poses.transpose(0, 1, 3, 2), np.tile(np.eye(3), (n, 24, 1, 1)), atol=1e-12)
    body = load_body("low")
    joints = body.joints(torch.from_numpy(poses).float(), torch.zeros(n, 10))[1].numpy()
    apart = np.ptp(joints[:, 7, 2] - joints[:, 8, 2])
    assert apart < 0.45 if action == STAND else apart > 0.25
    wrist, shoulder = joints[:, 21], joints[:, 17]
    if action in (PHONE, CARRY, CYCLE):
        assert (wrist[:, 2] - shoulder[:, 2]).mean() > 0.15  # a hand before the body
    if action == CYCLE:
        assert (joints[:, [4, 5], 1].max(1) > joints[:, 0, 1] - 0.42).mean() > 0.5  # a knee is high


def test_colours() -> None:
    got = hsv_to_rgb(np.array([[0.0, 1, 1], [1 / 3, 1, 1], [2 / 3, 1, 0.5], [0.5, 0, 0.7]]))
    np.testing.assert_allclose(got, [[1.0, 0, 0], [0, 1, 0], [0, 0, 0.5], [0.7, 0.7, 0.7]], atol=1e-12)


# Worlds


def test_layout_is_that_of_market(small: Path) -> None:
    names = {
        f: sorted(p.name for p in (small / f).iterdir()) for f in ("bounding_box_train", "query", "bounding_box_test")
    }
    assert all(NAME.fullmatch(n) for folder in names.values() for n in folder)
    pids = {folder: Counter(n.split("_")[0] for n in files) for folder, files in names.items()}
    assert pids["bounding_box_train"] == {"0001": 6, "0002": 6, "0003": 6}
    assert pids["query"] == {"0004": 2, "0005": 2, "0006": 2}  # one for each camera
    test = pids["bounding_box_test"]
    assert {p: test[p] for p in ("0004", "0005", "0006")} == {"0004": 4, "0005": 4, "0006": 4}
    assert set(test) == {"0004", "0005", "0006"}  # a fifth of two people's boxes is nobody's
    town = Town(World(ids=60, cams=4, images=4, distractors=0.2, junk=0.3), "A", 0)
    assert Counter(town.pids.tolist())[0] == round(0.2 * 22.5) and Counter(town.pids.tolist())[-1] == round(0.3 * 22.5)
    folders, names = town.names(np.array([60, len(town.pids) - 1]), town.plan(np.array([60, len(town.pids) - 1])))
    assert set(folders) == {"bounding_box_test"} and {n.split("_")[0] for n in names} == {"0000", "-1"}
    assert all(NAME.fullmatch(n) for n in names) and len(set(names)) == 2 * 4 * 4
    assert all(Image.open(p).size == (64, 128) for p in (small / "query").iterdir())


def test_truth_file_covers_every_crop(small: Path) -> None:
    truth = np.load(small / "gt.npz")
    names = truth["names"].tolist()
    assert sorted(names) == sorted(str(p.relative_to(small)) for p in small.glob("*/*.jpg"))
    assert len(set(names)) == len(names) == note(small)["crops"]
    same = [i for i, n in enumerate(names) if "/0004_" in n]
    assert np.ptp(truth["betas"][same], axis=0).max() == 0  # a person keeps their shape
    mask = np.unpackbits(truth["mask"], axis=1).reshape(-1, 128, 64)
    assert 0.1 < mask[same].mean() < 0.6
    assert len(truth["depth"]) == mask.sum() and truth["depth"].dtype == np.float16
    assert np.unpackbits(truth["vertices"], axis=1)[:, : len(load_body("low").v_template)].sum(1).min() > 0
    # The clock of the names is the world's, a frame being 1/25 s.
    times = {image.name: image.time for image in list_images(small).images}
    assert all(abs(times[n] / 25 - s) < 0.021 for n, s in zip(names, truth["seconds"], strict=True) if n in times)


def test_a_walk_goes_on_from_crop_to_crop(small: Path) -> None:
    truth = np.load(small / "gt.npz")
    seconds, camera = truth["seconds"], [n.split("_")[-3] for n in truth["names"].tolist()]
    for first in range(0, 18, 3):
        rows = slice(first, first + 3)
        assert len(set(camera[rows])) == 1 and (np.diff(seconds[rows]) > 0).all() and np.ptp(seconds[rows]) < 3
        turn = truth["rotmats"][rows, 0]
        assert (np.einsum("ij,nij->n", turn[0], turn) > 2.2).all()  # they keep their direction


@pytest.mark.parametrize("world", ["A", "B"])
def test_frozen(small: Path, tmp_path: Path, world: str) -> None:
    out = small if world == "A" else synth(tmp_path / "B", **SMALL, world="B", progress=False)
    assert note(out)["sha256"] == FROZEN[world]


def test_worlds_have_nothing_in_common(small: Path, tmp_path: Path) -> None:
    others = [synth(tmp_path / "B", **SMALL, world="B", progress=False),
              synth(tmp_path / "seed", **{**SMALL, "seed": 4}, progress=False)]  # fmt: skip
    a = np.load(small / "gt.npz")["betas"]
    for other in others:
        b = np.load(other / "gt.npz")["betas"]
        assert np.abs(a[:, None] - b[None]).max(2).min() > 1e-3
    places = [Town(World(), world, 0).cameras.place for world in "AB"]
    assert np.abs(places[0] - places[1]).min() > 1e-6


def test_same_bytes_whatever_the_workers(small: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", CODE.format(str(tmp_path / "b"), 2)], check=True)
    assert contents(tmp_path / "b") == contents(small)


@pytest.mark.skipif(backend() == "torch", reason="no kernels were built")
def test_same_bytes_whatever_the_processor(small: Path, tmp_path: Path) -> None:
    plain = {"REID3D_ISA": "portable", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE",
             "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3", "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA"}  # fmt: skip
    code = CODE.format(str(tmp_path / "b"), 1)
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env={**os.environ, **plain})
    assert contents(tmp_path / "b") == contents(small)


def test_knobs_do_what_they_say() -> None:
    def town(**knobs: float) -> Town:
        return Town(World(ids=60, **knobs), "A", 0)

    ids = np.arange(60)
    plain, alike = town(look_alikes=0.0), town(look_alikes=1.0)
    pairs = ids[1::2]
    pairs = pairs[pairs != 30]
    for t, same in ((plain, 0), (alike, len(pairs))):
        equal = (t.people.colour[pairs, TOP] == t.people.colour[pairs - 1, TOP]).all(1)
        assert equal.sum() == same
    assert plain.plan(ids).outfit.sum() == 0 and 0.4 < town(clothes_change=0.5).plan(ids).outfit.mean() < 0.6
    gains = [town(colour_cast=c).cameras.gain.std() for c in (0.0, 2.0)]
    assert gains[0] < 1e-9 < 0.1 < gains[1]
    before = [(town(occlusion=o).plan(ids).passing[:, 2:, 4] > 0).mean() for o in (0.0, 0.5)]
    assert before[0] == 0 and before[1] > 0.3
    spread = [np.abs(np.exp(1j * town(viewpoint=v).cameras.facing).mean()) for v in (0.0, 1.0)]
    assert spread[0] > 0.999 and spread[1] < 0.4
    assert [town(detector=d).plan(ids).shots.shift.std() < 0.005 for d in (0.0, 2.0)] == [True, False]

    def spots(t: Town, people: np.ndarray) -> float:
        return float(np.abs(t.plan(people).shots.x).mean())

    biased = town(background=1.0)
    assert spots(biased, ids[:30]) > 2 * spots(town(background=0.0), ids[:30])
    assert spots(biased, ids[30:]) < 2 * spots(town(background=0.0), ids[30:])  # what is learnt does not hold
    kinds = set(plain.plan(ids).action.tolist())
    assert kinds == {WALK, STAND, PHONE, CARRY, CYCLE}


def test_times_of_travel_mean_something() -> None:
    town = Town(World(ids=300, tracklets=2), "A", 0)
    arrivals = np.stack([town.arrivals(k) for k in range(90)])
    assert arrivals.shape == (90, 2, 6)
    first = np.sort(arrivals[:, 0], axis=1)
    assert np.diff(first, axis=1).min() > 5 and (first[:, -1] - first[:, 0]).max() < 1200
    assert (arrivals[:, 1].min(1) > arrivals[:, 0].max(1)).all()
    # Who comes in company leaves in company: half of the people follow the leader of their three.
    leader = np.arange(90) // 3 * 3
    together = np.abs(arrivals[:, 0] - arrivals[leader, 0]).max(1)[np.arange(90) % 3 > 0] < 60
    assert 0.3 < together.mean() < 0.7
    # A second between near cameras is likelier a second of their distance: the correlation of legs with distances.
    order = np.argsort(arrivals[:, 0], axis=1)
    legs = np.diff(np.take_along_axis(arrivals[:, 0], order, 1), axis=1)
    metres = np.linalg.norm(town.cameras.place[order[:, 1:]] - town.cameras.place[order[:, :-1]], axis=2)
    assert np.corrcoef(legs.ravel(), metres.ravel())[0, 1] > 0.8


# Files


def test_killed_run_is_finished_by_the_same_call(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    process = subprocess.Popen([sys.executable, "-c", CODE.format(str(out), 1)])
    while len(list(out.glob("bounding_box_train/*.jpg"))) < 4:
        assert process.poll() is None
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert note(out)["complete"] is False
    synth(out, **SMALL, progress=False)
    assert contents(out) == contents(small)  # and no temporary file is left


def test_what_is_done_is_kept_unless_it_was_damaged(small: Path, tmp_path: Path, monkeypatch) -> None:
    from reid3d.preprocess.synth import world

    monkeypatch.setattr(world, "TOGETHER", 1)  # a person at a time
    drawn: list[int] = []
    film = Town.film

    def counted(self, numbers):
        drawn.append(int(numbers[0]))
        if len(drawn) == 6:
            raise KeyboardInterrupt
        return film(self, numbers)

    monkeypatch.setattr(Town, "film", counted)
    with pytest.raises(KeyboardInterrupt):
        synth(tmp_path / "b", **SMALL, workers=1, progress=False)
    next((tmp_path / "b").glob("bounding_box_train/0002*.jpg")).write_bytes(b"damaged")
    next((tmp_path / "b").glob("bounding_box_train/0003*.jpg")).unlink()
    drawn.clear()
    drawn += [0] * 6
    synth(tmp_path / "b", **SMALL, workers=1, progress=False)
    assert drawn[6:] == [1, 2, *range(5, drawn[-1] + 1)]
    assert note(tmp_path / "b")["complete"]


@pytest.mark.parametrize("name", [".gt.npz.1.tmp", ".synth.json.1.tmp", ".done/.000000.npz.1.tmp"])
def test_what_a_killed_run_left_behind_goes(small: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / ".done").mkdir()
    (tmp_path / name).write_bytes(b"half")
    plan = {k: v for k, v in note(small).items() if k not in ("crops", "sha256")} | {"complete": False}
    (tmp_path / "synth.json").write_text(json.dumps(plan))
    synth(tmp_path, **SMALL, progress=False)
    assert contents(tmp_path) == contents(small)


def test_long_passages_and_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("reid3d.progress.SECONDS_BETWEEN_LINES", -1.0)
    out = synth(tmp_path / "b", ids=2, cams=2, images=120, frames=1000, tracklets=2, distractors=0, junk=0, workers=1)
    assert len(list(out.glob("query/*.jpg"))) == 2 and len(list(out.glob("bounding_box_train/*.jpg"))) == 480
    assert len(np.load(out / "gt.npz")["names"]) == len(list(out.glob("*/*.jpg"))) == 960
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "synth: 240 of 960 images" and lines[-1] == "synth: 960 of 960 images"


@pytest.mark.parametrize("limit", [0, 2])
def test_full_disk_is_one_error_and_the_same_call_finishes(small: Path, tmp_path: Path, limit: int) -> None:
    out = tmp_path / "b"
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit} * 512, -1))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    ) + CODE.format(str(out), 1)
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert failed.returncode == 1 and str(out) in failed.stderr.splitlines()[-1]
    synth(out, **SMALL, progress=False)
    assert contents(out) == contents(small)


def test_second_run_into_the_folder_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "b"
    out.mkdir()
    with hold_folder(out, "a test"), pytest.raises(OSError, match="another synth"):
        synth(out, ids=2, cams=2, images=2)


@pytest.mark.parametrize(
    ("knobs", "error", "message"),
    [
        ({"ids": 1}, ValueError, r"ids must be in 2\.\.9000, got 1: one identity cannot be told from another"),
        ({"cams": 0}, ValueError, r"cams must be in 2\.\.6, got 0: people are searched for across cameras"),
        ({"cams": 7}, ValueError, r"cams must be in 2\.\.6, got 7"),
        ({"images": 1}, ValueError, r"images must be in 2\.\.1000, got 1: one for the query"),
        ({"images": 9, "frames": 8}, ValueError, "images must not exceed the 8 frames of a passage, got 9"),
        ({"occlusion": 1.5}, ValueError, r"occlusion must be in 0\.\.1, got 1.5"),
        ({"occlusion": float("nan")}, ValueError, "occlusion must be in"),
        ({"ids": 2.5}, TypeError, "ids must be a whole number, got 2.5"),
        ({"occlusion": "much"}, TypeError, "occlusion must be a number, got 'much'"),
        ({"fog": 1}, TypeError, "fog"),
        ({"preset": "brutal"}, ValueError, "preset must be one of easy, standard, hard, got 'brutal'"),
        ({"world": "C"}, ValueError, "world must be A or B, got 'C'"),
        ({"seed": -1}, ValueError, "seed must be in"),
        ({"workers": 0}, ValueError, "workers must be positive, got 0"),
    ],
)
def test_worlds_that_cannot_be(tmp_path: Path, knobs: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        synth(tmp_path / "b", **knobs)
    assert not (tmp_path / "b").exists()


def test_folders_of_others_are_left_alone(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="out must be empty or made by the same command"):
        synth(small, **{**SMALL, "ids": 8})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="with other files"):
        synth(tmp_path / "other")
    for text in ("[]", "", '{"format": 1}'):
        (tmp_path / "other" / "synth.json").write_text(text)
        with pytest.raises(ValueError, match="synth.json is no note of synth"):
            synth(tmp_path / "other")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out must be a folder, got the file"):
        synth(tmp_path / "file")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"


def test_presets_grow_harder() -> None:
    easy, standard, hard = (PRESETS[name] for name in ("easy", "standard", "hard"))
    for knob in ("look_alikes", "colour_cast", "occlusion", "detector", "background"):
        assert getattr(easy, knob) < getattr(standard, knob) < getattr(hard, knob)
