"""Refinement by keypoints and silhouettes: what is read, where it lies on a body, and that fits come to the truth."""

import json
from dataclasses import replace
from math import pi
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reid3d.preprocess import refine
from reid3d.preprocess.body import JOINT_NAMES, Body, axis_angle_to_matrix, load_body
from reid3d.preprocess.evidence import COCO, LAYOUTS, POINTS, load_evidence, load_keypoints, load_masks
from reid3d.preprocess.fit import BodyFit, EmbeddedFitter, UprightFitter, mirror
from reid3d.preprocess.refine import Landmarks, Refiner, distance_transform, overbent, pose_prior, robust
from reid3d.preprocess.synth.people import STAND, WALK, sample_people, sample_poses
from reid3d.preprocess.synth.render import Renderer, Truth, sample_scenes
from reid3d.preprocess.train_fitter import HELD_OUT, project_joints

COUNT = 48
NAMES = [f"query/{i:04d}_c1.jpg" for i in range(COUNT)]
SIZE = (128, 64)
FITTED = ("verts", "cam", "confidence", "rotmats", "betas", "joints")
LIMBS = [JOINT_NAMES.index(name) for name in COCO[5:]]


@pytest.fixture(scope="module")
def people() -> tuple[list[np.ndarray], Truth]:
    images, truth = Renderer()(*sample_scenes(COUNT, np.random.default_rng(HELD_OUT + 20_000), True))
    return list(images.numpy()), truth


@pytest.fixture(scope="module")
def fitter() -> EmbeddedFitter:
    return EmbeddedFitter()


@pytest.fixture(scope="module")
def fit(people: tuple[list[np.ndarray], Truth], fitter: EmbeddedFitter) -> BodyFit:
    return fitter(people[0], NAMES)


@pytest.fixture(scope="module")
def poor(fit: BodyFit, fitter: EmbeddedFitter) -> BodyFit:
    """Fits that leave more to refine, as people in photos do."""
    g = torch.Generator().manual_seed(0)
    rotmats = axis_angle_to_matrix(torch.normal(0.0, 0.12, (COUNT, 24, 3), generator=g)) @ fit.rotmats
    posed = fitter.body(rotmats, fit.betas)
    cam = fit.cam + torch.normal(0.0, 0.02, fit.cam.shape, generator=g)
    return BodyFit(posed.verts, cam, fit.confidence, rotmats, fit.betas, posed.joints)


@pytest.fixture(scope="module")
def coco(people: tuple[list[np.ndarray], Truth]) -> np.ndarray:
    """COCO keypoints (n,17,3) of the limbs, 1.5 pixels off."""
    keypoints = np.zeros((COUNT, 17, 3))
    noise = np.random.default_rng(0).normal(0, 1.5, (COUNT, 12, 2))
    keypoints[:, 5:, :2] = people[1].joints2d[:, LIMBS].numpy() * 64 + [32, 64] + noise
    keypoints[:, 5:, 2] = 1
    return keypoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, people: tuple[list[np.ndarray], Truth], coco: np.ndarray) -> Path:
    root = tmp_path_factory.mktemp("evidence")
    np.savez(root / "keypoints.npz", names=np.array(NAMES), keypoints=coco)
    np.savez(root / "masks.npz", names=np.array(NAMES), masks=people[1].mask.numpy())
    return root


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def openpose(*people: Any) -> dict[str, Any]:
    return {"version": 1.3, "people": [{"pose_keypoints_2d": np.asarray(p).ravel().tolist()} for p in people]}


def perfect(truth: Truth, body: Body, rotmats: torch.Tensor | None = None) -> BodyFit:
    rotmats = truth.rotmats if rotmats is None else rotmats
    posed = body(rotmats, truth.betas)
    return BodyFit(posed.verts, truth.cam, torch.ones(len(rotmats)), rotmats, truth.betas, posed.joints)


def heading_error(fit: BodyFit, truth: Truth) -> torch.Tensor:
    """Degrees between where the fits and the people face."""
    a, b = fit.rotmats[:, 0, [0, 2], 2], truth.rotmats[:, 0, [0, 2], 2]
    turn = torch.atan2(a[:, 0], a[:, 1]) - torch.atan2(b[:, 0], b[:, 1])
    return torch.atan2(turn.sin(), turn.cos()).abs() * 180 / pi


