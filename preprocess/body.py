"""The body: an SMPL-format parametric human and its linear blend skinning layer.

The embedded body (assets/bake.py tells how it was made) has SMPL's 24 joints, kinematic tree, T-pose, axes (y up,
facing +z, left = +x) and ten unit-variance betas; it has no pose correctives. Pose vectors made for SMPL drive it,
betas do not carry over. Five more betas are clothes: how far they stand off the body, see CLOTHES.
"""

from functools import cache
from importlib.resources import as_file, files
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_JOINTS = 24
NUM_BETAS = 10
# What the betas of the embedded body after the tenth dress, each the share of the skin that these joints move.
CLOTHES = {
    "trunk": ("pelvis", "spine1", "spine2", "spine3", "left_collar", "right_collar"),
    "arms": ("left_shoulder", "right_shoulder", "left_elbow", "right_elbow"),
    "thighs": ("left_hip", "right_hip"),
    "shins": ("left_knee", "right_knee"),
    "head": ("head",),
}
THICKNESS = 0.02  # metres per beta of clothes
JOINT_NAMES = (
    "pelvis", "left_hip", "right_hip", "spine1", "left_knee", "right_knee", "spine2", "left_ankle", "right_ankle",
    "spine3", "left_foot", "right_foot", "neck", "left_collar", "right_collar", "head", "left_shoulder",
    "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hand", "right_hand",
)  # fmt: skip
PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)


class Posed(NamedTuple):
    """Bodies in a pose: verts (B,V,3) and joints (B,24,3), metres, in the frame of the root rotation."""

    verts: Tensor
    joints: Tensor


