"""What is known of crops from elsewhere: 2-D keypoints and silhouettes, by the names of the crops.

A crop's name is its path relative to the source folder, as in a manifest. An entry belongs to a crop if, extensions
aside, their paths are the same or one ends with the other (crop query/7.jpg, entry 7.json); the same path goes first,
and an entry that is not the only one of that kind is passed over. Pixels count from the left and upper border of the
crop's image file as it is shown (EXIF orientation applied), before any resampling.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from reid3d.data.images import MAX_PIXELS
from reid3d.data.layouts import EXTENSIONS

POINTS = (
    "nose", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist",
    "mid_hip", "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle", "right_eye", "left_eye",
    "right_ear", "left_ear", "left_big_toe", "left_small_toe", "left_heel", "right_big_toe", "right_small_toe",
    "right_heel",
)  # fmt: skip
COCO = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
    "right_ankle",
)  # fmt: skip
LAYOUTS = {  # indices into POINTS by the number of keypoints: COCO, OpenPose's COCO and its BODY_25
    17: [POINTS.index(name) for name in COCO],
    18: [*range(8), *range(9, 19)],
    25: [*range(25)],
}
KEYPOINTS_SUFFIX = "_keypoints"  # of OpenPose's files


class Person(NamedTuple):
    """What a file says of one person: [x, y, confidence] of the keypoints of a layout, in pixels, end to end."""

    values: Any
    size: tuple[float, float] | None = None  # (H, W) of the image, where the file tells


class _Entries:
    """Anything by the names of crops, extensions aside."""

    def __init__(self, entries: Iterable[tuple[str, Any]]) -> None:
        self._by_stem: dict[str, list[tuple[list[str], Any]]] = {}
        for stem, entry in entries:
            parts = stem.split("/")
            self._by_stem.setdefault(parts[-1], []).append((parts, entry))

    def find(self, name: str, what: str) -> Any | None:
        parts = _stem(name).split("/")
        near = self._by_stem.get(parts[-1], [])
        same = [entry for other, entry in near if other == parts]
        if len(same) > 1:
            raise ValueError(f"{what} must have one entry for {name}, got {len(same)}")
        ends = [entry for other, entry in near if all(a == b for a, b in zip(other[::-1], parts[::-1], strict=False))]
        return same[0] if same else ends[0] if len(ends) == 1 else None


class Keypoints:
    """2-D keypoints of crops, made by `load_keypoints`. fingerprint: of what they were read from."""

    def __init__(self, path: Path, entries: Iterable[tuple[str, Callable[[], list[Person]]]], fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        self._entries = _Entries(entries)

    def __call__(self, name: str, size: tuple[int, int]) -> np.ndarray | None:
        """The keypoints of a crop's person: (25,3) float64 in the order of POINTS, None where nobody was found.

        x and y are shares of the crop's width and height; confidence is 0..1, 0 where there is no such keypoint. Of
        several people it is the one with the highest sum of confidences, times its size, less what it is off centre.

        Args:
            name: of the crop. size: (H, W) of its image file in pixels; what the evidence itself says goes first.

        Raises:
            ValueError: naming the crop and the file, for content that cannot be what it should be.
            OSError: the file cannot be read.
        """
        read = self._entries.find(name, str(self.path))
        if read is None:
            return None
        try:
            people = [_place(person, size) for person in read()]
        except ValueError as error:
            raise ValueError(f"keypoints of {name} in {self.path}: {error}") from error
        return max((points for points in people if points[:, 2].any()), key=_prominence, default=None)


class Masks:
    """Silhouettes of crops, made by `load_masks`. fingerprint: of what they were read from."""

    def __init__(self, path: Path, entries: Iterable[tuple[str, Callable[[], np.ndarray]]], fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        self._entries = _Entries(entries)

    def __call__(self, name: str) -> np.ndarray | None:
        """The silhouette of a crop's person (h,w) bool at the evidence's resolution; None where there is no pixel.

        Raises:
            ValueError: naming the crop and the file, for what is no mask. OSError: the file cannot be read.
        """
        read = self._entries.find(name, str(self.path))
        if read is None:
            return None
        try:
            mask = read()
        except ValueError as error:
            raise ValueError(f"mask of {name} in {self.path}: {error}") from error
        return mask if mask.any() else None


def load_keypoints(path: str | Path) -> Keypoints:
    """Keypoints from a folder of OpenPose's JSON files, a COCO keypoints file or an .npz.

    - A folder, with the folders in it: NAME_keypoints.json or NAME.json for the crop NAME, with the keypoints
      pose_keypoints_2d of BODY_25 or COCO-18. A file is read when its crop is asked for.
    - NAME.json: images (id, file_name, and width and height if the file knows them) and annotations (image_id,
      keypoints). Visibility 2 counts as confidence 1, 1 as 0.5.
    - NAME.npz: names (n,) and keypoints (n,K,3) [x, y, confidence], K = 17 (COCO), 18 or 25 (OpenPose).

    Raises:
        FileNotFoundError: nothing is there. ValueError: it is none of these.
    """
    path = Path(path)
    if path.is_dir():
        files = _walk(path, ".json")
        stems = [(file.removesuffix(".json").removesuffix(KEYPOINTS_SUFFIX), path / file) for file, _ in files]
        return Keypoints(path, [(stem, partial(_read_openpose, file)) for stem, file in stems], _listing(files))
    if path.suffix.lower() == ".npz":
        names, keypoints = _read_npz(path, "keypoints")
        if keypoints.dtype.kind not in "iuf" or keypoints.ndim != 3 or keypoints.shape[1:] not in [
            (count, 3) for count in LAYOUTS
        ]:  # fmt: skip
            raise ValueError(f"{path}: keypoints must be (n, 17, 18 or 25, 3) numbers, got {_kind(keypoints)}")
        people: list[tuple[str, Callable[[], list[Person]]]] = [
            (name, partial(list, [Person(row)])) for name, row in zip(names, keypoints, strict=True)
        ]
        return Keypoints(path, people, _contents(path))
    return Keypoints(path, _read_coco(path), _contents(path))


def load_masks(path: str | Path) -> Masks:
    """Silhouettes from a folder of PNG files, NAME.png for the crop NAME, or an .npz: names (n,) and masks (n,H,W).

    What is not 0 is the person; transparent pixels are not. A file in a folder is read when its crop is asked for.

    Raises:
        FileNotFoundError: nothing is there. ValueError: it is none of these.
    """
    path = Path(path)
    if path.is_dir():
        files = _walk(path, ".png")
        return Masks(path, [(file[:-4], partial(_read_png, path / file)) for file, _ in files], _listing(files))
    names, masks = _read_npz(path, "masks")
    if masks.dtype.kind not in "biuf" or masks.ndim != 3 or 0 in masks.shape[1:]:
        raise ValueError(f"{path}: masks must be (n, H, W) numbers, got {_kind(masks)}")
    return Masks(path, [(name, partial(np.not_equal, mask, 0)) for name, mask in zip(names, masks, strict=True)],
                 _contents(path))  # fmt: skip


def load_evidence(paths: Sequence[str | Path]) -> tuple[Keypoints | None, Masks | None]:
    """Keypoints and silhouettes from files and folders that `load_keypoints` and `load_masks` read, whichever they are.

    One .npz, or one folder with JSON and PNG files, may hold both.

    Raises:
        FileNotFoundError: nothing is there. ValueError: there is neither in it, or more than one of a kind.
    """
    keypoints: list[Keypoints] = []
    masks: list[Masks] = []
    for path in map(Path, paths):
        if path.is_dir():
            held = {kind for kind, suffix in (("keypoints", ".json"), ("masks", ".png")) if _walk(path, suffix)}
        elif path.suffix.lower() == ".npz":
            held = set(_open_npz(path)) & {"keypoints", "masks"}
        else:
            held = {"keypoints"}
        if not held:
            raise ValueError(f"evidence must be keypoints or masks, got neither in {path}")
        keypoints += [load_keypoints(path)] if "keypoints" in held else []
        masks += [load_masks(path)] if "masks" in held else []
    for kind, found in (("keypoints", keypoints), ("masks", masks)):
        if len(found) > 1:
            raise ValueError(f"evidence must hold {kind} once, got {', '.join(str(source.path) for source in found)}")
    return (keypoints[0] if keypoints else None), (masks[0] if masks else None)


def _stem(name: str) -> str:
    stem, extension = os.path.splitext(name)
    return stem if extension.lower() in EXTENSIONS else name


def _place(person: Person, size: tuple[int, int]) -> np.ndarray:
    """(25,3) of a person: x, y in shares of the image's width and height, and confidence."""
    height, width = person.size or size
    try:
        values = np.asarray(person.values, np.float64).ravel()
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"keypoints must be numbers, got {str(person.values)[:60]}") from error
    if len(values) not in [3 * count for count in LAYOUTS]:
        counts = ", ".join(map(str, LAYOUTS))
        raise ValueError(f"keypoints must be [x, y, confidence] of {counts} points, got {len(values)} numbers")
    points = np.zeros((len(POINTS), 3))
    points[LAYOUTS[len(values) // 3]] = values.reshape(-1, 3)
    if not (points[:, 2] >= 0).all():  # false for NaN
        bad = points[~(points[:, 2] >= 0), 2][0]
        raise ValueError(f"confidence must be >= 0, got {bad}")
    points[points[:, 2] == 0] = 0
    off = ~(np.abs(points[:, :2] / (width, height) - 0.5) <= 1.5).all(1) & (points[:, 2] > 0)
    if off.any():
        x, y = points[off][0, :2]
        raise ValueError(f"keypoints must lie in or near the crop of {width:g} x {height:g} pixels, got ({x:g}, {y:g})")
    points[:, :2] /= (width, height)
    points[:, 2] = points[:, 2].clip(max=1)
    return points


def _prominence(points: np.ndarray) -> float:
    known = points[points[:, 2] > 0]
    off_centre = np.linalg.norm(np.average(known[:, :2], 0, known[:, 2]) - 0.5)
    return float(known[:, 2].sum() * np.linalg.norm(np.ptp(known[:, :2], 0)) / (1 + 4 * off_centre**2))


def _read_openpose(path: Path) -> list[Person]:
    people = _fields(_read_json(path), "people")[0]
    if not isinstance(people, list):
        raise ValueError(f"people must be a list, got {str(people)[:60]}")
    values = [_fields(person, "pose_keypoints_2d")[0] for person in people]
    return [Person(v) for v in values if v != []]  # a hand or a face alone


def _read_coco(path: Path) -> list[tuple[str, Callable[[], list[Person]]]]:
    try:
        images, annotations = _fields(_read_json(path), "images", "annotations")
        by_id: dict[Any, list[Any]] = {_fields(image, "id", "file_name")[0]: [] for image in images}
        for annotation in annotations:
            if "keypoints" in annotation and not annotation.get("iscrowd"):
                by_id.get(annotation.get("image_id"), []).append(annotation["keypoints"])
        return [(_stem(image["file_name"]), partial(_coco_people, image, by_id[image["id"]])) for image in images]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: must be COCO keypoints: {error}") from error


def _coco_people(image: dict[str, Any], keypoints: list[Any]) -> list[Person]:
    size = None
    if "height" in image and "width" in image:
        size = image["height"], image["width"]
        if not all(isinstance(side, int | float) and 0 < side < 1e6 for side in size):
            raise ValueError(f"height and width must be positive, got {size}")
    people = []
    for values in keypoints:
        if not isinstance(values, list) or not all(v in (0, 1, 2) for v in values[2::3]):
            raise ValueError(f"keypoints must be [x, y, visibility 0, 1 or 2, ...], got {str(values)[:60]}")
        people.append(Person([v / 2 if i % 3 == 2 else v for i, v in enumerate(values)], size))
    return people


def _read_png(path: Path) -> np.ndarray:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"more than {MAX_PIXELS // 1_000_000} megapixels: {image.width} x {image.height}")
            pixels = np.asarray(image.convert("RGBA") if image.has_transparency_data else image)
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow's readers raise almost anything on broken bytes
        raise ValueError(f"{path.name} must be a PNG file: {' '.join(str(error).split())}") from error
    if pixels.shape[2:] == (4,):
        pixels = pixels[..., :3] * (pixels[..., 3:] > 0)
    return (pixels.reshape(*pixels.shape[:2], -1) != 0).any(2)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} must be JSON: {error}") from error


