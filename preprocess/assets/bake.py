"""Bake the embedded body: an SMPL-format parametric human made from Anny. Developers only, run once.

    pip install -r preprocess/assets/bake-requirements.txt
    python preprocess/assets/bake.py --out preprocess/assets        # about 5 minutes on 2 cores, 2 GB of memory

Anny (Apache-2.0 code, CC0 MakeHuman shapes) is a fine source and a heavy dependency (hundreds of MB and a 90-second
start), so we sample it here and keep what the toolkit needs: 24 joints in SMPL's order, a T-pose rest mesh, 10 shape
directions of unit variance, blend weights with four influences and a sparse joint regressor, at two levels of detail.

The steps: (1) 1,200 random adults and children in Anny's A-pose; (2) axes to y up, facing +z, left = +x, and statures
rescaled to those of a human population; (3) Anny's 104 bones merged into SMPL's 24; (4) each body un-posed to a T-pose
by inverse skinning; (5) eyes, tongue and mouth cavity dropped (faces that no outside ray reaches); (6) uniform
remeshing; (7) a 10-component PCA of the shapes; (8) joint regressors by non-negative least squares.
"""

import argparse
from pathlib import Path

import numpy as np

SEED = 0
BODIES = 1200
LODS = {"body_full.npz": 6890, "body_low.npz": 1800}  # vertices asked of the remesher, which gives a few less
PARENTS = np.array([-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21])
# Anny bones (names without side) whose head is SMPL's joint; sided ones are left, right.
CENTRE_HEADS = {0: "root", 3: "spine03", 6: "spine02", 9: "spine01", 12: "neck01", 15: "head"}
SIDED_HEADS = {
    1: "upperleg01",
    4: "lowerleg01",
    7: "foot",
    13: "clavicle",
    16: "upperarm01",
    18: "lowerarm01",
    20: "wrist",
}
# Prefix of a bone's name -> SMPL joint (the left one of a pair); the first match wins.
BONE_TO_JOINT = (
    ("upperleg", 1), ("lowerleg", 4), ("foot", 7), ("toe", 10), ("clavicle", 13), ("shoulder01", 13), ("upperarm", 16),
    ("lowerarm", 18), ("wrist", 20), ("metacarpal", 20), ("finger1-1", 20), ("finger", 22), ("spine03", 3),
    ("spine02", 6), ("spine01", 9), ("neck", 12), ("head", 15), ("eye", 15), ("root", 0), ("pelvis", 0), ("spine0", 0),
)  # fmt: skip


def sample_anny(count: int) -> dict[str, np.ndarray]:
    """Random bodies: vertices (S,V,3) and bone heads (S,bones,3) in Anny's axes, faces, bone names, skinning."""
    import anny
    import torch

    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    model = anny.Anny(phenotypes="all").to(torch.float32)
    female = rng.random(count) < 0.5
    strong = rng.beta(1, 12, count)  # most people are near an end of the gender axis
    child = rng.random(count) < 0.06
    race = rng.dirichlet([0.7] * 3, count)
    phenotypes = {
        "gender": np.where(female, 1 - strong, strong),
        "age": np.where(child, rng.uniform(0.34, 0.6, count), rng.uniform(0.62, 0.95, count)),
        "muscle": rng.beta(3, 3, count),
        "weight": rng.beta(2.5, 3, count),
        "height": rng.beta(3.5, 3.5, count),
        "proportions": rng.uniform(0.2, 1, count),
        "cupsize": rng.beta(2, 2, count),
        "firmness": rng.beta(2, 2, count),
        "african": race[:, 0],
        "asian": race[:, 1],
        "caucasian": race[:, 2],
    }
    known = {k: torch.tensor(v, dtype=torch.float32) for k, v in phenotypes.items() if k in model.phenotype_labels}
    verts, heads = [], []
    with torch.no_grad():
        for first in range(0, count, 32):
            part = {k: v[first : first + 32] for k, v in known.items()}
            size = min(32, count - first)
            rest = torch.eye(4).expand(size, model.bone_count, 4, 4).contiguous()
            out = model(pose_parameters=rest, phenotype_kwargs=part)
            verts.append(out["vertices"].numpy())
            heads.append(out["bone_poses"][:, :, :3, 3].numpy())
    return {
        "verts": np.concatenate(verts).astype(np.float32),
        "heads": np.concatenate(heads).astype(np.float32),
        "faces": model.faces.numpy(),
        "bones": np.array(model.bone_labels),
        "weights_idx": model.vertex_bone_indices.numpy(),
        "weights_val": model.vertex_bone_weights.numpy(),
    }


def joint_of(bone: str) -> int:
    """SMPL joint that an Anny bone belongs to."""
    name, _, side = bone.partition(".")
    joint = next(j for prefix, j in BONE_TO_JOINT if name.startswith(prefix))
    return joint + (side == "R")


