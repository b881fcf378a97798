"""Renders synthetic people as surveillance crops, with the ground truth of a fit beside each."""

from dataclasses import dataclass, fields, replace
from math import pi

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from reid3d.ops import rasterize
from reid3d.ops.rasterize import barycentric

from ..body import axis_angle_to_matrix, load_body, vertex_normals
from .people import People, Tailor, choice, normal, sample_colours, uniform

HEIGHT, WIDTH = 128, 64


@dataclass(frozen=True)
class Views:
    """How n images are taken; every field is a tensor with leading size n. Angles are radians."""

    yaw: Tensor  # (n,) heading: 0 walks towards the camera, pi/2 to the image's right
    pitch: Tensor  # (n,) the camera looks down by this much
    roll: Tensor  # (n,)
    distance: Tensor  # (n,) metres
    fill: Tensor  # (n,) height of the person relative to the crop's
    shift: Tensor  # (n,2) of the person's box from the crop's centre, in crop widths and heights
    light: Tensor  # (n,3) unit direction towards the light, camera frame
    ambient: Tensor  # (n,) 0..1
    exposure: Tensor  # (n,)
    gain: Tensor  # (n,3) white balance
    gamma: Tensor  # (n,)
    blur: Tensor  # (n,) pixels
    noise: Tensor  # (n,)
    occluder: Tensor  # (n,2,8) ellipse or box: centre x, y, radii (crop units), angle, r, g, b; radius 0 for none

    def __len__(self) -> int:
        return len(self.yaw)

    def __getitem__(self, index: Tensor) -> "Views":
        return replace(self, **{f.name: getattr(self, f.name)[index] for f in fields(self)})


@dataclass(frozen=True)
class Truth:
    """What a perfect fit would say of n images."""

    rotmats: Tensor  # (n,24,3,3), the root in the camera frame
    betas: Tensor  # (n,10)
    cam: Tensor  # (n,3) weak perspective, see camera.py
    joints2d: Tensor  # (n,24,2) in half crop heights from the crop's centre: what camera.py calls s (X + t)
    mask: Tensor  # (n,H,W) bool, the clothed person, not cut by occluders


def sample_views(n: int, generator: Generator) -> Views:
    """Views far more varied than any camera's, for training."""
    steep = torch.tensor([0.05, 0.2, 0.4])[choice(generator, n, [0.5, 0.35, 0.15])]
    light = F.normalize(normal(generator, (n, 3)) - torch.tensor([0.0, 1.2, 0.8]), dim=1)
    shift = normal(generator, (n, 2)) * torch.tensor([0.05, 0.025])
    fill = (0.92 + normal(generator, n, 0.05)).clamp(0.75, 1.12)
    cut = uniform(generator, n) < 0.12  # the box ends at the knees
    shift[:, 1] += torch.where(cut, uniform(generator, n, 0.05, 0.3), 0.0)
    radii = torch.stack([uniform(generator, (n, 2), 0.05, 0.3), uniform(generator, (n, 2), 0.03, 0.15)], -1)
    radii = radii * (uniform(generator, (n, 2, 1)) < 0.16)
    occluder = torch.cat(
        [
            uniform(generator, (n, 2, 1)),
            uniform(generator, (n, 2, 1), 0.2, 1.05),
            radii,
            uniform(generator, (n, 2, 1), 0, pi),
            sample_colours(generator, 2 * n).view(n, 2, 3),
        ],
        -1,
    )
    return Views(
        yaw=uniform(generator, n, -pi, pi),
        pitch=(normal(generator, n, 0.1) + steep).clamp(-0.15, 0.7),
        roll=normal(generator, n, 0.04),
        distance=4 * 4.5 ** uniform(generator, n),
        fill=torch.where(cut, fill * uniform(generator, n, 1.0, 1.25), fill),
        shift=shift,
        light=light,
        ambient=uniform(generator, n, 0.3, 0.75),
        exposure=uniform(generator, n, 0.45, 1.35),
        gain=1 + normal(generator, (n, 3), 0.06),
        gamma=uniform(generator, n, 0.7, 1.4),
        blur=torch.where(uniform(generator, n) < 0.7, uniform(generator, n, 0.2, 1.4), 0.0),
        noise=uniform(generator, n, 0.0, 0.04),
        occluder=occluder,
    )


