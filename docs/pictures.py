"""Draws the pictures of README and docs from the demo's own files.

    make demo && .venv/bin/python docs/pictures.py

flow.png: a query of the demo, the body fitted to it, its cloud from three sides, and its best matches in the gallery.
modes.png: the query's clouds in each mode. worst.png: the least confident of the demo's crops. worlds.jpg: people of
the synthetic worlds and what is known of them; it needs no demo: docs/pictures.py --worlds. Nor does fits.jpg, twelve
of the fitter's held-out crops with the bodies fitted to them: docs/pictures.py --fits. background.jpg: clouds of the
study `background`, from its folder: docs/pictures.py --background studies.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import reid3d
from reid3d.cloud import PointCloud
from reid3d.preprocess.camera import project
from reid3d.preprocess.fit import BodyFit, EmbeddedFitter
from reid3d.preprocess.synth import synth
from reid3d.preprocess.train_fitter import HELD_OUT, RenderedBatches
from reid3d.retrieval.features import Features
from reid3d.viewer.pictures import RIGHT, SIZE, WRONG, Panel, View, draw_body, enlarge, grid


def shaded(fitter: EmbeddedFitter, image: np.ndarray) -> Image.Image:
    """The fitted body over a faded crop."""
    return over(fitter, image, fitter([image], ["query"]))


def over(fitter: EmbeddedFitter, image: np.ndarray, fit: BodyFit) -> Image.Image:
    """A body over a faded crop."""
    pixels = project(fit.verts, fit.cam, *SIZE)[0, :, :2].numpy()
    return draw_body(enlarge(image), fit.verts[0], fitter.body.faces, pixels)


def turned(cloud: PointCloud, yaw: float) -> Image.Image:
    return View(cloud, yaw).draw()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("build/demo"), help="folder of `make demo`")
    parser.add_argument("--query", type=int, default=24, help="which query to show")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--worlds", action="store_true", help="draw worlds.jpg alone")
    parser.add_argument("--fits", action="store_true", help="draw fits.jpg alone")
    parser.add_argument("--background", type=Path, help="folder of the study; draw background.jpg alone")
    args = parser.parse_args()
    if args.worlds or args.fits or args.background:
        if args.background:
            background(args.background).save(args.out / "background.jpg", quality=85)
        if args.worlds:
            worlds().save(args.out / "worlds.jpg", quality=88)
        if args.fits:
            fits().save(args.out / "fits.jpg", quality=88)
        return

    features = args.demo / "run" / "features"
    query, gallery = (Features.load(features / f"{k}.safetensors") for k in ("query", "gallery"))
    ranks = reid3d.search(query, gallery, k=3, cross_camera=True)
    crops = args.demo / "people"
    image = np.array(Image.open(crops / query.names[args.query]))
    clouds = reid3d.open_dataset(args.demo / "clouds").query
    cloud = clouds.cloud([r.name for r in clouds.records].index(query.names[args.query]))
    panels = [
        Panel("crop", enlarge(image)),
        Panel("fitted body", shaded(EmbeddedFitter(), image)),
        Panel("coloured cloud", turned(cloud, 0.0)),
        Panel("turned 45°", turned(cloud, 0.8)),
        Panel("turned 90°", turned(cloud, 1.57)),
    ]
    pid = int(query.pids[args.query])
    for rank, g in enumerate(ranks.idx[args.query].tolist(), 1):
        frame = RIGHT if int(gallery.pids[g]) == pid else WRONG
        panels.append(Panel(f"match {rank}", enlarge(np.array(Image.open(crops / gallery.names[g]))), frame))

    grid([panels], size=18).save(args.out / "flow.png", optimize=True)
    grid([modes(crops / query.names[args.query])], size=18).save(args.out / "modes.png", optimize=True)
    worst = Image.open(args.demo / "clouds" / "worst.png")
    worst.crop((0, 0, worst.width, worst.height // 2)).convert("P", palette=Image.Palette.ADAPTIVE).save(
        args.out / "worst.png", optimize=True
    )


def fits() -> Image.Image:
    """Held-out crops, the bodies fitted to them, and the same from the side."""
    fitter, rows = EmbeddedFitter(), []
    for image in RenderedBatches(1, 64, HELD_OUT)[0].images.numpy()[:12]:
        fit = fitter([image], ["crop"])
        quarter = torch.tensor([[0.0, 0, -1], [0, 1, 0], [1, 0, 0]])
        verts = (fit.verts - fit.joints[:, :1]) @ quarter.T
        middle = fit.cam * torch.tensor([1.0, 0, 0])
        aside = np.full((*image.shape[:2], 3), 255, np.uint8)
        panels = enlarge(image), over(fitter, image, fit), over(fitter, aside, BodyFit(verts, middle, fit.confidence))
        rows.append(np.concatenate([np.array(panel) for panel in panels], 1))
    half = [np.concatenate(rows[i : i + 4], 1) for i in range(0, 12, 4)]
    picture = Image.fromarray(np.concatenate(half))
    return picture.resize((picture.width * 2 // 3, picture.height * 2 // 3))


def worlds() -> Image.Image:
    """Eight people of the test of each preset, twice in each camera; below, the ground truth of the first crops."""
    gap, sheets = 8, []
    for preset in ("standard", "hard"):
        with tempfile.TemporaryDirectory() as folder:
            people = synth(folder, preset=preset, ids=24, progress=False)  # type: ignore[arg-type]
            with np.load(people / "gt.npz") as truth:
                rows = np.flatnonzero([not n.split("/")[1].startswith(("0000", "-1")) for n in truth["names"]])[
                    12 * 18 :
                ]
                crops = np.stack([np.asarray(Image.open(people / n)) for n in truth["names"][rows]])
                facts = {k: truth[k][rows] for k in ("seen", "joints2d")}
        sheet = crops.reshape(12, 18, 128, 64, 3)[:8, [0, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17]]
        sheets.append(sheet.transpose(0, 2, 1, 3, 4).reshape(8 * 128, 12 * 64, 3))
    below = np.concatenate([marked(crops[i], facts["seen"][i], facts["joints2d"][i]) for i in range(24)], 1)
    wide = sheets[0].shape[1]
    picture = np.full((sheets[0].shape[0] + gap + 128, 2 * wide + gap, 3), 255, np.uint8)
    picture[: sheets[0].shape[0], :wide], picture[: sheets[0].shape[0], wide + gap :] = sheets
    picture[-128:, : below.shape[1]] = below[:, : picture.shape[1]]
    return Image.fromarray(picture)


def background(studies: Path) -> Image.Image:
    """Clouds of eight people: the visible part of the body, the rest of the person beside it, all."""
    every, person = (reid3d.open_dataset(studies / name).train for name in ("clouds", "clouds-person"))
    rows: list[list[Panel]] = [[], [], []]
    for i in range(0, len(every), -(-len(every) // 8)):
        whole = every.cloud(i)
        body = whole.vertex >= 0
        visible = PointCloud(whole.xyz[body], whole.rgb[body], whole.vertex[body])
        for row, cloud in zip(rows, (visible, person.cloud(i), whole), strict=True):
            row.append(Panel("", turned(cloud, 0.5)))
    picture = grid(rows, size=1)
    return picture.resize((picture.width * 3 // 5, picture.height * 3 // 5))


def marked(crop: np.ndarray, seen: np.ndarray, joints: np.ndarray) -> np.ndarray:
    """A crop with its person's pixels in colour and their joints as dots."""
    mask = np.unpackbits(seen).reshape(128, 64, 1).astype(bool)
    picture = Image.fromarray(np.where(mask, crop, crop // 3 + 150).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for x, y in joints * 64 + [32, 64]:
        draw.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), fill=(255, 40, 40))
    return np.asarray(picture)


def modes(crop: Path) -> list[Panel]:
    """A crop's clouds from the front and from the side."""
    panels = [Panel("crop", enlarge(np.array(Image.open(crop))))]
    for mode, size in (("paper", (128, 64)), ("surface", (256, 128)), ("official", (256, 128))):
        cloud = reid3d.convert(crop, mode=mode, size=size)
        for side, yaw in (("", 0.0), (", side", 1.2)):
            panels.append(Panel(f"{mode} {size[0]}x{size[1]}{side}", turned(cloud, yaw)))
    return panels


if __name__ == "__main__":
    main()