def joint_heads(bones: list[str], heads: np.ndarray) -> np.ndarray:
    """SMPL's 24 joints (S,24,3) from Anny's bone heads (S,bones,3)."""
    at = {b: heads[:, i] for i, b in enumerate(bones)}
    joints = np.zeros((len(heads), 24, 3), np.float32)
    for j, bone in CENTRE_HEADS.items():
        joints[:, j] = at[bone]
    for i, side in enumerate("LR"):
        for j, bone in SIDED_HEADS.items():
            joints[:, j + i] = at[f"{bone}.{side}"]
        joints[:, 10 + i] = np.mean([at[f"toe{k}-1.{side}"] for k in range(1, 6)], 0)
        joints[:, 22 + i] = np.mean([at[f"finger{k}-1.{side}"] for k in (2, 3, 4, 5)], 0)
    return joints


def rotation_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Smallest rotations (S,3,3) taking the directions a (S,3) to b (3,)."""
    a = a / np.linalg.norm(a, axis=-1, keepdims=True)
    b = np.broadcast_to(b / np.linalg.norm(b), a.shape)
    v, c = np.cross(a, b), (a * b).sum(-1)[:, None, None]
    k = np.zeros((len(a), 3, 3))
    k[:, 0, 1], k[:, 0, 2], k[:, 1, 2] = -v[:, 2], v[:, 1], -v[:, 0]
    k -= k.transpose(0, 2, 1)
    return np.eye(3) + k + k @ k / (1 + c)


def to_t_pose(verts: np.ndarray, joints: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Un-pose A-pose bodies by linear blend skinning with world rotations that lay each limb on SMPL's T-pose."""
    count = len(verts)
    rot = np.tile(np.eye(3), (count, 24, 1, 1))

    def lay(joint: int, child: int, parent_rot: np.ndarray, direction: tuple[float, float, float]) -> np.ndarray:
        bone = np.einsum("sij,sj->si", parent_rot, joints[:, child] - joints[:, joint])
        return rotation_between(bone, np.array(direction)) @ parent_rot  # keeps the parent's twist

    for i, side in ((0, 1.0), (1, -1.0)):
        shoulder, elbow, wrist, hand = 16 + i, 18 + i, 20 + i, 22 + i
        rot[:, shoulder] = lay(shoulder, elbow, np.tile(np.eye(3), (count, 1, 1)), (side, -0.05, -0.07))
        rot[:, elbow] = lay(elbow, wrist, rot[:, shoulder], (side, 0.02, 0.0))
        rot[:, wrist] = rot[:, hand] = lay(wrist, hand, rot[:, elbow], (side, -0.08, -0.05))
        hip, knee, ankle = 1 + i, 4 + i, 7 + i
        rot[:, hip] = lay(hip, knee, np.tile(np.eye(3), (count, 1, 1)), (0.05 * side, -1.0, 0.0))
        rot[:, knee] = lay(knee, ankle, rot[:, hip], (0.0, -1.0, -0.07))  # the feet keep their own orientation

    posed = joints.copy()
    for j in range(1, 24):
        posed[:, j] = posed[:, PARENTS[j]] + np.einsum(
            "sij,sj->si", rot[:, PARENTS[j]], joints[:, j] - joints[:, PARENTS[j]]
        )
    shift = posed - np.einsum("sjab,sjb->sja", rot, joints)
    out = np.empty_like(verts)
    for s in range(count):
        blend = np.einsum("vj,jab->vab", weights, rot[s].astype(np.float32))
        out[s] = np.einsum("vab,vb->va", blend, verts[s]) + weights @ shift[s].astype(np.float32)
    pelvis = posed[:, :1]
    return out - pelvis, posed - pelvis  # the origin is the pelvis


