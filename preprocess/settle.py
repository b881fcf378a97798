"""Bodies brought to agree with what the network sees beside them: Gauss-Newton steps towards its joints and silhouette.

A regressed body is nearly right, but off by more pixels than the joints and the silhouette that are seen in the same
crop. Source: the term E_J of Bogo et al., "Keep it SMPL", 2016, as in refine.py, which has other evidence, more priors
and more time; silhouettes by the nearest points of both sides, as closest points are iterated in Besl and McKay,
"A Method for Registration of 3-D Shapes", 1992. The steps are damped, and their derivatives by hand. Lengths are in
half heights of the window that the network sees.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reid3d.ops import farthest_point_sample, knn

from .body import (
    CLOTHES,
    JOINT_NAMES,
    NUM_BETAS,
    NUM_JOINTS,
    Body,
    axis_angle_to_matrix,
    rotation_6d_to_matrix,
    some_vertices,
)
from .hmr import Regressed

VERTICES, OUTLINE = 112, 80  # of the body and of the silhouette's edge that are compared
STIFF = ("ankle", "foot", "wrist", "hand")  # too small to be seen turning
# Standard deviations.
JOINT = 0.03  # of a joint that is seen as clearly as any
CLEAR = 0.09  # its spread
SILHOUETTE = 0.006  # of the root mean square over all vertices or all of the outline
STEP = {"turn": 0.07, "clothes": 0.7, "zoom": 0.1, "shift": 0.1}  # radians, betas, logarithm of the scale, lengths
FAR = 0.2  # where a distance begins to count less
REACH = 0.02  # metres of skin around a vertex, which itself need not be at the outline


class Settler(nn.Module):
    """Moves bodies to where joints and silhouettes are seen; the betas of the person stay.

    body: with betas of clothes and without pose correctives, as the embedded one is.
    """

    below: Tensor
    weights: Tensor
    firmness: Tensor

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = some_vertices(body, farthest_point_sample(body.v_template[None], VERTICES)[0])
        self.free = [j for j, name in enumerate(JOINT_NAMES) if name.split("_")[-1] not in STIFF]
        below = torch.eye(NUM_JOINTS, device=body.v_template.device)
        for joint in range(NUM_JOINTS - 1, 0, -1):
            below[body.parents[joint]] += below[joint]
        # (J,24): 1 where the second moves as the first turns.
        self.register_buffer("below", below[self.free], persistent=False)
        # Joints are points like any other, each carried by itself.
        weights = torch.cat([torch.eye(NUM_JOINTS).to(below), self.body.weights.T], 1)
        self.register_buffer("weights", weights, persistent=False)  # (24,P)
        sigmas = [STEP["turn"]] * 3 * len(self.free) + [STEP["clothes"]] * len(CLOTHES)
        sigmas += [STEP["zoom"], STEP["shift"], STEP["shift"]]
        self.register_buffer("firmness", below.new_tensor(sigmas) ** -2, persistent=False)
        # The rest of what decides the outcome, for Fitter.fingerprint.
        settings = below.new_tensor([OUTLINE, JOINT, CLEAR, SILHOUETTE, FAR, REACH])
        self.register_buffer("settings", settings, persistent=False)

    def forward(self, fit: Regressed, joints2d: Tensor, spread: Tensor, mask: Tensor, steps: int) -> Regressed:
        """Settle B bodies.

        joints2d, spread: (B,24,2), (B,24), see hmr.Seen. mask: (B,H,W) bool; an empty one has no say.
        """
        outline = outline_of(mask)
        for _ in range(steps):
            posed = self.body.joints(fit.rotmats, fit.betas)
            seen, jacobian = self._points(fit, *posed)
            target, weight = _targets(seen, fit.cam[:, :1], joints2d, spread, mask, outline)
            root = weight.sqrt()[:, None].repeat(1, 1, 2)
            jacobian *= root
            normal = jacobian @ jacobian.mT
            normal.diagonal(dim1=1, dim2=2).add_(self.firmness)
            gradient = jacobian @ (root * (target - seen).mT.flatten(1)[:, None]).mT
            change = torch.cholesky_solve(gradient, torch.linalg.cholesky_ex(normal)[0])[..., 0]
            fit = self._moved(fit, *posed, change)
        return fit

    def _points(self, fit: Regressed, rotation: Tensor, joints: Tensor) -> tuple[Tensor, Tensor]:
        """Where joints and vertices are seen (B,P,2), and its derivatives (B,K,2*P), those of all x first.

        The K unknowns: turns of the free joints about the x axis of the camera, all about y, all about z; the betas of
        clothes; the logarithm of the scale; how far the pelvis is moved.
        """
        body, n, count = self.body, len(fit.cam), len(self.free)
        rest_joints = body.rest_joints(fit.betas)
        rest = body.v_template + (fit.betas @ body.shapedirs.flatten(0, 1).T).unflatten(1, (-1, 3))
        offset = joints - (rotation @ rest_joints[..., None])[..., 0]
        x, y, z = torch.cat([rest_joints, rest], 1).mT[:, :, None].unbind(1)  # (B,1,P) each
        # Of every point what each joint carries, and from there how far it is from each free joint that moves it.
        a, b, c = rotation[..., None].unbind(3)  # (B,24,3,1) each
        carried = [
            (offset[..., i, None] + a[:, :, i] * x + b[:, :, i] * y + c[:, :, i] * z) * self.weights for i in range(3)
        ]
        lever = self.below @ torch.stack(carried, 1)  # (B,3,J,P)
        lever = lever - (self.below @ self.weights) * joints[:, self.free].mT[..., None]
        scale = fit.cam[:, :1, None]
        x, y, z = (scale[..., None] * lever).unbind(1)
        about_pelvis = scale * (torch.stack([part.sum(1) for part in carried[:2]], 1) - joints[:, 0, :2, None])
        place = scale[:, 0] * (joints[:, 0, :2] + fit.cam[:, 1:])
        jacobian = x.new_zeros(n, len(self.firmness), 2, x.shape[2])
        jacobian[:, :count, 1], jacobian[:, count : 2 * count, 0] = -z, z
        jacobian[:, 2 * count : 3 * count, 0], jacobian[:, 2 * count : 3 * count, 1] = -y, x
        turned = (body.weights @ rotation[:, :, :2].flatten(2)).unflatten(2, (2, 3))
        thicker = torch.einsum("bvij,vjk->bkiv", turned, body.shapedirs[..., NUM_BETAS:])
        jacobian[:, 3 * count : -3, :, NUM_JOINTS:] = scale[..., None] * thicker
        jacobian[:, -3], jacobian[:, -2, 0], jacobian[:, -1, 1] = about_pelvis, 1, 1
        return about_pelvis.mT + place[:, None], jacobian.flatten(2)

    def _moved(self, fit: Regressed, rotation: Tensor, joints: Tensor, change: Tensor) -> Regressed:
        turn, clothes, zoom, shift = change.split([3 * len(self.free), len(CLOTHES), 1, 2], 1)
        turns = turn.new_zeros(len(turn), NUM_JOINTS, 3)
        turns[:, self.free] = turn.unflatten(1, (3, -1)).mT
        root = torch.eye(3, device=turn.device).expand(len(turn), 1, 3, 3)
        parent = torch.cat([root, rotation[:, self.body.parents[1:]]], 1)
        rotmats = axis_angle_to_matrix((parent.mT @ turns[..., None])[..., 0]) @ fit.rotmats
        rotmats = rotation_6d_to_matrix(rotmats[..., :2])  # else rounding adds up along the limbs
        betas = torch.cat([fit.betas[:, :NUM_BETAS], fit.betas[:, NUM_BETAS:] + clothes], 1)
        pelvis, old = joints[:, 0, :2], fit.cam[:, :1]
        scale, place = old * zoom.exp(), old * (pelvis + fit.cam[:, 1:]) + shift
        return Regressed(rotmats, betas, torch.cat([scale, place / scale - pelvis], 1))


def outline_of(mask: Tensor) -> Tensor:
    """Points (B,OUTLINE,2) where masks (B,H,W) end, in half crop heights; far away for one that does not.

    They lie between pixels, so beyond the crop, where nothing is known, there are none.
    """
    height, width = mask.shape[1:]
    column, row = (2 * torch.arange(side, device=mask.device) + 1 for side in (width, height))
    ends, places = [], []
    for end, x, y in (
        (mask[:, :, 1:] ^ mask[:, :, :-1], column[:-1] + 1, row[:, None]),
        (mask[:, 1:] ^ mask[:, :-1], column, row[:-1, None] + 1),
    ):
        ends.append(end.flatten(1))
        places.append(torch.stack(torch.broadcast_tensors(x - width, y - height), 2).flatten(0, 1) / height)
    rank = torch.cat(ends, 1).cumsum(1)
    count = rank[:, -1:]
    wanted = ((torch.arange(OUTLINE, device=mask.device) + 0.5) * count / OUTLINE).long() + 1
    points = torch.cat(places).float()[torch.searchsorted(rank, wanted).clamp(max=rank.shape[1] - 1)]
    return torch.where(count[..., None] > 0, points, 1e3)


def _targets(
    seen: Tensor, scale: Tensor, joints2d: Tensor, spread: Tensor, mask: Tensor, outline: Tensor
) -> tuple[Tensor, Tensor]:
    """Where the points (B,P,2) should be, and with which weights (B,P)."""
    joints, verts = seen[:, :NUM_JOINTS], seen[:, NUM_JOINTS:].contiguous()
    height, width = mask.shape[1:]
    inside = (seen.abs() < seen.new_tensor([width / height, 1.0])).all(2)  # beyond the crop nothing is seen
    clear = (CLEAR / spread).clamp(max=1) ** 2 * _share(((joints2d - joints) ** 2).sum(2)) * inside[:, :NUM_JOINTS]
    # A vertex beyond the silhouette should be on its outline, and the nearest vertex of a point of the outline there.
    size = torch.tensor([width, height], device=mask.device)
    column, row = ((verts * height + size) / 2).long().clamp(min=0).minimum(size - 1).unbind(2)
    beyond = inside[:, NUM_JOINTS:] & ~mask.flatten(1).gather(1, row * width + column)
    inwards, outwards = knn(verts, outline, 1), knn(outline, verts, 1)
    push = (beyond * _share(inwards.dist2[..., 0]) / verts.shape[1])[..., None]
    pull = (_share(outwards.dist2[..., 0]) / outline.shape[1])[..., None]
    to_vertex = outwards.idx.expand(-1, -1, 2)
    gap = 1 - REACH * scale[..., None] / outwards.dist2.sqrt().clamp(min=1e-6)
    wanted = torch.lerp(verts.gather(1, to_vertex), outline, gap.clamp(min=0))
    # As products with 0 and 1, whose sums no device takes in another order each time.
    mine = F.one_hot(outwards.idx[..., 0], verts.shape[1]).to(seen).mT
    weight = push + mine @ pull
    aim = push * outline.gather(1, inwards.idx.expand(-1, -1, 2)) + mine @ (pull * wanted)
    aim = torch.where(weight > 0, aim / weight, verts)
    return torch.cat([joints2d, aim], 1), torch.cat([clear / JOINT**2, weight[..., 0] / SILHOUETTE**2], 1)


def _share(square: Tensor) -> Tensor:
    """How much a squared distance counts: the weight of Geman and McClure's loss, see refine.robust."""
    return (FAR**2 / (square + FAR**2)) ** 2