class Body(nn.Module):
    """Linear blend skinning of an SMPL-format body.

    Buffers: v_template (V,3) metres; shapedirs (V,3,num_betas) metres per unit beta, the ten of the person first and
    then those of the clothes, if any; faces (F,3) int64, counter-clockwise seen from outside; weights (V,24), rows
    summing to 1; regressor (24,V), rows summing to 1; posedirs (V,3,207) metres per entry of the rotation matrices of
    joints 1 to 23 less the identity, or None. `parents` is SMPL's tree. `name` tells whose betas these are:
    "embedded-full", "embedded-low", "smpl-" and the beginning of the file's SHA-256, or "".

    Source: Loper et al., "SMPL: A Skinned Multi-Person Linear Model", 2015, equations 1-4 and 9.
    """

    v_template: Tensor
    shapedirs: Tensor
    faces: Tensor
    weights: Tensor
    regressor: Tensor
    posedirs: Tensor | None

    def __init__(
        self,
        v_template: Tensor,
        shapedirs: Tensor,
        faces: Tensor,
        weights: Tensor,
        regressor: Tensor,
        parents: list[int],
        posedirs: Tensor | None = None,
        name: str = "",
        clothes: Tensor | None = None,
    ) -> None:
        """clothes: (V,3,C) metres per unit beta, shapedirs that move no joint."""
        super().__init__()
        self.name = name
        self.register_buffer("posedirs", posedirs if posedirs is None else posedirs.float(), persistent=False)
        for key, value in (
            ("v_template", v_template.float()),
            ("shapedirs", shapedirs.float()),
            ("faces", faces.long()),
            ("weights", weights.float()),
            ("regressor", regressor.float()),
        ):
            self.register_buffer(key, value, persistent=False)
        self.parents = parents
        # Joints are linear in the betas, so they never need the vertices. Summed in double precision, they are the same
        # whatever the number of threads.
        joints, shapes = (torch.tensordot(regressor.double(), x.double(), 1) for x in (v_template, shapedirs))
        self.register_buffer("j_template", joints.float(), persistent=False)
        if clothes is not None:
            self.shapedirs = torch.cat([self.shapedirs, clothes.float()], 2)
            shapes = torch.cat([shapes, shapes.new_zeros(*shapes.shape[:2], clothes.shape[2])], 2)
        self.register_buffer("j_shapedirs", shapes.float(), persistent=False)

    j_template: Tensor
    j_shapedirs: Tensor

    @property
    def num_betas(self) -> int:
        return self.shapedirs.shape[2]

    def all_betas(self, betas: Tensor) -> Tensor:
        """Betas (B,num_betas) of (B,10) or more: those that are not given are 0."""
        return F.pad(betas, (0, self.num_betas - betas.shape[1]))

    def joints(self, rotmats: Tensor, betas: Tensor) -> tuple[Tensor, Tensor]:
        """World rotations (B,24,3,3) and positions (B,24,3) of the joints: forward kinematics alone, no vertices."""
        rest = self.rest_joints(betas)
        rotation, position = [rotmats[:, 0]], [rest[:, 0]]
        for j in range(1, NUM_JOINTS):
            p = self.parents[j]
            offset = rest[:, j] - rest[:, p]
            position.append(position[p] + torch.einsum("bik,bk->bi", rotation[p], offset))
            rotation.append(rotation[p] @ rotmats[:, j])
        return torch.stack(rotation, 1), torch.stack(position, 1)

    def rest_joints(self, betas: Tensor) -> Tensor:
        """Positions (B,24,3) of the joints in the rest pose."""
        person = betas[:, :NUM_BETAS]  # clothes move no joint
        return self.j_template + torch.einsum("jck,bk->bjc", self.j_shapedirs[..., :NUM_BETAS], person)

    def forward(self, rotmats: Tensor, betas: Tensor, offsets: Tensor | None = None) -> Posed:
        """Pose the body.

        Args:
            rotmats: (B,24,3,3) rotation of each joint relative to its parent; joint 0 turns the whole body.
            betas: (B,10) shape coefficients of the person, or (B,num_betas) with those of the clothes.
            offsets: (B,V,3) metres added to the rest mesh before skinning (clothes), or None.

        Raises:
            ValueError: a shape differs from the above.
        """
        if rotmats.shape[1:] != (NUM_JOINTS, 3, 3):
            raise ValueError(f"rotmats must be (B, 24, 3, 3), got {tuple(rotmats.shape)}")
        if betas.ndim != 2 or len(betas) != len(rotmats) or betas.shape[1] not in (NUM_BETAS, self.num_betas):
            wanted = f"({len(rotmats)}, {NUM_BETAS})"
            wanted += "" if self.num_betas == NUM_BETAS else f" or ({len(rotmats)}, {self.num_betas})"
            raise ValueError(f"betas must be {wanted} like rotmats, got {tuple(betas.shape)}")
        rest = self.rest_joints(betas)
        rotation, joints = self.joints(rotmats, betas)
        translation = joints - torch.einsum("bjik,bjk->bji", rotation, rest)
        transforms = torch.cat([rotation, translation[..., None]], -1).flatten(2)  # (B,24,12)
        dirs = self.shapedirs[..., : betas.shape[1]].flatten(0, 1)
        verts = self.v_template + (betas @ dirs.T).unflatten(1, (-1, 3))
        if self.posedirs is not None:
            bent = rotmats[:, 1:] - torch.eye(3, dtype=rotmats.dtype, device=rotmats.device)
            verts = verts + (bent.flatten(1) @ self.posedirs.flatten(0, 1).T).unflatten(1, (-1, 3))
        if offsets is not None:
            verts = verts + offsets
        # A plane for each number of the blended transforms: several times faster than 3 x 4 numbers a vertex.
        a, b, c, d = (transforms.mT @ self.weights.T).unflatten(1, (3, 4)).unbind(2)  # (B,3,V) each
        x, y, z = verts.mT.contiguous()[:, :, None].unbind(1)  # (B,1,V) each
        return Posed(torch.addcmul(d, a, x).addcmul(b, y).addcmul(c, z).mT.contiguous(), joints)


@cache
def load_body(lod: str = "full") -> Body:
    """The embedded body at one of two levels of detail: "full" (about 6.9k vertices) or "low" (about 1.8k).

    Raises:
        ValueError: `lod` is neither.
    """
    if lod not in ("full", "low"):
        raise ValueError(f'lod must be "full" or "low", got {lod!r}')
    with as_file(files("reid3d.preprocess") / "assets" / f"body_{lod}.npz") as path, np.load(path) as data:
        asset = {
            k: torch.from_numpy(v.astype(np.int64 if v.dtype.kind in "iu" else np.float64)) for k, v in data.items()
        }
    count = len(asset["v_template"])
    weights = torch.zeros(count, NUM_JOINTS, dtype=torch.float64)
    weights.scatter_add_(1, asset["weights_joint"], asset["weights_value"])
    regressor = torch.zeros(NUM_JOINTS, count, dtype=torch.float64)
    regressor[asset["regressor_joint"], asset["regressor_vertex"]] = asset["regressor_value"]
    weights /= weights.sum(1, keepdim=True)  # stored as float16
    normals = vertex_normals(asset["v_template"][None], asset["f"])[0]
    shares = [weights[:, [JOINT_NAMES.index(name) for name in joints]].sum(1) for joints in CLOTHES.values()]
    return Body(
        asset["v_template"],
        asset["shapedirs"],
        asset["f"],
        weights,
        regressor,
        asset["parents"].tolist(),
        name=f"embedded-{lod}",
        clothes=THICKNESS * torch.stack([share[:, None] * normals for share in shares], 2),
    )