def joint_errors(fit: BodyFit, truth: Truth) -> tuple[float, float]:
    """Mean joint error, pelvis at the same place, in mm; and of the projected joints, in pixels."""
    joints = load_body().joints(truth.rotmats, truth.betas)[1]
    apart = (fit.joints - fit.joints[:, :1] - joints + joints[:, :1]).norm(dim=2)
    seen = (project_joints(fit.joints, fit.cam) - truth.joints2d)[:, LIMBS].norm(dim=2) * 64
    return 1e3 * apart.mean().item(), seen.mean().item()


def test_distance_transform_is_that_of_brute_force(device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(5, 13, 9, generator=g) < torch.tensor([0.02, 0.1, 0.5, 1.0, 0.0])[:, None, None]
    mask[0, 12, 8] = True
    found = distance_transform(mask.to(device)).cpu()
    y, x = torch.meshgrid(torch.arange(13.0), torch.arange(9.0), indexing="ij")
    places = torch.stack([y, x], -1).view(-1, 2)
    for got, one in zip(found[:4], mask[:4], strict=True):
        wanted = torch.cdist(places, places[one.flatten()]).amin(1).view(13, 9)
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    assert found[4].isinf().all()


def test_robust_loss_by_hand() -> None:
    square = torch.tensor([0.0, 1.0, 4.0, 1e30], dtype=torch.float64, requires_grad=True)
    value = robust(square, 2.0)
    torch.testing.assert_close(value.detach(), torch.tensor([0, 0.8, 2, 4], dtype=torch.float64))
    value.sum().backward()
    torch.testing.assert_close(square.grad, torch.tensor([1, 0.64, 0.25, 0], dtype=torch.float64))


def test_joints_bent_the_wrong_way() -> None:
    pose = torch.zeros(24, 3)
    for name, axis, right_way in (("knee", 0, 1), ("elbow", 1, 0)):
        for side, sign in (("left", 1), ("right", -1)):
            pose[JOINT_NAMES.index(f"{side}_{name}"), axis] = 0.5 * (right_way or -sign)
    assert overbent(axis_angle_to_matrix(pose)[None]).abs().max() == 0
    wrong = overbent(axis_angle_to_matrix(-pose)[None])
    torch.testing.assert_close(wrong, torch.full((1, 4), 0.5).sin())


def test_prior_prefers_synthetic_poses() -> None:
    mean, whiten = pose_prior()
    assert mean.dtype == whiten.dtype == torch.float64
    rng = np.random.default_rng(1)
    people, action = sample_people(64, rng), rng.choice([WALK, STAND], 64)
    usual = torch.from_numpy(sample_poses(people, rng.uniform(0, 2 * pi, 64), action, rng))
    odd = axis_angle_to_matrix(torch.from_numpy(rng.normal(0, 0.8, (64, 24, 3))))
    square = [(((p[:, 1:, :, :2].flatten(1) - mean) @ whiten) ** 2).sum(1) for p in (usual, odd)]
    assert square[0].max() < square[1].min()


@pytest.mark.parametrize("lod", ["full", "low"])
def test_points_lie_on_their_part_and_side(lod: str) -> None:
    body = load_body(lod)
    rotation, joints = body.joints(torch.eye(3).expand(1, 24, 3, 3), torch.zeros(1, 10))
    points = dict(zip(POINTS, Landmarks(body)(rotation, joints, torch.zeros(1, 10))[0], strict=True))
    joint = dict(zip(JOINT_NAMES, joints[0], strict=True))
    for name, point in points.items():
        if name.startswith(("left", "right")):
            assert point[0] * (1 if name.startswith("left") else -1) > 0.02, name
        else:
            assert point[0].abs() < 0.02, name
    for name in ("left_hip", "right_knee", "left_ankle", "right_shoulder", "left_elbow", "right_wrist"):
        assert torch.equal(points[name], joint[name])
    assert points["nose"][2] > points["left_eye"][2] > points["left_ear"][2] + 0.04
    assert points["nose"][1] < points["left_eye"][1] < points["nose"][1] + 0.08
    assert 0.04 < points["left_eye"][0] - points["right_eye"][0] < 0.1
    assert points["left_ear"][0] - points["right_ear"][0] > 0.12
    assert points["left_big_toe"][2] > joint["left_ankle"][2] + 0.12 > points["left_heel"][2] + 0.12
    assert points["left_small_toe"][0] > points["left_big_toe"][0]
    assert points["left_heel"][1] < joint["left_ankle"][1]


def test_points_of_a_bone_move_as_its_skin_does(fit: BodyFit, fitter: EmbeddedFitter) -> None:
    body, landmarks = fitter.body, Landmarks(fitter.body)
    points = landmarks(*body.joints(fit.rotmats, fit.betas), fit.betas)
    for name in ("nose", "left_eye", "right_ear"):  # which the head alone carries
        assert torch.cdist(points[:, POINTS.index(name)][:, None], fit.verts).amin() < 1e-3


def test_layouts_name_the_same_points() -> None:
    assert [POINTS[i] for i in LAYOUTS[17]] == list(COCO)
    assert [len(set(LAYOUTS[count])) for count in LAYOUTS] == list(LAYOUTS)
    # OpenPose's documented order.
    assert [POINTS[i] for i in LAYOUTS[18]][:6] == [
        "nose", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder",
    ]  # fmt: skip
    assert [POINTS[i] for i in LAYOUTS[18]][8:14] == [
        "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle",
    ]  # fmt: skip
    assert POINTS[8] == "mid_hip" and POINTS[19] == "left_big_toe" and POINTS[24] == "right_heel"


def test_keypoints_bring_fits_to_the_truth(
    people: tuple[list[np.ndarray], Truth], fitter: EmbeddedFitter, poor: BodyFit, folder: Path
) -> None:
    crops, truth = people
    refiner = Refiner(fitter.body, load_keypoints(folder / "keypoints.npz"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        refined, report = refiner(poor, crops, NAMES)
        with torch.inference_mode():  # as a fitter may be called
            again, _ = refiner(BodyFit(*(getattr(poor, name).clone() for name in FITTED)), crops, NAMES)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(getattr(refined, name), getattr(again, name)) for name in FITTED)
    assert all(list(row) == ["error2d_before", "error2d_after"] for row in report)
    before, after = (np.mean([row[f"error2d_{when}"] for row in report]) for when in ("before", "after"))
    assert after < before / 2 and after < 1.5  # per cent
    (space, plane), (new_space, new_plane) = joint_errors(poor, truth), joint_errors(refined, truth)
    assert new_plane < plane / 2 and new_space < 0.85 * space
    # All that is said of the bodies agrees.
    posed = fitter.body(refined.rotmats, refined.betas)
    torch.testing.assert_close(refined.verts, posed.verts)
    torch.testing.assert_close(refined.joints, posed.joints)
    identity = refined.rotmats @ refined.rotmats.transpose(2, 3)
    torch.testing.assert_close(identity, torch.eye(3).expand_as(identity), rtol=0, atol=1e-5)
    # Crops do not look at each other.
    few = torch.arange(COUNT) < 5
    alone, _ = refiner(poor.select(few), crops[:5], NAMES[:5])
    torch.testing.assert_close(alone.joints, refined.joints[:5], rtol=0, atol=5e-3)


def test_masks_bring_silhouettes_together(
    people: tuple[list[np.ndarray], Truth], fitter: EmbeddedFitter, poor: BodyFit, folder: Path
) -> None:
    some = torch.arange(COUNT) < 24
    crops, names = people[0][:24], NAMES[:24]
    sources = load_keypoints(folder / "keypoints.npz"), load_masks(folder / "masks.npz")
    _, by_mask = Refiner(fitter.body, masks=sources[1])(poor.select(some), crops, names)
    before, after = (np.mean([row[f"iou_{when}"] for row in by_mask]) for when in ("before", "after"))
    assert before < 0.75 and after > 0.85
    both, by_both = Refiner(fitter.body, *sources)(poor.select(some), crops, names)
    assert all(len(row) == 4 for row in by_both)
    assert np.mean([row["iou_after"] for row in by_both]) > 0.85
    assert np.mean([row["error2d_after"] for row in by_both]) < 1.8
    truth = Truth(*(value[:24] for value in vars(people[1]).values()))
    assert joint_errors(both, truth)[0] < 0.85 * joint_errors(poor.select(some), truth)[0]


def test_masks_of_wide_and_of_cut_crops(fitter: EmbeddedFitter, people: tuple[list[np.ndarray], Truth]) -> None:
    # The lower half of a person in a crop three times as wide as the others', beside a whole one.
    crop, mask = np.zeros((64, 192, 3), np.uint8), np.zeros((64, 192), bool)
    crop[:, 64:128], mask[:, 64:128] = people[0][0][:64], people[1].mask[0, :64].numpy()
    masks = {"wide.jpg": mask, "whole.jpg": people[1].mask[0].numpy()}

    class Both:
        fingerprint = ""

        def __call__(self, name: str) -> np.ndarray:
            return masks[name]

    cam = people[1].cam[:1]
    moved = torch.stack([2 * cam[0, 0], cam[0, 1], cam[0, 2] + 1 / (2 * cam[0, 0])])  # twice the crop heights, 1/2 up
    two = Truth(*(value[[0, 0]] for value in vars(people[1]).values()))
    good = perfect(replace(two, betas=two.betas[:, :10]), fitter.body)  # without their clothes
    good = BodyFit(good.verts, torch.stack([moved, cam[0]]), *(getattr(good, name) for name in FITTED[2:]))
    refiner = Refiner(fitter.body, masks=Both())
    dressed, (wide, whole) = refiner(good, [crop, people[0][0]], ["wide.jpg", "whole.jpg"])
    assert whole["iou_before"] > 0.7 and wide["iou_before"] == pytest.approx(whole["iou_before"], abs=0.15)
    assert wide["iou_after"] > wide["iou_before"] and whole["iou_after"] > whole["iou_before"]
    assert dressed.betas.shape == (2, 15) and dressed.betas[:, 10:].mean() > 0.2


@pytest.mark.parametrize("mirrored", [False, True])
def test_bodies_that_face_the_wrong_way_are_turned_round(
    mirrored: bool, people: tuple[list[np.ndarray], Truth], fitter: EmbeddedFitter, folder: Path
) -> None:
    crops, truth = people
    rotmats = mirror(truth.rotmats) if mirrored else truth.rotmats.clone()
    rotmats[:, 0] = axis_angle_to_matrix(torch.tensor([0.0, pi, 0.0])) @ rotmats[:, 0]
    wrong = perfect(truth, fitter.body, rotmats)
    away = heading_error(wrong, truth) > 90  # seen from the side, a mirror image faces the same way
    assert away.sum() > COUNT / 3
    refined, _ = Refiner(fitter.body, load_keypoints(folder / "keypoints.npz"))(wrong, crops, NAMES)
    error = heading_error(refined, truth)[away]
    assert (error < 45).float().mean() > 0.9 and error.median() < 15


def test_without_evidence_nothing_changes(
    people: tuple[list[np.ndarray], Truth], fitter: EmbeddedFitter, fit: BodyFit, folder: Path, coco: np.ndarray
) -> None:
    few = coco[:4].copy()
    few[1, :, 2] = 0  # nobody
    few[2, 8:, 2] = 0  # three points
    few[3, :, 2] *= 0.2  # none is sure
    np.savez(folder / "few.npz", names=np.array(NAMES[:4]), keypoints=few)
    keypoints = load_keypoints(folder / "few.npz")
    refined, report = Refiner(fitter.body, keypoints)(fit, people[0], NAMES)
    assert report[0] and report[1:] == [{}] * (COUNT - 1)
    assert not torch.equal(refined.cam[0], fit.cam[0])
    for name in FITTED:
        assert torch.equal(getattr(refined, name)[1:], getattr(fit, name)[1:])
    bare = BodyFit(fit.verts, fit.cam, fit.confidence)
    assert Refiner(fitter.body, keypoints)(bare, people[0], NAMES) == (bare, [{}] * COUNT)
    # No step, no gain: the fit comes back as it was, and the report says so.
    same, report = Refiner(fitter.body, keypoints, steps=(0, 0, 0, 0))(fit, people[0], NAMES)
    assert all(torch.equal(getattr(same, name), getattr(fit, name)) for name in FITTED)
    assert report[0]["error2d_before"] == report[0]["error2d_after"]


def test_refiner_refuses_what_makes_no_sense(
    people: tuple[list[np.ndarray], Truth], fitter: EmbeddedFitter, fit: BodyFit, folder: Path
) -> None:
    keypoints = load_keypoints(folder / "keypoints.npz")
    with pytest.raises(ValueError, match="keypoints or masks must be given"):
        Refiner(fitter.body)
    with pytest.raises(ValueError, match="steps must be four numbers >= 0"):
        Refiner(fitter.body, keypoints, steps=(1, 2, 3))
    refiner = Refiner(fitter.body, keypoints)
    with pytest.raises(ValueError, match="as many as fits, 48"):
        refiner(fit, people[0][:3], NAMES[:3])
    with pytest.raises(ValueError, match="as many as fits, 48"):
        refiner(fit, people[0], NAMES, [(128, 64)])
    with pytest.raises(TypeError, match="uint8"):
        refiner(fit, [np.zeros((8, 8, 3), np.float32)] * COUNT, NAMES)


def test_everything_may_be_made_in_inference_mode(people: tuple[list[np.ndarray], Truth], folder: Path) -> None:
    with torch.inference_mode():
        body = load_body.__wrapped__("low")
        some = Truth(*(value[:2].clone() for value in vars(people[1]).values()))
        refiner = Refiner(
            body, load_keypoints(folder / "keypoints.npz"), load_masks(folder / "masks.npz"), (1, 1, 1, 1)
        )
        _, report = refiner(perfect(some, body), people[0][:2], NAMES[:2])
    assert all(len(row) == 4 for row in report)


def test_fingerprint_tells_evidence_body_and_steps_apart(fitter: EmbeddedFitter, folder: Path, tmp_path: Path) -> None:
    keypoints, masks = load_keypoints(folder / "keypoints.npz"), load_masks(folder / "masks.npz")
    write_json(tmp_path / "a.json", openpose())
    refiners = [
        Refiner(fitter.body, keypoints),
        Refiner(fitter.body, keypoints, masks),
        Refiner(fitter.body, keypoints, steps=(1, 1, 1, 1)),
        Refiner(load_body("low"), keypoints),
        Refiner(fitter.body, load_keypoints(tmp_path)),
    ]
    prints = [refiner.fingerprint() for refiner in refiners]
    write_json(tmp_path / "b.json", openpose())
    prints.append(Refiner(fitter.body, load_keypoints(tmp_path)).fingerprint())
    assert len(set(prints)) == len(prints)
    assert prints[0] == Refiner(fitter.body, load_keypoints(folder / "keypoints.npz")).fingerprint()


def test_formats_say_the_same(coco: np.ndarray, tmp_path: Path) -> None:
    coco = coco.round(3)
    body_25, coco_18 = (np.zeros((COUNT, count, 3)) for count in (25, 18))
    body_25[:, LAYOUTS[17]] = coco
    coco_18[:] = body_25[:, LAYOUTS[18]]
    for i, name in enumerate(NAMES):
        stem = name.removesuffix(".jpg")
        write_json(tmp_path / "body25" / f"{stem}_keypoints.json", openpose(body_25[i]))
        write_json(tmp_path / "coco18" / f"{Path(stem).name}.json", openpose(coco_18[i]))  # by the stem alone
    labelled = coco * [1, 1, 2]
    annotations = [{"image_id": i, "keypoints": labelled[i].ravel().tolist()} for i in range(COUNT)]
    images = [{"id": i, "file_name": name} for i, name in enumerate(NAMES)]
    path = write_json(tmp_path / "person_keypoints.json", {"images": images, "annotations": annotations})
    for count, rows in ((17, coco), (18, coco_18), (25, body_25)):
        np.savez(tmp_path / f"{count}.npz", names=np.array(NAMES), keypoints=rows)
    sources = [path, tmp_path / "body25", tmp_path / "coco18", *(tmp_path / f"{n}.npz" for n in (17, 18, 25))]
    for name, row in zip(NAMES, body_25, strict=True):
        wanted = row / [64, 128, 1]
        for source in map(load_keypoints, sources):
            np.testing.assert_allclose(source(name, SIZE), wanted, atol=1e-12, err_msg=str(source.path))
    assert all(load_keypoints(source)("query/9999.jpg", SIZE) is None for source in sources)


def test_pixels_are_those_of_the_image_file(tmp_path: Path, coco: np.ndarray) -> None:
    np.savez(tmp_path / "k.npz", names=np.array(["a.jpg"]), keypoints=coco[:1] * [8, 8, 1])
    np.testing.assert_allclose(
        load_keypoints(tmp_path / "k.npz")("a.jpg", (1024, 512))[LAYOUTS[17]][5:], coco[0, 5:] / [64, 128, 1]
    )
    image = {"id": 1, "file_name": "a.jpg", "height": 1024, "width": 512}
    annotation = {"image_id": 1, "keypoints": (coco[0] * [8, 8, 2]).ravel().tolist()}
    path = write_json(tmp_path / "c.json", {"images": [image], "annotations": [annotation]})
    np.testing.assert_allclose(load_keypoints(path)("a.jpg", SIZE)[LAYOUTS[17]][5:], coco[0, 5:] / [64, 128, 1])


def test_crop_that_was_reduced_takes_its_files_pixels(
    people: tuple[list[np.ndarray], Truth], fitter: EmbeddedFitter, fit: BodyFit, tmp_path: Path, coco: np.ndarray
) -> None:
    np.savez(tmp_path / "k.npz", names=np.array(NAMES), keypoints=coco * [8, 8, 1])
    refiner, one = Refiner(fitter.body, load_keypoints(tmp_path / "k.npz"), steps=(0, 0, 1, 0)), torch.arange(COUNT) < 1
    with pytest.raises(ValueError, match="must lie in or near the crop of 64 x 128 pixels"):
        refiner.check(NAMES[0], people[0][0])
    refiner.check(NAMES[0], people[0][0], (1024, 512))
    _, report = refiner(fit.select(one), people[0][:1], NAMES[:1], [(1024, 512)])
    assert report[0]["error2d_before"] < 15


def test_one_person_of_several(tmp_path: Path) -> None:
    def person(x: float, y: float, confidence: float, size: float = 40) -> np.ndarray:
        spread = np.random.default_rng(0).uniform(-0.5, 0.5, (25, 2)) * [size / 2, size] + [x, y]
        return np.column_stack([spread, np.full(25, confidence)])

    for name, one, other in (
        ("sure", person(32, 64, 0.9), person(32, 64, 0.5)),
        ("central", person(32, 64, 0.9), person(5, 30, 0.9)),
        ("large", person(32, 64, 0.9, 100), person(32, 64, 0.9, 30)),
    ):
        for order in ((one, other), (other, one)):
            write_json(tmp_path / f"{name}.json", openpose(*order))
            np.testing.assert_allclose(load_keypoints(tmp_path)(f"{name}.png", SIZE), one / [64, 128, 1])


def test_names_of_crops(tmp_path: Path) -> None:
    points = np.full((25, 3), 1.0)
    for name in ("query/1", "gallery/1_keypoints", "2", "3.5m", "deep/er/4", "odd.jpg_keypoints"):
        write_json(tmp_path / f"{name}.json", openpose(points))
    keypoints = load_keypoints(tmp_path)
    for name in ("query/1.jpg", "gallery/1.png", "2.jpg", "query/2.jpg", "3.5m", "4.bmp", "er/4.jpg", "odd.jpg.jpg"):
        assert keypoints(name, SIZE) is not None, name
    for name in ("1.jpg", "train/1.jpg", "other/4.jpg", "5.jpg", "3.jpg", ""):
        assert keypoints(name, SIZE) is None, name
    write_json(tmp_path / "query/1_keypoints.json", openpose(points))
    with pytest.raises(ValueError, match="must have one entry for query/1.jpg, got 2"):
        load_keypoints(tmp_path)("query/1.jpg", SIZE)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "must be JSON"),
        ("[" * 100_000, "must be JSON"),
        ("[]", "must be an object with people"),
        ('{"people": 3}', "people must be a list"),
        ('{"people": [{}]}', "must be an object with pose_keypoints_2d"),
        (openpose(np.zeros(7)), "17, 18, 25 points, got 7 numbers"),
        ({"people": [{"pose_keypoints_2d": ["x"] * 75}]}, "keypoints must be numbers"),
        ({"people": [{"pose_keypoints_2d": None}]}, "keypoints must be"),
        (openpose(np.full((25, 3), np.nan)), "confidence must be >= 0, got nan"),
        (openpose(np.full((25, 3), -1.0)), "confidence must be >= 0, got -1"),
        (openpose([[np.nan, 3, 1]] * 25), "must lie in or near the crop"),
        (openpose([[1e300, 3, 1]] * 25), "must lie in or near the crop"),
        (openpose([[500, 300, 0.9]] * 25), r"must lie in or near the crop of 64 x 128 pixels, got \(500, 300\)"),
    ],
)
def test_broken_keypoints_are_one_line_for_their_crop(tmp_path: Path, content: Any, words: str) -> None:
    write_json(tmp_path / "bad.json", content)
    write_json(tmp_path / "good.json", openpose([[32, 64, 1]] * 25))
    keypoints = load_keypoints(tmp_path)
    assert keypoints("good.jpg", SIZE) is not None
    with pytest.raises(ValueError, match=words) as caught:
        keypoints("bad.jpg", SIZE)
    assert "bad.jpg" in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_people_that_are_not_there(tmp_path: Path) -> None:
    unseen = [[np.nan, np.nan, 0]] * 25
    for name, people in (("nobody", []), ("unseen", [unseen]), ("hand", [[]])):
        write_json(tmp_path / f"{name}.json", openpose(*people))
        assert load_keypoints(tmp_path)(f"{name}.jpg", SIZE) is None


