"""Measures the embedded fitter: on held-out crops before and after refinement, on real photos, and its speed.

    python benchmarks/fitter.py benchmarks/results/fitter-cpu.json [--photos FOLDER]

The held-out crops are rendered anew from their seeds. What refines them is exact, as no detector is: the silhouette of
the person in their clothes, and keypoints 1.5 pixels off. FOLDER holds photos with their silhouettes as COCO
annotates them: NAME.jpg and NAME.json with "annotations" (bbox and segmentation, polygons).
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from reid3d import bench
from reid3d.io import atomic_write
from reid3d.preprocess.camera import project_joints
from reid3d.preprocess.evidence import Keypoints, Masks, Person
from reid3d.preprocess.fit import BodyFit, EmbeddedFitter, UprightFitter
from reid3d.preprocess.refine import Refiner
from reid3d.preprocess.train_fitter import HELD_OUT, Batch, held_out, measure, summary

MARGIN = 0.03  # of a person's box, as detectors leave


def masks_of(masks: Sequence[np.ndarray]) -> Masks:
    return Masks(Path("truth"), [(str(i), lambda mask=mask: mask) for i, mask in enumerate(masks)], "")


def keypoints_of(refiner: Refiner, fitter: EmbeddedFitter, batch: Batch, rng: np.random.Generator) -> Keypoints:
    """BODY_25 of true bodies, but for what is beyond the crop."""
    height, width = batch.images.shape[1:3]
    joints = fitter.body.joints(batch.rotmats, batch.betas)
    points = refiner.landmarks(*joints, batch.betas)
    xy = project_joints(points, batch.cam) * height / 2 + torch.tensor([width / 2, height / 2])
    inside = ((xy > 0) & (xy < xy.new_tensor([width, height]))).all(2)
    rows = torch.cat([xy, inside[..., None]], 2).numpy()
    rows[..., :2] += rng.normal(0, 1.5, rows[..., :2].shape)
    people = [Person(np.where(row[:, 2:] > 0, row, 0.0).ravel()) for row in rows]
    return Keypoints(Path("truth"), [(str(i), lambda p=person: [p]) for i, person in enumerate(people)], "")


def accuracy(fitter: EmbeddedFitter, count: int, workers: int) -> dict[str, Any]:
    """What train_fitter.evaluate measures, of upright bodies, fits and refined ones; what the confidence is worth."""
    upright, rng = UprightFitter(), np.random.default_rng(0)
    places = Refiner(fitter.body, masks_of([np.ones((1, 1), bool)]))  # for its landmarks
    rows: dict[str, list[dict[str, Tensor]]] = {}
    seconds: dict[str, float] = {}

    def note(kind: str, start: float, fit: BodyFit, batch: Batch) -> None:
        seconds[kind] = seconds.get(kind, 0.0) + time.perf_counter() - start
        rows.setdefault(kind, []).append(measure(fitter, fit, batch))

    for batch in held_out(count, workers, HELD_OUT):
        crops, names = list(batch.images.numpy()), [str(i) for i in range(len(batch.images))]
        assert batch.clothed is not None
        for kind, each in (("upright", upright), ("fitted", fitter)):
            start = time.perf_counter()
            fit = each(crops, names)
            note(kind, start, fit, batch)
        masks, keypoints = masks_of(list(batch.clothed.numpy())), keypoints_of(places, fitter, batch, rng)
        for kind, evidence in (
            ("refined by masks", (None, masks)),
            ("refined by keypoints", (keypoints, None)),
            ("refined by both", (keypoints, masks)),
        ):
            refiner, start = Refiner(fitter.body, *evidence), time.perf_counter()
            note(kind, start, refiner(fit, crops, names)[0], batch)
    columns = {
        kind: {name: torch.cat([row[name] for row in found]) for name in found[0]} for kind, found in rows.items()
    }
    result: dict[str, Any] = {"first_seed": HELD_OUT}
    for kind, column in columns.items():
        figures = summary(column)
        if kind != "fitted":
            figures = {name: value for name, value in figures.items() if name not in ("bad", "doubted")}
        result[kind] = {**figures, "crops_a_second": round(len(column["pve"]) / seconds[kind])}
        print(kind, result[kind], flush=True)
    sure, off = columns["fitted"]["confidence"], columns["fitted"]["pve"]
    edges = (0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.97, 1.0001)
    result["by_confidence"] = []
    for low, high in zip(edges, edges[1:], strict=False):
        inside = (sure >= low) & (sure < high)
        row: dict[str, Any] = {"confidence": [low, min(high, 1)], "crops": int(inside.sum())}
        if inside.any():
            row["below_150_mm"] = round(float((off[inside] <= 0.15).float().mean()), 3)
            row["pve_mm"] = round(1e3 * float(off[inside].mean()), 1)
            row["pve_mm_of_an_upright_body"] = round(1e3 * float(columns["upright"]["pve"][inside].mean()), 1)
        result["by_confidence"].append(row)
    return result


def photos(fitter: EmbeddedFitter, folder: Path) -> list[dict[str, Any]]:
    """Silhouettes of fits and of people, before and after refinement by those of the people."""
    found = []
    for file in sorted(folder.glob("*.json")):
        image = Image.open(file.with_suffix(".jpg")).convert("RGB")
        for k, person in enumerate(json.loads(file.read_text())["annotations"]):
            mask = Image.new("1", image.size)
            for polygon in person["segmentation"]:
                ImageDraw.Draw(mask).polygon(polygon, fill=1)
            left, top, width, height = person["bbox"]
            x, y = MARGIN * width, MARGIN * height
            box = np.array([left - x, top - y, left + width + x, top + height + y])
            box = box.clip(0, [*image.size, *image.size]).astype(int).tolist()
            crop, silhouette = np.array(image.crop(box)), np.array(mask.crop(box))
            refiner = Refiner(fitter.body, masks=masks_of([silhouette]))
            fit = fitter([crop], ["0"])
            _, (report,) = refiner(fit, [crop], ["0"])
            found.append(
                {"photo": file.stem, "person": k, "confidence": round(float(fit.confidence), 3)}
                | {name: round(value, 3) for name, value in report.items()}
            )
            print(found[-1], flush=True)
    return found


def speed(fitter: EmbeddedFitter) -> dict[str, Any]:
    """Crops a second of whole fits, both ways, one thread, in batches of 64 as the conversion makes them."""
    crops = [crop for batch in held_out(256, 0, HELD_OUT) for crop in batch.images.numpy()]
    rates = []
    for _ in range(9):
        start = time.perf_counter()
        for i in range(0, len(crops), 64):
            fitter(crops[i : i + 64], [""] * 64)
        rates.append(len(crops) / (time.perf_counter() - start))
    return {"crops_a_second": round(statistics.median(rates)), "all": [round(rate) for rate in rates]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--weights", type=Path, help="of train_fitter.py; the embedded ones by default")
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--held-out", type=int, default=5120, help="crops (default 5120)")
    parser.add_argument("--workers", type=int, default=1, help="processes that render (default 1)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started, fitter = time.perf_counter(), EmbeddedFitter(args.weights)
    found: dict[str, Any] = {"suite": "fitter", "speed": speed(fitter)}
    print(found["speed"], flush=True)
    if args.photos:
        found["photos"] = photos(fitter, args.photos)
    found["held_out"] = accuracy(fitter, args.held_out, args.workers)
    found["environment"] = bench.environment("cpu", 1, time.perf_counter() - started, {})
    with atomic_write(args.json) as file:
        file.write(json.dumps(found, indent=2).encode() + b"\n")


if __name__ == "__main__":
    main()