def sample_backgrounds(n: int, width: int, generator: Generator) -> Tensor:
    """Street-like clutter (n,128,width,3): smooth or blocky walls, a ground, a few boxes and poles, grain."""
    base, ground = sample_colours(generator, n), sample_colours(generator, n)
    strength = uniform(generator, (n, 1, 1, 1), 0.05, 0.6)
    cells = max(3, width // 16)
    coarse = torch.rand(n, 3, 6, cells, generator=generator)
    coarse = torch.lerp(coarse.mean(1, keepdim=True), coarse, uniform(generator, (n, 1, 1, 1)) ** 2)  # mostly greyish
    smooth = F.interpolate(coarse, (HEIGHT, width), mode="bicubic", align_corners=False)
    blocky = F.interpolate(coarse, (HEIGHT, width), mode="nearest")
    wall = torch.where(uniform(generator, (n, 1, 1, 1)) < 0.65, smooth, blocky).permute(0, 2, 3, 1)
    image = wall * strength + base[:, None, None] * (1 - strength)
    y = torch.arange(HEIGHT)[:, None].expand(HEIGHT, width)
    x = torch.arange(width)[None].expand(HEIGHT, width)
    horizon = uniform(generator, (n, 1, 1), 0.2, 0.95) * HEIGHT
    image = torch.where((y >= horizon)[..., None], image * 0.4 + ground[:, None, None] * 0.6, image)
    for k in range(5 * max(1, width // 128)):
        cx, cy = uniform(generator, (n, 1, 1), -10, width), uniform(generator, (n, 1, 1), -20, HEIGHT)
        thin = uniform(generator, (n, 1, 1)) < 0.4
        w = torch.where(thin, 2.0, 2 - 15 * uniform(generator, (n, 1, 1), 1e-3, 1).log())
        h = torch.where(thin, 60.0, 2 - 30 * uniform(generator, (n, 1, 1), 1e-3, 1).log())
        slope = normal(generator, (n, 1, 1), 0.4) * thin
        colour = sample_colours(generator, n)[:, None, None]
        u, v = x - cx - slope * (y - cy), y - cy
        box = (u >= 0) & (u < w) & (v >= 0) & (v < h) & (uniform(generator, (n, 1, 1)) < (0.8 if k < 2 else 0.45))
        image = torch.where(box[..., None], colour, image)
    grain = F.interpolate(torch.randn(n, 1, HEIGHT // 2, width // 2, generator=generator), (HEIGHT, width))
    return image + grain.permute(0, 2, 3, 1) * uniform(generator, (n, 1, 1, 1), 0, 0.06)


def _blur(image: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of images (n,H,W,3), each with its own sigma (n,) in pixels."""
    tap = torch.arange(-4, 5)
    kernel = torch.exp(-0.5 * (tap / sigma.clamp(min=0.05)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None]
    n, height, width, _ = image.shape
    flat = F.pad(image.permute(0, 3, 1, 2).reshape(1, 3 * n, height, width), (4, 4, 4, 4), mode="replicate")
    flat = F.conv2d(F.conv2d(flat, kernel[:, :, None], groups=3 * n), kernel[..., None], groups=3 * n)
    return flat.view(n, 3, height, width).permute(0, 2, 3, 1)


def _occlude(image: Tensor, shape: Tensor) -> Tensor:
    """Draw one ellipse (steep ones become boxes) with parameters shape (n,8) of Views.occluder."""
    n, height, width, _ = image.shape
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / height, indexing="ij")
    cx, cy, rx, ry, angle = (c[:, None, None] for c in shape[:, :5].unbind(1))
    dx, dy = x - cx * width / height, y - cy
    u, v = (
        (dx * angle.cos() + dy * angle.sin()) / rx.clamp(min=1e-6),
        (dy * angle.cos() - dx * angle.sin()) / ry.clamp(min=1e-6),
    )
    inside = torch.where(angle > pi / 2, (u.abs() < 1) & (v.abs() < 1), u * u + v * v < 1) & (rx > 0)
    return torch.where(inside[..., None], shape[:, None, None, 5:], image)


class Renderer:
    """Draws people; holds the low body and its clothes."""

    def __init__(self) -> None:
        self.body = load_body("low")
        self.tailor = Tailor(self.body)
        self.rest_normals = vertex_normals(self.body.v_template[None], self.body.faces)[0]

    @torch.no_grad()
    def __call__(
        self, people: People, poses: Tensor, views: Views, backgrounds: Tensor, generator: Generator
    ) -> tuple[Tensor, Truth]:
        """Crops (n,128,64,3) uint8 and the truth about them.

        Args:
            people: n people.
            poses: (n,24,3,3) from sample_poses; the root's rotation is added to the view's.
            views: n views.
            backgrounds: (n,128,64,3) in 0..1.
        """
        n, body = len(people), self.body
        zero = torch.zeros(n)

        def turn(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            return axis_angle_to_matrix(torch.stack([x, y, z], 1))

        root = turn(zero, zero, views.roll) @ turn(views.pitch, zero, zero) @ turn(zero + pi, zero, zero)
        poses = torch.cat([(root @ turn(zero, views.yaw, zero) @ poses[:, 0])[:, None], poses[:, 1:]], 1)
        clothes = self.tailor.offsets(people)[..., None] * self.rest_normals
        verts, joints = body(poses, people.betas, clothes)

        # Perspective camera at `distance` from the body's origin, zoomed so that the person fills the crop.
        distance = views.distance[:, None]
        depth = verts[..., 2] + distance
        plane = verts[..., :2] / depth[..., None]
        low, high = plane.amin(1), plane.amax(1)
        zoom = views.fill * HEIGHT / (high - low)[:, 1]
        centre = torch.tensor([WIDTH / 2, HEIGHT / 2])
        origin = centre + views.shift * torch.tensor([WIDTH, HEIGHT]) - (low + high) / 2 * zoom[:, None]
        points = torch.cat([plane * zoom[:, None, None] + origin[:, None], depth[..., None]], -1)
        joints_px = joints[..., :2] / (joints[..., 2] + distance)[..., None] * zoom[:, None, None] + origin[:, None]
        scale = 2 * zoom / (HEIGHT * views.distance)
        truth_cam = torch.cat([scale[:, None], (origin - centre) * 2 / (HEIGHT * scale[:, None])], 1)

        face = rasterize(points, body.faces, HEIGHT, WIDTH).face
        mask = face >= 0
        who, row, column = mask.nonzero(as_tuple=True)
        corner = body.faces[face[mask]]
        weight = barycentric(points[who[:, None], corner], torch.stack([column, row], -1) + 0.5)[..., None]
        place = (self.tailor.fields[corner] * weight).sum(1)
        normals = vertex_normals(verts, body.faces)
        lambert = ((normals[who[:, None], corner] * weight).sum(1) * views.light[who]).sum(1).clamp(min=0)
        shade = views.ambient[who] + (1 - views.ambient[who]) * 1.2 * lambert
        image = backgrounds.clone()
        image[mask] = self.tailor.colours(place, people[who]) * shade[:, None]
        for k in range(views.occluder.shape[1]):
            image = _occlude(image, views.occluder[:, k])

        image = image.clamp(0, 1) * (views.exposure[:, None] * views.gain)[:, None, None]
        image = _blur(image, views.blur).clamp(0, 1) ** views.gamma[:, None, None, None]
        image = image + torch.randn(image.shape, generator=generator) * views.noise[:, None, None, None]
        truth = Truth(poses, people.betas, truth_cam, (joints_px - centre) * 2 / HEIGHT, mask)
        return (image.clamp(0, 1) * 255).round().to(torch.uint8), truth
