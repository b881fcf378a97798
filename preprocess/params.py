"""Bodies that another estimator found, read from a file: what connects any of them to the conversion.

An .npz file with one row for each of n crops:

    names       (n,) str        the crops, as in a manifest: paths below the image folder, "/"-separated
  the body, one of
    pose        (n,72), (n,24,3) axis-angle in radians or (n,24,3,3) rotation matrices of SMPL's joints, the root first
    verts       (n,V,3)         metres
  with pose, if known
    betas       (n,K)           SMPL's shape; taken when the conversion has an SMPL body, and only the first 10
  with verts, unless they are the body's
    faces       (F,3) int       triangles, counter-clockwise seen from outside
  the camera, one of
    cam         (n,3)           weak perspective [s, tx, ty] of the crop, see camera.py: s in half crop heights a metre
    transl      (n,3)           metres that move the body into the frame of a perspective camera; and with it
    focal       () or (n,)      its focal length in pixels of the full image,
    image_size  (2,) or (n,2)   width and height of that image, whose centre is the principal point, and,
    crop_box    (n,4)           unless the crop is the image, x0, y0, x1, y1 of the crop in it
  and, if known
    confidence  (n,)            0..1, how far to trust the row; 1 if absent

All of it is in the camera's frame: x right, y down, z away. What was made y up is to be turned half about x first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .body import NUM_BETAS, NUM_JOINTS, Body, axis_angle_to_matrix
from .camera import check_crops
from .fit import BodyFit, Fitter, own_body

KEYS = "names pose verts betas faces cam transl focal image_size crop_box confidence".split()
TOLERANCE = 1e-3  # how far a rotation matrix times its transpose may be from the identity


class ParamsFitter(Fitter):
    """Bodies from a file. The crops' pixels are not looked at, their names are.

    A crop is found by its name, or by its file name alone where the row or the crop has no folder and only one row has
    that file name. A crop that is not found has NaN for a body and confidence 0; so has one whose row holds a number
    that is not finite, or a body that is not in front of its camera.

    Args:
        file: an .npz, see this module.
        body: a licensed SMPL body; None for the embedded one, whose betas stay 0.

    Raises:
        ValueError: the file breaks a rule. FileNotFoundError: there is none.
    """

    cam: Tensor
    confidence: Tensor
    betas: Tensor
    rotmats: Tensor | None
    verts: Tensor | None
    own_faces: Tensor | None

    def __init__(self, file: str | Path, body: Body | None = None) -> None:
        super().__init__()
        self.body = own_body(body)
        table = _Table(Path(file))
        names = table.names()
        count = len(names)
        cam, confidence, betas = table.camera(count), table.confidence(count), table.betas(count)
        posed = table.one_of("pose", "verts") == "pose"
        bodies = table.rotations(count) if posed else table.numbers("verts", (count, -1, 3))
        self.register_buffer("own_faces", table.faces(bodies.shape[1], self.body))
        finite = [values.isfinite().flatten(1).all(1) for values in (bodies, cam, betas, confidence[:, None])]
        failed = ~(torch.stack(finite).all(0) & (cam[:, 0] > 0))
        if body is None:
            betas = torch.zeros_like(betas)
        for values in (bodies, cam, betas):
            values[failed] = torch.nan
        confidence[failed] = 0
        self.register_buffer("rotmats", bodies if posed else None)
        self.register_buffer("verts", None if posed else bodies)
        self.register_buffer("cam", cam)
        self.register_buffer("betas", betas)
        self.register_buffer("confidence", confidence)
        self.register_buffer("names", torch.tensor(list("\n".join(names).encode()), dtype=torch.uint8))
        self.row = {name: i for i, name in enumerate(names)}
        self.row_of_file: dict[str, int | None] = {}
        for i, name in enumerate(names):
            tail = name.rpartition("/")[2]
            self.row_of_file[tail] = None if tail in self.row_of_file else i
        self.bare = ["/" not in name for name in names]

    @property
    def faces(self) -> Tensor:
        return self.body.faces if self.own_faces is None else self.own_faces

    def find(self, name: str) -> int | None:
        """The row of a crop."""
        folder, _, tail = name.rpartition("/")
        row = self.row_of_file.get(tail)
        return self.row.get(name, row if row is not None and (not folder or self.bare[row]) else None)

    @torch.no_grad()
    def forward(self, crops: Sequence[np.ndarray], names: Sequence[str]) -> BodyFit:
        check_crops(crops)
        found = [self.find(name) for name in names]
        rows = torch.tensor([row or 0 for row in found], device=self.cam.device)
        absent = torch.tensor([row is None for row in found], device=self.cam.device)

        def take(table: Tensor, otherwise: float = torch.nan) -> Tensor:
            return table[rows].masked_fill_(absent.view(-1, *[1] * (table.dim() - 1)), otherwise)

        cam, confidence = take(self.cam), take(self.confidence, 0.0)
        if self.verts is not None:
            return BodyFit(take(self.verts), cam, confidence)
        assert self.rotmats is not None
        rotmats, betas = take(self.rotmats), take(self.betas)
        posed = self.body(rotmats, betas)
        return BodyFit(posed.verts, cam, confidence, rotmats, betas, posed.joints)


class _Table:
    """The arrays of a file, held against the rules of this module."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"params must be a file, got {path}")
        self.path = path
        try:
            with np.load(path, allow_pickle=False) as file:
                self.arrays = {key: file[key] for key in file.files}
        except Exception as error:  # whatever the readers stumble over in a broken file
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"params must be an .npz of plain arrays, got {path}: {reason}") from error
        unknown = sorted(self.arrays.keys() - set(KEYS))
        if unknown:
            raise self.error("keys", f"must be among {', '.join(KEYS)}", ", ".join(map(repr, unknown)))

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def error(self, key: str, rule: str, value: object) -> ValueError:
        return ValueError(f"{self.path}: {key} {rule}, got {value}")

    def one_of(self, *keys: str) -> str:
        given = [key for key in keys if key in self]
        if len(given) != 1:
            raise self.error("keys", f"must include one of {' and '.join(keys)}", " and ".join(given) or "neither")
        return given[0]

    def only_with(self, key: str, *others: str) -> None:
        for other in others:
            if other in self and key not in self:
                raise self.error(other, f"must come with {key}", f"{other} without it")

    def array(self, key: str, kinds: str, what: str, *shapes: tuple[int, ...]) -> np.ndarray:
        """An array of a kind and one of the shapes, -1 for any length."""
        wanted = " or ".join(str(shape).replace("-1", "any") for shape in shapes)
        if key not in self:
            raise self.error(key, f"must be {what} {wanted}", "no such key")
        array = self.arrays[key]
        fits = any(
            array.ndim == len(shape) and all(n in (-1, m) for n, m in zip(shape, array.shape, strict=True))
            for shape in shapes
        )
        if array.dtype.kind not in kinds or not fits:
            raise self.error(key, f"must be {what} {wanted}", f"{array.dtype} {array.shape}")
        return array

    def numbers(self, key: str, *shapes: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(self.array(key, "fiu", "numbers", *shapes).astype(np.float32))

    def refuse(self, key: str, rule: str, wrong: Tensor) -> None:
        """Raise where any row of a mask (n,) is true."""
        if wrong.any():
            row, values = int(wrong.nonzero()[0, 0]), self.arrays[key]
            raise self.error(key, rule, f"{values[row]} in row {row}" if values.shape[:1] == wrong.shape else values)

    def names(self) -> list[str]:
        names = self.array("names", "U", "text", (-1,)).tolist()
        if not names:
            raise self.error("names", "must name a crop", "none")
        twice = sorted(name for name, times in Counter(names).items() if times > 1)
        if twice:
            raise self.error("names", "must differ", f"{twice[0]!r} more than once")
        return names

    def confidence(self, count: int) -> Tensor:
        if "confidence" not in self:
            return torch.ones(count)
        confidence = self.numbers("confidence", (count,))
        self.refuse("confidence", "must be in 0..1", (confidence < 0) | (confidence > 1))
        return confidence

    def betas(self, count: int) -> Tensor:
        self.only_with("pose", "betas")
        betas = torch.zeros(count, NUM_BETAS)
        if "betas" in self:
            given = self.numbers("betas", (count, -1))[:, :NUM_BETAS]  # each explains more than all that follow
            betas[:, : given.shape[1]] = given
        return betas

    def rotations(self, count: int) -> Tensor:
        joints = (count, NUM_JOINTS, 3)
        pose = self.numbers("pose", (count, NUM_JOINTS * 3), joints, (*joints, 3))
        if pose.dim() < 4:
            return axis_angle_to_matrix(pose.view(joints))
        off = (pose.mT @ pose - torch.eye(3)).abs().amax((1, 2, 3))
        turned = torch.linalg.det(pose).amin(1)
        wrong = (off > TOLERANCE) | (turned < 0)  # neither for NaN
        if wrong.any():
            raise self.error("pose", "must be rotation matrices", f"others in row {int(wrong.nonzero()[0, 0])}")
        return pose

    def faces(self, vertices: int, body: Body) -> Tensor | None:
        self.only_with("verts", "faces")
        if "faces" in self:
            faces = self.array("faces", "iu", "integers", (-1, 3))
            if not faces.size or faces.min() < 0 or faces.max() >= vertices:
                rule = f"must be triangles of vertices 0..{vertices - 1}"
                raise self.error("faces", rule, f"{faces.min()}..{faces.max()}" if faces.size else "none")
            return torch.from_numpy(faces.astype(np.int64))
        if "verts" in self and vertices != len(body.v_template):
            rule = f"must have the body's {len(body.v_template)} vertices, or faces beside them"
            raise self.error("verts", rule, f"{vertices} vertices")
        return None

    def camera(self, count: int) -> Tensor:
        """Weak-perspective cameras (n,3) of the crops.

        A point (X, Y, Z) falls f (X + Tx) / (Z + Tz) pixels to the right of the image's centre. At depth Tz, where the
        body is, that is linear in X; in half crop heights h / 2 from the centre c of the crop it is s (X + tx) with
        s = 2 f / (h Tz) and tx = Tx - c Tz / f, c being measured from the image's centre.

        Source: the inverse of cam_crop_to_full in 4D-Humans' code.
        """
        self.only_with("transl", "focal", "image_size", "crop_box")
        if self.one_of("cam", "transl") == "cam":
            return self.numbers("cam", (count, 3))
        transl = self.numbers("transl", (count, 3))
        focal = self.numbers("focal", (), (count,)).expand(count)
        size = self.numbers("image_size", (2,), (count, 2)).expand(count, 2)
        box = torch.cat([torch.zeros_like(size), size], 1)
        self.refuse("focal", "must be positive", focal <= 0)
        self.refuse("image_size", "must be positive", (size <= 0).any(1))
        if "crop_box" in self:
            box = self.numbers("crop_box", (count, 4))
            self.refuse("crop_box", "must be x0 < x1, y0 < y1", (box[:, 2:] <= box[:, :2]).any(1))
        depth, height = transl[:, 2], box[:, 3] - box[:, 1]
        centre = (box[:, :2] + box[:, 2:] - size) / 2
        s = 2 * focal / (height * depth)
        return torch.cat([s[:, None], transl[:, :2] - centre * (depth / focal)[:, None]], 1)