@pytest.mark.parametrize(
    ("image", "keypoints", "words"),
    [
        ({"height": -3, "width": 5}, [1, 1, 2] * 17, "height and width must be positive"),
        ({"height": "a", "width": 5}, [1, 1, 2] * 17, "height and width must be positive"),
        ({}, [1, 1, 3] * 17, "visibility 0, 1 or 2"),
        ({}, [1, 1, 2] * 133, "points, got 399 numbers"),
        ({}, "all", "visibility 0, 1 or 2"),
    ],
)
def test_broken_coco_annotation_is_its_crops_alone(
    tmp_path: Path, image: dict[str, Any], keypoints: Any, words: str
) -> None:
    images = [
        {"id": 1, "file_name": "bad.jpg", **image},
        {"id": 2, "file_name": "good.jpg"},
        {"id": 3, "file_name": ""},
    ]
    annotations = [
        {"image_id": 1, "keypoints": keypoints},
        {"image_id": 2, "keypoints": [9, 9, 1] * 17, "bbox": [0, 0, -1, -1]},
        {"image_id": 2, "bbox": [0, 0, 1, 1]},
        {"image_id": 7, "keypoints": []},
    ]
    source = load_keypoints(write_json(tmp_path / "coco.json", {"images": images, "annotations": annotations}))
    assert (source("good.jpg", SIZE)[:, 2][LAYOUTS[17]] == 0.5).all()
    with pytest.raises(ValueError, match=words):
        source("bad.jpg", SIZE)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"images": 3, "annotations": []}', '{"images": [{}], "annotations": []}']
)
def test_broken_coco_file(tmp_path: Path, content: str) -> None:
    path = write_json(tmp_path / "coco.json", content)
    with pytest.raises(ValueError, match="coco.json: must be COCO keypoints"):
        load_keypoints(path)


