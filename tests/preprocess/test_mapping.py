"""Camera and RGB-to-vertex mapping, by hand and against a plain loop."""

import numpy as np
import pytest
import torch

from reid3d.preprocess.body import axis_angle_to_matrix, load_body, vertex_normals
from reid3d.preprocess.camera import project, unproject_pixels
from reid3d.preprocess.mapping import DEPTH_TOLERANCE, map_images
from reid3d.preprocess.zbuffer import rasterize

HEIGHT, WIDTH = 64, 32


@pytest.fixture
def scene() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two people facing the camera and turned, with images of random colours: images, verts, cam, faces."""
    body = load_body("low")
    rotmats = torch.eye(3).repeat(2, 24, 1, 1)
    rotmats[:, 0] = axis_angle_to_matrix(torch.tensor([[torch.pi, 0, 0], [2.6, 0, 1.2]]))
    rotmats[:, 16], rotmats[:, 17] = axis_angle_to_matrix(torch.tensor([[0, 0, -1.2], [0, 0, 1.2]]))
    verts = body(rotmats, torch.zeros(2, 10)).verts
    images = torch.randint(0, 256, (2, HEIGHT, WIDTH, 3), generator=torch.Generator().manual_seed(0)).byte()
    return images, verts, torch.tensor([[1.0, 0.0, 0.2], [0.95, 0.05, 0.2]]), body.faces


def test_projection_by_hand() -> None:
    # s (X + tx) = 0.5 of half a height of 100 pixels: 25 pixels right of the centre of a 40-pixel row.
    point = project(torch.tensor([[[0.4, -0.2, 7.0]]]), torch.tensor([[1.0, 0.1, 0.2]]), 100, 40)
    torch.testing.assert_close(point, torch.tensor([[[45.0, 50.0, 7.0]]]))


def test_unprojection_inverts_projection() -> None:
    cam = torch.tensor([[0.9, 0.1, -0.05], [1.1, -0.2, 0.0]])
    points = unproject_pixels(cam, torch.tensor([0.3, -0.1]), 6, 4)
    back = project(points, cam, 6, 4)
    torch.testing.assert_close(
        back[0, :5, :2], torch.tensor([[0.5, 0.5], [1.5, 0.5], [2.5, 0.5], [3.5, 0.5], [0.5, 1.5]])
    )
    assert torch.equal(back[:, 0, 2], torch.tensor([0.3, -0.1]))


def test_mapping_matches_a_loop_over_vertices(scene) -> None:
    images, verts, cam, faces = scene
    normals = vertex_normals(verts, faces)
    points = project(verts, cam, HEIGHT, WIDTH)
    depth = rasterize(points, faces, HEIGHT, WIDTH).depth
    for b, cloud in enumerate(map_images(images, verts, cam, faces)):
        owner: dict[tuple[int, int], int] = {}
        for v in range(verts.shape[1]):
            j, i = points[b, v, :2].floor().int().tolist()
            if not (0 <= i < HEIGHT and 0 <= j < WIDTH) or normals[b, v, 2] >= 0:
                continue
            if torch.isinf(depth[b, i, j]) or verts[b, v, 2] > depth[b, i, j] + DEPTH_TOLERANCE:
                continue
            if (i, j) not in owner or verts[b, v, 2] < verts[b, owner[i, j], 2]:
                owner[i, j] = v
        assert cloud.vertex[cloud.vertex >= 0].tolist() == sorted(owner.values())
        place = {v: ij for ij, v in owner.items()}
        for k, v in enumerate(cloud.vertex[: len(owner)].tolist()):
            assert cloud.rgb[k].tolist() == images[b][place[v]].tolist()
            np.testing.assert_array_equal(cloud.xyz[k], verts[b, v].numpy())
        assert 100 < len(owner) < 1000


def test_every_pixel_gives_one_point_and_can_be_found_again(scene) -> None:
    images, verts, cam, faces = scene
    for b, cloud in enumerate(map_images(images, verts, cam, faces)):
        assert len(cloud) == HEIGHT * WIDTH
        pixel = project(torch.from_numpy(cloud.xyz)[None], cam[b : b + 1], HEIGHT, WIDTH)[0, :, :2].floor().long()
        rebuilt = torch.zeros_like(images[b])
        rebuilt[pixel[:, 1], pixel[:, 0]] = torch.from_numpy(cloud.rgb)
        assert torch.equal(rebuilt, images[b])


def test_background_is_a_plane_at_the_mean_depth_in_row_order(scene) -> None:
    images, verts, cam, faces = scene
    for b, cloud in enumerate(map_images(images, verts, cam, faces)):
        back = cloud.xyz[cloud.vertex < 0]
        np.testing.assert_allclose(back[:, 2], float(verts[b, :, 2].mean()), rtol=1e-6)
        order = np.lexsort((back[:, 0], np.round(back[:, 1], 5)))
        assert (order == np.arange(len(back))).all()
        assert (np.diff(cloud.vertex[cloud.vertex >= 0]) > 0).all()  # the body first, in vertex order


def test_painted_vertices_are_the_near_side(scene) -> None:
    images, verts, cam, faces = scene
    cloud = map_images(images, verts, cam, faces)[0]  # facing the camera: its front is towards -z
    body = cloud.xyz[cloud.vertex >= 0]
    assert body[:, 2].mean() < float(verts[0, :, 2].mean()) - 0.03


def test_a_body_outside_the_crop_gives_background_only(scene) -> None:
    images, verts, cam, faces = scene
    clouds = map_images(images, verts, cam + torch.tensor([0.0, 10, 0]), faces)
    assert all((c.vertex == -1).all() and len(c) == HEIGHT * WIDTH for c in clouds)


def test_errors(scene) -> None:
    images, verts, cam, faces = scene
    with pytest.raises(TypeError, match="images must be uint8, got torch.float32"):
        map_images(images.float(), verts, cam, faces)
    with pytest.raises(ValueError, match=r"images must be \(B, H, W, 3\), got \(2, 3, 64, 32\)"):
        map_images(images.permute(0, 3, 1, 2), verts, cam, faces)