def outer_faces(verts: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Faces of the skin: the largest component, less the ones that rays from outside cannot reach (mouth cavity)."""
    import open3d as o3d
    import trimesh

    mesh = trimesh.Trimesh(verts, faces, process=False)
    skin = max(trimesh.graph.connected_components(mesh.face_adjacency), key=len)
    scene = o3d.t.geometry.RaycastingScene()
    scene.add_triangles(o3d.core.Tensor(verts.astype(np.float32)), o3d.core.Tensor(faces.astype(np.uint32)))
    rng = np.random.default_rng(SEED)
    escapes = np.zeros(len(faces), int)
    for _ in range(48):
        ray = rng.normal(size=(len(faces), 3))
        ray *= np.sign((ray * mesh.face_normals).sum(1, keepdims=True)) / np.linalg.norm(ray, axis=1, keepdims=True)
        start = mesh.triangles_center + 1e-4 * mesh.face_normals
        hits = scene.cast_rays(o3d.core.Tensor(np.concatenate([start, ray], 1).astype(np.float32)))["t_hit"].numpy()
        escapes += np.isinf(hits)
    keep = np.zeros(len(faces), bool)
    keep[skin] = True
    faces = faces[keep & (escapes >= 2)]
    rest = trimesh.Trimesh(verts, faces, process=False)
    return faces[max(trimesh.graph.connected_components(rest.face_adjacency), key=len)]


def remesh(verts: np.ndarray, faces: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Uniform mesh of about `count` vertices: its vertices, faces, and for each vertex a triangle of the old mesh (V,3
    old vertex indices) with barycentric weights (V,3), by which any per-vertex quantity is carried over."""
    import open3d as o3d
    import pyacvd
    import pyvista

    used, compact = np.unique(faces, return_inverse=True)
    compact = compact.reshape(faces.shape)
    poly = pyvista.PolyData(
        verts[used].astype(np.float64), np.concatenate([np.full((len(faces), 1), 3), compact], 1).ravel()
    ).fill_holes(0.1)  # eye sockets and lips, so that no camera looks into the head
    clustering = pyacvd.Clustering(poly)
    clustering.subdivide(2 if count > 3000 else 1)
    clustering.cluster(count)
    mesh = clustering.create_mesh()
    new, new_faces = np.asarray(mesh.points), np.asarray(mesh.faces).reshape(-1, 4)[:, 1:]
    tri = new[new_faces]
    if np.einsum("fi,fi->f", tri[:, 0], np.cross(tri[:, 1], tri[:, 2])).sum() < 0:  # signed volume: outward normals
        new_faces = new_faces[:, ::-1]
    scene = o3d.t.geometry.RaycastingScene()
    scene.add_triangles(o3d.core.Tensor(verts[used].astype(np.float32)), o3d.core.Tensor(compact.astype(np.uint32)))
    near = scene.compute_closest_points(o3d.core.Tensor(new.astype(np.float32)))
    uv = near["primitive_uvs"].numpy()
    return new, new_faces, faces[near["primitive_ids"].numpy().astype(int)], np.c_[1 - uv.sum(1), uv]


def sparse_regressor(target: np.ndarray, target_dirs: np.ndarray, verts: np.ndarray, dirs: np.ndarray) -> np.ndarray:
    """Weights (V,) >= 0, summing to 1, that give a point (3,) and its 10 shape directions (10,3) from near vertices."""
    from scipy.optimize import nnls

    near = np.argsort(np.linalg.norm(verts - target, axis=1))[: min(600, len(verts) // 3)]
    lhs = np.concatenate([verts[near].T, dirs[near].reshape(len(near), -1).T, np.ones((1, len(near)))])
    rhs = np.concatenate([target, target_dirs.T.ravel(), [1.0]])
    solution, _ = nnls(lhs, rhs, maxiter=20 * len(near))
    out = np.zeros(len(verts))
    out[near] = solution / solution.sum()
    return out


def golden(asset: Path, out: Path) -> None:
    """Pose the baked body with smplx.SMPL, the reference implementation, for tests of our own skinning layer."""
    import smplx
    import torch
    from smplx.utils import Struct

    data = np.load(asset)
    count = len(data["v_template"])
    weights, regressor = np.zeros((count, 24)), np.zeros((24, count))
    np.put_along_axis(weights, data["weights_joint"].astype(int), data["weights_value"].astype(float), 1)
    regressor[data["regressor_joint"], data["regressor_vertex"]] = data["regressor_value"]
    model = smplx.SMPL(
        "",
        data_struct=Struct(
            v_template=data["v_template"],
            shapedirs=data["shapedirs"].astype(float),
            posedirs=np.zeros((count, 3, 207)),
            J_regressor=regressor,
            weights=weights / weights.sum(1, keepdims=True),
            kintree_table=np.stack([np.r_[2**32 - 1, PARENTS[1:]], np.arange(24)]),
            f=data["f"],
        ),
    )
    rng = np.random.default_rng(SEED)
    pose = rng.normal(0, 0.5, (4, 24, 3)).astype(np.float32)
    betas = rng.normal(0, 1, (4, 10)).astype(np.float32)
    with torch.no_grad():
        posed = model(
            betas=torch.from_numpy(betas),
            global_orient=torch.from_numpy(pose[:, 0]),
            body_pose=torch.from_numpy(pose[:, 1:].reshape(4, -1)),
        )
    step = 7  # every seventh vertex is enough
    np.savez_compressed(
        out,
        pose=pose,
        betas=betas,
        step=step,
        verts=posed.vertices[:, ::step].numpy(),
        joints=posed.joints[:, :24].numpy(),
    )
    print(f"{out}: smplx.SMPL posed 4 bodies")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for " + ", ".join(LODS))
    parser.add_argument("--samples", type=Path, help="keep Anny's samples in this .npz and use them again")
    parser.add_argument("--golden", type=Path, help="bake nothing: write here what smplx.SMPL makes of body_full.npz")
    args = parser.parse_args()
    if args.golden:
        return golden(args.out / "body_full.npz", args.golden)
    if args.samples and args.samples.exists():
        anny_bodies = dict(np.load(args.samples))
    else:
        anny_bodies = sample_anny(BODIES)
        if args.samples:
            np.savez(args.samples, **anny_bodies)  # type: ignore[arg-type]

    axes = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], np.float32)  # z up, facing -y  ->  y up, facing +z
    verts, heads = anny_bodies["verts"] @ axes.T, anny_bodies["heads"] @ axes.T
    bones = [str(b) for b in anny_bodies["bones"]]
    stature = np.ptp(verts[:, :, 1], axis=1)
    rng = np.random.default_rng(SEED + 1)
    adult = np.clip(rng.normal(1.69, 0.095, len(stature)), 1.45, 1.98)  # metres; Anny's mid-range is too tall
    scale = (np.where(stature < 1.5, stature, adult) / stature)[:, None, None].astype(np.float32)
    verts, heads = verts * scale, heads * scale

    weights = np.zeros((verts.shape[1], 24), np.float32)
    joint = np.array([joint_of(b) for b in bones])
    for k in range(anny_bodies["weights_idx"].shape[1]):
        np.add.at(
            weights,
            (np.arange(len(weights)), joint[anny_bodies["weights_idx"][:, k]]),
            anny_bodies["weights_val"][:, k],
        )
    weights /= weights.sum(1, keepdims=True)
    verts, joints = to_t_pose(verts, joint_heads(bones, heads), weights)

    mean = verts.mean(0)
    flat = (verts - mean).reshape(len(verts), -1)
    value, vector = np.linalg.eigh(flat @ flat.T)  # Gram matrix: far fewer bodies than coordinates
    top = np.argsort(-value)[:10]
    sigma = np.sqrt(value[top] / (len(verts) - 1))
    dirs = (flat.T @ vector[:, top] / np.sqrt(value[top]) * sigma).T.reshape(10, -1, 3)
    tall, low = mean[:, 1].argmax(), mean[:, 1].argmin()
    dirs *= np.sign(dirs[:, tall, 1] - dirs[:, low, 1])[:, None, None]  # positive betas make taller
    betas = flat @ (dirs.reshape(10, -1) / sigma[:, None] ** 2).T
    error = np.linalg.norm((flat - betas @ dirs.reshape(10, -1)).reshape(len(verts), -1, 3), axis=-1).mean()
    print(f"PCA: 10 components explain {value[top].sum() / value.sum():.2%}, mean error {1e3 * error:.2f} mm")
    linear, *_ = np.linalg.lstsq(np.c_[np.ones(len(betas)), betas], joints.reshape(len(joints), -1), rcond=None)
    joint0, joint_dirs = linear[0].reshape(24, 3), linear[1:].reshape(10, 24, 3)

    skin = outer_faces(mean, anny_bodies["faces"])
    for name, count in LODS.items():
        _, faces, triangle, bary = remesh(mean, skin, count)

        def carry(x: np.ndarray, triangle: np.ndarray = triangle, bary: np.ndarray = bary) -> np.ndarray:
            return np.einsum("vk,vk...->v...", bary, x[triangle])

        template, shapedirs = carry(mean), np.stack([carry(d) for d in dirs], -1)
        skinning = carry(weights)
        influence = np.argsort(-skinning, 1)[:, :4]
        strength = np.take_along_axis(skinning, influence, 1)
        strength /= strength.sum(1, keepdims=True)
        regressor = np.stack([sparse_regressor(joint0[j], joint_dirs[:, j], template, shapedirs) for j in range(24)])
        row, column = np.nonzero(regressor)
        miss = np.linalg.norm(regressor @ template - joint0, axis=1).max()
        np.savez_compressed(
            args.out / name,
            v_template=template.astype(np.float32),
            shapedirs=shapedirs.astype(np.float16),
            f=faces.astype(np.uint16),
            parents=PARENTS.astype(np.int8),
            weights_joint=influence.astype(np.uint8),
            weights_value=strength.astype(np.float16),
            regressor_joint=row.astype(np.uint8),
            regressor_vertex=column.astype(np.uint16),
            regressor_value=regressor[row, column].astype(np.float32),
        )
        size = (args.out / name).stat().st_size
        edges = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), 1)
        open_edges = (np.unique(edges, axis=0, return_counts=True)[1] != 2).sum()
        print(
            f"{name}: {len(template)} vertices, {len(faces)} faces, {open_edges} open edges, "
            f"joints within {1e3 * miss:.2f} mm, {size} bytes"
        )


if __name__ == "__main__":
    main()