def test_broken_npz(tmp_path: Path) -> None:
    path = tmp_path / "k.npz"
    points, names = np.zeros((2, 17, 3)), np.array(["a.jpg", "b.jpg"])
    for arrays, words in (
        ({"names": names}, "got no keypoints"),
        ({"keypoints": points}, "got no names"),
        ({"names": names, "keypoints": points[..., :2]}, r"must be \(n, 17, 18 or 25, 3\) numbers"),
        ({"names": names[:1], "keypoints": points}, r"names must be strings, as many as keypoints"),
        ({"names": np.arange(2), "keypoints": points}, r"names must be strings, as many as keypoints"),
        ({"names": names, "keypoints": points.astype(object)}, "must be a whole .npz"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=words):
            load_keypoints(path)
    for content in (b"", b"PK\x03\x04 and no more", b"\x93NUMPY"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="k.npz: must be an .npz file"):
            load_keypoints(path)
        with pytest.raises(ValueError, match="k.npz: must be an .npz file"):
            load_masks(path)
    with pytest.raises(FileNotFoundError):
        load_masks(tmp_path / "none.npz")
    with pytest.raises(FileNotFoundError):
        load_keypoints(tmp_path / "none.json")
    np.savez(path, names=names, keypoints=np.full((2, 17, 3), np.nan))
    with pytest.raises(ValueError, match="keypoints of b.jpg in .*k.npz: confidence must be >= 0, got nan"):
        load_keypoints(path)("b.jpg", SIZE)


def test_masks_of_any_png(tmp_path: Path) -> None:
    mask = np.zeros((16, 8), bool)
    mask[4:12, 2:6] = True
    grey = Image.fromarray(mask.astype(np.uint8))
    (tmp_path / "query").mkdir()
    grey.save(tmp_path / "query" / "grey.png")
    Image.fromarray(mask).save(tmp_path / "bilevel.png")
    Image.fromarray(mask.astype(np.uint16) * 300).save(tmp_path / "deep.png")
    Image.fromarray(np.stack([mask * 0, mask * 9, mask * 0], -1).astype(np.uint8)).save(tmp_path / "colour.png")
    Image.fromarray(np.stack([mask * 0 + 9] * 3 + [mask * 255], -1).astype(np.uint8)).save(tmp_path / "cut_out.png")
    palette = Image.fromarray(mask.astype(np.uint8)).convert("P")
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "palette.png")
    Image.fromarray(mask.astype(np.uint8) * 0).save(tmp_path / "empty.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "deep.png").read_bytes()[:50])
    (tmp_path / "text.png").write_bytes(b"not a PNG")
    masks = load_masks(tmp_path)
    for name in ("query/grey.jpg", "bilevel.jpg", "deep.jpg", "colour.jpg", "cut_out.jpg", "palette.jpg"):
        np.testing.assert_array_equal(masks(name), mask, err_msg=name)
    assert masks("empty.jpg") is None and masks("missing.jpg") is None
    for name in ("broken", "text"):
        with pytest.raises(ValueError, match=f"mask of {name}.jpg in .*: {name}.png must be a PNG file") as caught:
            masks(f"{name}.jpg")
        assert "\n" not in str(caught.value)
    np.savez(tmp_path / "m.npz", names=np.array(["a"]), masks=mask[None].astype(np.float32))
    np.testing.assert_array_equal(load_masks(tmp_path / "m.npz")("a.jpg"), mask)
    np.savez(tmp_path / "m.npz", names=np.array(["a"]), masks=mask[:1])
    with pytest.raises(ValueError, match=r"masks must be \(n, H, W\) numbers"):
        load_masks(tmp_path / "m.npz")


def test_evidence_is_told_by_what_it_is(folder: Path, tmp_path: Path) -> None:
    keypoints, masks = load_evidence([folder / "masks.npz", folder / "keypoints.npz"])
    assert keypoints and masks and keypoints.path.name == "keypoints.npz" and masks.path.name == "masks.npz"
    assert load_evidence([folder / "masks.npz"])[0] is None
    write_json(tmp_path / "a.json", openpose())
    assert load_evidence([tmp_path])[1] is None
    Image.new("L", (4, 8)).save(tmp_path / "a.png")
    assert all(load_evidence([tmp_path]))
    with pytest.raises(ValueError, match="evidence must hold masks once"):
        load_evidence([tmp_path, folder / "masks.npz"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="got neither in"):
        load_evidence([tmp_path / "empty"])
    with pytest.raises(FileNotFoundError):
        load_evidence([tmp_path / "none"])


def test_doubted_fits_are_left_farther_behind(
    people: tuple[list[np.ndarray], Truth], fitter: EmbeddedFitter, fit: BodyFit, folder: Path
) -> None:
    refiner = Refiner(fitter.body, load_keypoints(folder / "keypoints.npz"))
    upright = UprightFitter()(people[0], NAMES)
    errors = {}
    for name, start in (("upright", upright), ("embedded", fit)):
        for confidence in (0.0, 1.0):
            start = replace(start, confidence=torch.full((COUNT,), confidence))
            errors[name, confidence] = joint_errors(refiner(start, people[0], NAMES)[0], people[1])[0]
    assert errors["upright", 0.0] < 0.97 * errors["upright", 1.0]
    assert errors["embedded", 1.0] < errors["embedded", 0.0]


def test_betas_of_a_body_without_clothes_fill_the_silhouette(
    people: tuple[list[np.ndarray], Truth], fit: BodyFit, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, some = load_body("full"), torch.arange(COUNT) < 16
    bare = Body(full.v_template, full.shapedirs[..., :10], full.faces, full.weights, full.regressor, full.parents)
    posed = bare(fit.rotmats, fit.betas[:, :10])
    start = replace(fit, verts=posed.verts, joints=posed.joints, betas=fit.betas[:, :10]).select(some)

    def overlap() -> float:
        _, report = Refiner(bare, masks=load_masks(folder / "masks.npz"))(start, people[0][:16], NAMES[:16])
        return np.mean([row["iou_after"] for row in report])

    filled = overlap()
    monkeypatch.setattr(refine, "CLOTHED_SHAPE", refine.SHAPE)
    assert filled > 0.83 and filled > overlap() + 0.01