def _fields(value: Any, *names: str) -> list[Any]:
    if not isinstance(value, dict) or not all(name in value for name in names):
        raise ValueError(f"must be an object with {' and '.join(names)}, got {str(value)[:60]}")
    return [value[name] for name in names]


def _open_npz(path: Path) -> dict[str, Any]:
    """The arrays of a file by name, none of them read."""
    try:
        archive = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"evidence must be a file or a folder, got {path}") from None
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: must be an .npz file: {error}") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(f"{path}: must be an .npz file, got one array")
    return dict.fromkeys(archive.files, archive)


def _read_npz(path: Path, field: str) -> tuple[list[str], np.ndarray]:
    archive = _open_npz(path)
    if missing := {"names", field} - set(archive):
        raise ValueError(f"{path}: must hold names and {field}, got no {' and no '.join(sorted(missing))}")
    try:
        names, values = archive["names"]["names"], archive[field][field]
    except Exception as error:  # what a broken archive or an array of objects raises depends on numpy's version
        raise ValueError(f"{path}: must be a whole .npz file: {error}") from error
    if names.dtype.kind not in "US" or names.ndim != 1 or names.shape != values.shape[:1]:
        raise ValueError(f"{path}: names must be strings, as many as {field}, got {_kind(names)}, {_kind(values)}")
    return [_stem(name.decode() if isinstance(name, bytes) else str(name)) for name in names], values


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape}"


def _walk(folder: Path, suffix: str) -> list[tuple[str, int]]:
    """Files of that kind under a folder, by path relative to it, and their sizes in bytes."""
    found = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names if name.endswith(suffix)]
    return sorted((path.relative_to(folder).as_posix(), path.stat().st_size) for path in found if path.is_file())


def _listing(files: list[tuple[str, int]]) -> str:
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]


def _contents(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
