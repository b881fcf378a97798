"""Camera and RGB-to-vertex mapping, by hand, against plain loops, and against rays."""

import math

import numpy as np
import pytest
import torch

from reid3d.cloud import PointCloud
from reid3d.ops import rasterize
from reid3d.preprocess.body import axis_angle_to_matrix, load_body, vertex_normals
from reid3d.preprocess.camera import cut_window, project, unproject
from reid3d.preprocess.mapping import DEPTH_TOLERANCE, MODES, background, map_crops, visible_vertices
from reid3d.preprocess.synth.people import WALK, sample_people, sample_poses

HEIGHT, WIDTH = 64, 32
Scene = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def people(count: int, lod: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The bodies of synthetic people as cameras see them, from all sides: verts, cam, faces."""
    rng = np.random.default_rng(seed)
    body, walkers = load_body(lod), sample_people(count, rng)
    walk = sample_poses(walkers, rng.uniform(0, 2 * torch.pi, count), np.full(count, WALK), rng)
    rotmats, betas = torch.from_numpy(walk).float(), torch.from_numpy(walkers.betas).float()
    yaw = torch.arange(count) * 2 * torch.pi / count + 0.3
    turn = axis_angle_to_matrix(torch.stack([0 * yaw, yaw, 0 * yaw], 1))
    rotmats[:, 0] = axis_angle_to_matrix(torch.tensor([torch.pi, 0, 0])) @ turn @ rotmats[:, 0]
    verts = body(rotmats, betas).verts
    low, high = verts.amin(1), verts.amax(1)
    cam = torch.cat([1.84 / (high - low)[:, 1:2], -(low + high)[:, :2] / 2], 1)
    return verts, cam, body.faces


@pytest.fixture
def scene() -> Scene:
    """Two people with images of random colours: images, verts, cam, faces."""
    verts, cam, faces = people(2, "low")
    images = torch.randint(0, 256, (2, HEIGHT, WIDTH, 3), generator=torch.Generator().manual_seed(0)).byte()
    return images, verts, cam, faces


# The camera


def test_projection_by_hand() -> None:
    # s (X + tx) = 0.5 of half a height of 100 pixels: 25 pixels right of the centre of a 40-pixel row.
    point, cam = torch.tensor([[[0.4, -0.2, 7.0]]]), torch.tensor([[1.0, 0.1, 0.2]])
    torch.testing.assert_close(project(point, cam, 100, 40), torch.tensor([[[45.0, 50.0, 7.0]]]))
    # A crop twice as high as wide, squeezed to a row of 40: half a height is 50 of its 50 columns, now 40 of 40.
    torch.testing.assert_close(
        project(point, cam, 100, 40, torch.tensor([0.5])), torch.tensor([[[20 + 0.5 * 40, 50.0, 7.0]]])
    )


def test_unprojection_inverts_projection() -> None:
    cam, aspect = torch.tensor([[0.9, 0.1, -0.05], [1.1, -0.2, 0.0]]), torch.tensor([0.5, 0.7])
    pixels = torch.tensor([[x, y, z] for y in (0.5, 1.5, 6) for x in (0, 0.5, 4) for z in (-1, 0.3)]).expand(2, -1, -1)
    for stretch in (None, aspect):
        points = unproject(pixels, cam, 6, 4, stretch)
        torch.testing.assert_close(project(points, cam, 6, 4, stretch), pixels)


def test_the_background_lies_behind_the_pixel_centres() -> None:
    cam, depth = torch.tensor([[0.9, 0.1, -0.05], [1.1, -0.2, 0.0]]), torch.tensor([0.3, -0.2])
    for aspect in (None, torch.tensor([0.5, 0.7])):
        points = background(cam, depth, 6, 4, aspect)
        assert points.shape == (2, 6, 4, 3)
        pixels = project(points.flatten(1, 2), cam, 6, 4, aspect)
        centres = torch.tensor([[x + 0.5, y + 0.5] for y in range(6) for x in range(4)])
        torch.testing.assert_close(pixels[..., :2], centres.expand(2, -1, -1))
        assert torch.equal(pixels[..., 2], depth[:, None].expand(2, 24))


def test_one_camera_serves_every_resolution() -> None:
    verts, cam, _ = people(2, "low")
    aspect = torch.tensor([0.5, 0.4])
    base = project(verts, cam, 128, 64, aspect)[..., :2] / torch.tensor([64.0, 128])
    for height, width in ((256, 128), (384, 128), (96, 96)):
        pixels = project(verts, cam, height, width, aspect)[..., :2]
        torch.testing.assert_close(pixels / torch.tensor([float(width), height]), base)


@pytest.mark.parametrize(("shape", "tall"), [((128, 64), 1.0), ((160, 64), 1.0), ((128, 96), 1.5), ((33, 17), 1.2)])
@pytest.mark.parametrize("border", ["edge", "black"])
def test_a_window_shows_the_crop_where_the_camera_says(shape: tuple[int, int], tall: float, border: str) -> None:
    height, width = shape
    crop = np.zeros((height, width, 3), np.uint8)
    row, column = height // 3, width // 2 - 3
    crop[row - 2 : row + 3, column - 2 : column + 3] = 255
    window = cut_window(crop, (128, 64), tall, border)
    assert window.shape == (128, 64, 3) and window.dtype == np.uint8
    weight = window[..., 0].astype(float)
    y, x = ((weight * grid).sum() / weight.sum() + 0.5 for grid in np.mgrid[:128, :64])
    # from the centre, in half heights of the window, which is `tall` crops high
    assert (y - 64) / 64 * tall == pytest.approx((row + 0.5 - height / 2) / (height / 2), abs=0.01)
    assert (x - 32) / 64 * tall == pytest.approx((column + 0.5 - width / 2) / (height / 2), abs=0.01)


def test_what_a_window_shows_beyond_the_crop() -> None:
    crop = np.full((64, 32, 3), 200, np.uint8)
    assert (cut_window(crop, (128, 64), 2.0) == 200).all()
    black = cut_window(crop, (128, 64), 2.0, "black")
    assert (black[:30] == 0).all() and (black[34:94, 18:46] == 200).all() and (black[:, :14] == 0).all()
    assert np.array_equal(cut_window(crop, (64, 32), 1.0), crop)


# The modes


def test_paper_mode_matches_a_loop_over_vertices(scene: Scene) -> None:
    images, verts, cam, faces = scene
    normals = vertex_normals(verts, faces)
    points = project(verts, cam, HEIGHT, WIDTH)
    depth = rasterize(points, faces, HEIGHT, WIDTH).depth
    tolerance = DEPTH_TOLERANCE * 2 / HEIGHT / cam[:, 0]
    for b, cloud in enumerate(map_crops(images, verts, cam, faces)):
        owner: dict[tuple[int, int], int] = {}
        for v in range(verts.shape[1]):
            j, i = points[b, v, :2].floor().int().tolist()
            if not (0 <= i < HEIGHT and 0 <= j < WIDTH) or normals[b, v, 2] >= 0:
                continue
            if torch.isinf(depth[b, i, j]) or verts[b, v, 2] > depth[b, i, j] + tolerance[b]:
                continue
            if (i, j) not in owner or verts[b, v, 2] < verts[b, owner[i, j], 2]:
                owner[i, j] = v
        assert cloud.vertex[cloud.vertex >= 0].tolist() == sorted(owner.values())
        place = {v: ij for ij, v in owner.items()}
        for k, v in enumerate(cloud.vertex[: len(owner)].tolist()):
            assert cloud.rgb[k].tolist() == images[b][place[v]].tolist()
            np.testing.assert_array_equal(cloud.xyz[k], verts[b, v].numpy())
        assert 100 < len(owner) < 1000


def pixel_of(cloud: PointCloud, cam: torch.Tensor, size: tuple[int, int], aspect: torch.Tensor | None) -> torch.Tensor:
    return project(torch.from_numpy(cloud.xyz)[None], cam[None], *size, aspect)[0, :, :2].floor().long()


@pytest.mark.parametrize("mode", ["paper", "surface"])
@pytest.mark.parametrize("stretched", [False, True])
def test_every_pixel_gives_one_point_and_can_be_found_again(scene: Scene, mode, stretched: bool) -> None:
    images, verts, cam, faces = scene
    aspect = torch.tensor([0.6, 0.6]) if stretched else None
    for b, cloud in enumerate(map_crops(images, verts, cam, faces, mode, aspect)):
        assert len(cloud) == HEIGHT * WIDTH
        pixel = pixel_of(cloud, cam[b], (HEIGHT, WIDTH), None if aspect is None else aspect[b : b + 1])
        rebuilt = torch.zeros_like(images[b])
        rebuilt[pixel[:, 1], pixel[:, 0]] = torch.from_numpy(cloud.rgb)
        assert torch.equal(rebuilt, images[b])


def test_dense_mode_colours_every_seen_vertex(scene: Scene) -> None:
    images, verts, cam, faces = scene
    points = project(verts, cam, HEIGHT, WIDTH)
    seen = rasterize(points, faces, HEIGHT, WIDTH)
    column, row = points[..., 0].floor().long(), points[..., 1].floor().long()  # all are inside
    visible = visible_vertices(row * WIDTH + column, verts, seen, faces, DEPTH_TOLERANCE * 2 / HEIGHT / cam[:, 0])
    paper = map_crops(images, verts, cam, faces)
    for b, cloud in enumerate(map_crops(images, verts, cam, faces, "dense")):
        body = cloud.vertex >= 0
        assert np.array_equal(cloud.vertex[body], visible[b].nonzero()[:, 0].numpy())
        assert set(paper[b].vertex) <= set(cloud.vertex)
        assert np.array_equal(cloud.xyz[body], verts[b, visible[b]].numpy())
        pixel = pixel_of(cloud, cam[b], (HEIGHT, WIDTH), None)
        assert np.array_equal(cloud.rgb, images[b][pixel[:, 1], pixel[:, 0]].numpy())
        assert (~body).sum() == (seen.face[b] < 0).sum()


def test_surface_points_lie_on_their_faces(scene: Scene) -> None:
    images, verts, cam, faces = scene
    seen = rasterize(project(verts, cam, HEIGHT, WIDTH), faces, HEIGHT, WIDTH)
    for b, cloud in enumerate(map_crops(images, verts, cam, faces, "surface")):
        body = cloud.vertex >= 0
        face = seen.face[b][seen.face[b] >= 0]
        assert body.sum() == len(face) > 200
        corners = verts[b, faces[face]].double()  # (P,3,3)
        point = torch.from_numpy(cloud.xyz[body]).double()
        normal = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        height = ((point - corners[:, 0]) * torch.nn.functional.normalize(normal, dim=1)).sum(1)
        assert height.abs().max() < 1e-5
        vertex = torch.from_numpy(cloud.vertex[body]).long()
        assert (faces[face] == vertex[:, None]).any(1).all()
        assert (point - verts[b, vertex]).norm(dim=1).max() < 0.1  # it is a corner, and faces are small


def test_surface_mode_has_no_holes_at_high_resolution() -> None:
    verts, cam, faces = people(1, "full")
    for size in ((256, 128), (384, 128)):
        images = torch.zeros(1, *size, 3, dtype=torch.uint8)
        aspect = torch.tensor([0.5])
        share = {
            mode: (map_crops(images, verts, cam, faces, mode, aspect)[0].vertex >= 0).sum()
            for mode in ("paper", "surface")
        }
        silhouette = (rasterize(project(verts, cam, *size, aspect), faces, *size).face >= 0).sum()
        assert share["surface"] == silhouette and share["paper"] < 0.5 * silhouette


@pytest.mark.parametrize("mode", MODES)
def test_the_body_first_then_the_background_row_by_row_at_mean_depth(scene: Scene, mode) -> None:
    images, verts, cam, faces = scene
    for b, cloud in enumerate(map_crops(images, verts, cam, faces, mode)):
        body = cloud.vertex >= 0
        assert 100 < body.sum() and (np.diff(body.astype(int)) <= 0).all()
        if mode != "surface":
            assert (np.diff(cloud.vertex[body]) > 0).all()
        back = cloud.xyz[~body]
        np.testing.assert_allclose(back[:, 2], float(verts[b, :, 2].mean()), rtol=1e-5)
        assert (np.lexsort((back[:, 0], np.round(back[:, 1], 5))) == np.arange(len(back))).all()


@pytest.mark.parametrize("mode", ["paper", "dense", "surface"])
def test_a_body_outside_the_crop_gives_background_only(scene: Scene, mode) -> None:
    images, verts, cam, faces = scene
    clouds = map_crops(images, verts, cam + torch.tensor([0.0, 10, 0]), faces, mode)
    assert all((c.vertex == -1).all() and len(c) == HEIGHT * WIDTH for c in clouds)


@pytest.mark.parametrize("mode", MODES)
def test_a_crop_does_not_depend_on_the_others(scene: Scene, mode) -> None:
    images, verts, cam, faces = scene
    both = map_crops(images, verts, cam, faces, mode)
    for b in range(2):
        alone = map_crops(images[b : b + 1], verts[b : b + 1], cam[b : b + 1], faces, mode)[0]
        for name in ("xyz", "rgb", "vertex"):
            assert np.array_equal(getattr(alone, name), getattr(both[b], name))
    assert map_crops(images[:0], verts[:0], cam[:0], faces, mode) == []


# The published converter


def python2_round(x: float) -> int:
    return int(math.copysign(math.floor(abs(x) + 0.5), x)) if abs(x) < 2**40 else int(x)


def published(image: np.ndarray, verts: np.ndarray, cam: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """What the published converter writes, one vertex and one pixel at a time: points, colours 0..255, vertices."""
    height, width = image.shape[:2]
    side = max(height, width)
    flat = (verts[:, :2] + cam[1:]) * cam[0]
    value, index = np.full((height, width), 99999.0), np.full((height, width), 99999)
    place = []
    for v in range(len(verts)):
        i = python2_round((float(flat[v, 1]) + 1) * 0.5 * side)
        j = python2_round((float(flat[v, 0]) + 1) * 0.5 * side)
        if height < width:
            i = python2_round(i - width / 2 + height / 2)
        else:
            j = python2_round(j - height / 2 + width / 2)
        i, j = max(0, min(i, height - 1)), max(0, min(j, width - 1))
        place.append((i, j))
        if float(verts[v, 2]) < value[i, j]:
            value[i, j], index[i, j] = verts[v, 2], v
    for _ in range(10):
        for i in range(1, height - 1):
            for j in range(1, width - 1):
                for a, b in ((i - 1, j), (i, j - 1)):
                    if index[a, b] != 999999 and value[a, b] > value[i, j] + 0.05:
                        value[a, b], index[a, b] = 999999, 999999
    points, colours, vertices = [], [], []
    for v, (i, j) in enumerate(place):
        if index[i, j] == v:
            points.append(verts[v].tolist())
            colours.append(image[i, j])
            vertices.append(v)
    for i in range(height):
        for j in range(width):
            if index[i, j] < 99999:
                continue
            y, x = (i + width / 2 - height / 2, j) if height < width else (i, j + height / 2 - width / 2)
            x, y = ((c / side * 2 - 1) / float(cam[0]) for c in (x, y))
            z = np.mean(verts[:, 2])
            points.append([np.float32(x) - cam[1], np.float32(y) - cam[2], z])
            colours.append(image[i, j])
            vertices.append(-1)
    return np.array(points, np.float32), np.array(colours, np.uint8), vertices


@pytest.mark.parametrize(("height", "width"), [(128, 64), (96, 96), (48, 90)])
def test_official_mode_is_the_published_converter_bit_for_bit(height: int, width: int) -> None:
    verts, cam, faces = people(3, "full", seed=height)
    cam[1] = torch.tensor([1.0, 0.25, 0.25])  # leaves the crop; and half pixels, which Python 2 rounds away from zero
    verts[1] = (verts[1] * side).round() / side if (side := max(height, width)) else verts[1]
    verts[2, 100:200, 2] = verts[2, 100, 2]  # equal depths
    cam[2, 0] *= 1.6
    images = torch.randint(0, 256, (3, height, width, 3), generator=torch.Generator().manual_seed(1)).byte()
    for b, cloud in enumerate(map_crops(images, verts, cam, faces, "official")):
        points, colours, vertices = published(images[b].numpy(), verts[b].numpy(), cam[b].numpy())
        assert cloud.vertex.tolist() == vertices
        assert np.array_equal(cloud.xyz.view(np.int32), points.view(np.int32))
        assert np.array_equal(cloud.rgb, colours)
        assert len(cloud) == height * width


# How often a vertex takes the colour of another surface


def hidden(verts: torch.Tensor, faces: torch.Tensor) -> torch.Tensor:
    """Whether something stands between a vertex and the camera: rays in float64, up to 1 mm before the vertex."""
    a, b, c = verts.double()[faces].unbind(1)

    def area(o: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - o)[..., 0] * (b - o)[..., 1] - (b - o)[..., 0] * (a - o)[..., 1]

    front = area(a, b, c) < 0  # the body is closed: what hides a vertex shows its front
    a, b, c = a[front], b[front], c[front]
    result = []
    for p in verts.double()[:, None].split(64):
        weights = torch.stack([area(p, b, c), area(p, c, a), area(p, a, b)]) / area(a, b, c)
        depth = (weights * torch.stack([a, b, c])[:, None, :, 2]).sum(0)
        result.append(((weights >= 0).all(0) & (depth < p[..., 2] - 0.001)).any(1))
    return torch.cat(result)


def test_paper_mode_colours_hardly_any_hidden_vertex(capsys: pytest.CaptureFixture[str]) -> None:
    verts, cam, faces = people(4, "full")
    behind = [hidden(v, faces) for v in verts]
    assert 0.5 < float(torch.stack(behind).float().mean()) < 0.65
    wrong = {}
    for size in ((128, 64), (256, 128), (384, 128)):
        images, aspect = torch.zeros(len(verts), *size, 3, dtype=torch.uint8), torch.full((len(verts),), 0.5)
        for mode in ("paper", "dense", "official"):
            clouds = map_crops(images, verts, cam, faces, mode, aspect)
            bad = [hides[cloud.vertex[cloud.vertex >= 0]] for hides, cloud in zip(behind, clouds, strict=True)]
            wrong[mode, size] = float(torch.cat(bad).float().mean())
    with capsys.disabled():
        print(f"\ncoloured vertices that something hides, {len(verts)} bodies of {verts.shape[1]} vertices")
        for (mode, size), share in wrong.items():
            print(f"  {mode:<9}{size[0]} x {size[1]:<5}{share:8.2%}")
    for size in ((128, 64), (256, 128)):
        assert wrong["paper", size] <= 0.005
        assert wrong["dense", size] <= 0.02
    assert wrong["official", (128, 64)] > 0.005 and wrong["official", (256, 128)] > 0.1  # the published rule


def test_errors(scene: Scene) -> None:
    images, verts, cam, faces = scene
    with pytest.raises(TypeError, match="images must be uint8, got torch.float32"):
        map_crops(images.float(), verts, cam, faces)
    with pytest.raises(ValueError, match=r"images must be \(B, H, W, 3\), got \(2, 3, 64, 32\)"):
        map_crops(images.permute(0, 3, 1, 2), verts, cam, faces)
    with pytest.raises(ValueError, match="mode must be one of paper, dense, surface, official, got 'best'"):
        map_crops(images, verts, cam, faces, "best")