def some_vertices(body: Body, vertices: Tensor) -> Body:
    """The body with some of its vertices, no faces, and all joints where they were."""
    none = body.regressor.new_zeros(NUM_JOINTS, len(vertices))
    correctives = None if body.posedirs is None else body.posedirs[vertices]
    of_vertices = (body.v_template[vertices], body.shapedirs[vertices], body.faces[:0], body.weights[vertices])
    part = Body(*of_vertices, none, body.parents, correctives, body.name)
    part.j_template, part.j_shapedirs = body.j_template.clone(), body.j_shapedirs.clone()
    return part


def vertex_normals(verts: Tensor, faces: Tensor) -> Tensor:
    """Area-weighted unit normals (B,V,3) of meshes verts (B,V,3) that share faces (F,3); zero without a face."""
    corners = verts[:, faces.flatten()].unflatten(1, faces.shape)
    normal = torch.linalg.cross(corners[:, :, 1] - corners[:, :, 0], corners[:, :, 2] - corners[:, :, 0])
    out = torch.zeros_like(verts)
    for k in range(3):
        out.index_add_(1, faces[:, k], normal)
    return F.normalize(out, dim=-1)


def axis_angle_to_matrix(axis_angle: Tensor) -> Tensor:
    """Rotation matrices (...,3,3) of axis-angle vectors (...,3) in radians (Rodrigues' formula)."""
    angle = axis_angle.norm(dim=-1, keepdim=True)
    x, y, z = (axis_angle / angle.clamp(min=1e-12)).unbind(-1)
    zero = torch.zeros_like(x)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    sin, cos = angle.sin()[..., None], angle.cos()[..., None]
    return torch.eye(3, dtype=skew.dtype, device=skew.device) + sin * skew + (1 - cos) * (skew @ skew)


def rotation_6d_to_matrix(six: Tensor) -> Tensor:
    """Rotation matrices (...,3,3) whose first two columns are the Gram-Schmidt of six (...,3,2).

    Source: Zhou et al., "On the Continuity of Rotation Representations in Neural Networks", 2019, equation 15.
    """
    a, b = six.unbind(-1)
    a = F.normalize(a, dim=-1)
    b = F.normalize(b - (a * b).sum(-1, keepdim=True) * a, dim=-1)
    return torch.stack([a, b, torch.linalg.cross(a, b)], -1)


def matrix_to_axis_angle(matrix: Tensor) -> Tensor:
    """Axis-angle vectors (...,3), radians in 0..pi, of rotation matrices (...,3,3): exact about half a turn too.

    Source: Shepperd, "Quaternion from Rotation Matrix", 1978: divide by the quaternion's largest part.
    """
    m = matrix.double()
    xx, yy, zz = m.diagonal(dim1=-2, dim2=-1).unbind(-1)
    squares = torch.stack(
        [1 + xx + yy + zz, 1 + xx - yy - zz, 1 - xx + yy - zz, 1 - xx - yy + zz], -1
    )  # 4 w2, 4 x2, ..
    wx, wy, wz = (m[..., i, j] - m[..., j, i] for i, j in ((2, 1), (0, 2), (1, 0)))
    xy, xz, yz = (m[..., i, j] + m[..., j, i] for i, j in ((0, 1), (0, 2), (1, 2)))
    rows = [[squares[..., 0], wx, wy, wz], [wx, squares[..., 1], xy, xz],
            [wy, xy, squares[..., 2], yz], [wz, xz, yz, squares[..., 3]]]  # fmt: skip
    products = torch.stack([torch.stack(row, -1) for row in rows], -2)  # 4 q qT
    largest = squares.argmax(-1)[..., None, None].expand(*squares.shape[:-1], 1, 4)
    quaternion = F.normalize(products.gather(-2, largest)[..., 0, :], dim=-1)
    quaternion = torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)
    sine = quaternion[..., 1:].norm(dim=-1, keepdim=True)
    angle = 2 * torch.atan2(sine, quaternion[..., :1])
    return (quaternion[..., 1:] * torch.where(sine > 1e-12, angle / sine.clamp(min=1e-300), 2.0)).to(matrix.dtype)
