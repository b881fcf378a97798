"""Train the embedded fitter on rendered people, and measure it on ones it never saw.

    python -m reid3d.preprocess.train_fitter --out runs/fitter             # resumes if run again
    python -m reid3d.preprocess.train_fitter --out runs/fitter --evaluate  # only measures its weights

Every batch is rendered from its own seed, so no image is ever seen twice, no data lie on a disk, a run that was
interrupted goes on as if it had not been, and the held-out crops, whose seeds lie in another range, are new whatever
the length of the training. They also have clothes and places that training never shows, see synth.render.sample_scenes.
"""

import argparse
import json
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from math import pi
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed
import torch.multiprocessing
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from reid3d.io import atomic_write
from reid3d.ops import farthest_point_sample, rasterize

from .body import Body, load_body, some_vertices
from .camera import project, project_joints
from .fit import FORMAT, WEIGHTS, BodyFit, EmbeddedFitter, Fitter, load_regressor, own_body
from .hmr import INPUT_SIZE, Regressed, Regressor, Seen
from .synth.people import STAND
from .synth.render import Renderer, sample_scenes

SKIN = 256  # vertices that the loss looks at
CHECKPOINT_EVERY = 500  # steps
EVALUATE_EVERY = 2000
EVALUATE_CROPS = 512
# The batches share out the seeds: run r trains on r << 20, (r << 20) + 1, ...
RUN_BITS = 20
MEAN = 2 << 30  # first seed of the batches that give the mean
TRUST = MEAN + 10_000  # of those that tell what a confidence is worth
TRUST_CROPS = 4096
HELD_OUT = 3 << 30  # first seed of the held-out batches
OF_SEEN = 18.0  # how much what is seen weighs in the loss: the body learns faster, too, the better it is told
BAD = 0.15  # metres: a fit whose vertices are off by more, on average, is a bad one


@dataclass(frozen=True)
class Recipe:
    """What decides the weights.

    batch: crops of a step, which the processes share out, each with its own batch normalisation. The rate is constant,
    then falls to 0 in the last `fall` of the steps.
    """

    steps: int = 15000
    batch: int = 128
    processes: int = 2
    lr: float = 2e-3
    fall: float = 0.4
    weight_decay: float = 1e-4
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm = (step + 1) / min(200, self.steps // 10 + 1)
        return self.lr * min(1.0, warm, (self.steps - step) / (self.fall * self.steps))


class Batch(NamedTuple):
    """Crops with the truth beside them, see synth.render.Truth."""

    images: Tensor
    rotmats: Tensor
    betas: Tensor
    cam: Tensor
    joints2d: Tensor
    silhouette: Tensor  # (B,64,32) bool, of the true body in its clothes
    clothed: Tensor | None  # (B,128,64) bool: of held-out crops, the person without what is carried, ridden or a hat


class RenderedBatches(Dataset):
    """Item i is the batch rendered from seed first + i; those of held-out seeds show what training does not."""

    def __init__(self, count: int, batch: int, first: int) -> None:
        self.count, self.batch, self.first = count, batch, first
        self.renderer: Renderer | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Batch:
        if self.renderer is None:  # one for each worker process
            self.renderer = Renderer()
        rng, held_out = np.random.default_rng(self.first + i), self.first >= HELD_OUT
        people, poses, action, streets, shots = sample_scenes(self.batch, rng, held_out)
        # As crops of other proportions come to the fitter: with their edges drawn out above and below, or at the sides.
        high, wide = (np.ones(self.batch) for _ in range(2))
        if not held_out:
            other = rng.random(self.batch)
            high = np.where(other < 0.2, rng.uniform(1 / EmbeddedFitter.TALLEST, 1, self.batch), high)
            wide = np.where(other > 0.85, rng.uniform(0.6, 1, self.batch), wide)
            shots = replace(shots, fill=shots.fill * high, shift=shots.shift * high[:, None])
        images, truth = self.renderer(people, poses, action, streets, shots)
        for k in np.flatnonzero(rng.random(self.batch) < 0.4):
            jpeg = BytesIO()
            Image.fromarray(images[k].numpy()).save(jpeg, "JPEG", quality=int(shots.quality[k]))
            images[k] = torch.from_numpy(np.array(Image.open(jpeg)))
        for k in np.flatnonzero((high < 1) | (wide < 1)):
            top, left = (round(side * (1 - part[k]) / 2) for side, part in zip(INPUT_SIZE, (high, wide), strict=True))
            kept = images[k, top : INPUT_SIZE[0] - top, left : INPUT_SIZE[1] - left].numpy()
            images[k] = torch.from_numpy(np.pad(kept, ((top, top), (left, left), (0, 0)), "edge"))
        body, clothed = load_body("low"), None
        silhouette = shape_of(body, body(truth.rotmats, truth.betas).verts, truth.cam, INPUT_SIZE[0] // 2)
        if held_out:
            bare = replace(people, bag=0 * people.bag, hat=0 * people.hat)
            clothed = self.renderer(bare, poses, np.full_like(action, STAND), streets, shots)[1].mask
        return Batch(images, truth.rotmats, truth.betas, truth.cam, truth.joints2d, silhouette, clothed)


def shape_of(body: Body, verts: Tensor, cam: Tensor, height: int) -> Tensor:
    """Silhouettes (B,height,height/2) bool of bodies in crops of 2:1."""
    return rasterize(project(verts, cam, height, height // 2), body.faces, height, height // 2).face >= 0


def normalise(images: Tensor) -> Tensor:
    """Images (B,H,W,3) uint8 to the network's (B,3,H,W) in [-1,1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1  # channels last in memory, which is the faster layout


def loss(body: Body, out: list[Regressed], seen: Seen, truth: Batch) -> Tensor:
    """Weighted sum of errors of the corrections, of the last one's joints and skin, and of what is seen.

    body: some vertices of the embedded body are enough.
    """
    weight = torch.ones(24, device=truth.cam.device)
    weight[0], weight[22:] = 4.0, 0.3  # the heading matters most, the hands' own rotation least
    total = OF_SEEN * loss_of_seen(seen, truth)
    for share, guess in zip((0.25, 0.25, 1.0), out, strict=True):
        rotation = ((guess.rotmats - truth.rotmats) ** 2).sum((2, 3)) * weight
        betas = F.huber_loss(guess.betas, truth.betas)
        scale = F.huber_loss(guess.cam[:, 0] / truth.cam[:, 0], torch.ones_like(guess.cam[:, 0]), delta=0.3)
        place = (guess.cam[:, 1:] - truth.cam[:, 1:]).abs().mean()
        total = total + share * (rotation.mean() + 0.2 * betas + 4 * scale + place)
    last = out[-1]
    posed, true = body(last.rotmats, last.betas), body(truth.rotmats, truth.betas)
    skin, joints = ((a - posed.joints[:, :1]) - (b - true.joints[:, :1]) for a, b in zip(posed, true, strict=True))
    projected = (project_joints(posed.joints, last.cam) - truth.joints2d).abs().sum(-1)
    outline = (project_joints(posed.verts, last.cam) - project_joints(true.verts, truth.cam)).abs().sum(-1)
    return (
        total
        + 6 * joints.abs().sum(-1).mean()
        + 4 * skin.abs().sum(-1).mean()
        + 8 * projected.mean()
        + 4 * outline.mean()
    )


def loss_of_seen(seen: Seen, truth: Batch) -> Tensor:
    """Errors of the silhouette and of the joints, those beyond the crop's edges left out."""
    edge = truth.joints2d.new_tensor([INPUT_SIZE[1] / INPUT_SIZE[0], 1.0])
    inside = (truth.joints2d.abs() < edge).all(2)
    apart = (seen.joints2d - truth.joints2d).abs().sum(2)
    chance = F.cross_entropy(seen.maps.flatten(0, 1), spots(truth.joints2d).flatten(0, 1), reduction="none")
    joints = (5 * apart + 3 * chance.unflatten(0, inside.shape)) * inside
    mask = F.binary_cross_entropy_with_logits(seen.mask, truth.silhouette.float())
    return joints.sum() / inside.sum() + 3 * mask


def spots(joints2d: Tensor) -> Tensor:
    """What the maps of joints (B,24,2) should be: Gaussians (B,24,32*16) of sum 1, about a cell wide."""
    rows, columns = INPUT_SIZE[0] // 4, INPUT_SIZE[1] // 4
    axes = []
    for coordinate, side in ((1, rows), (0, columns)):
        centre = (2 * torch.arange(side, device=joints2d.device) + 1 - side) / rows
        axes.append((-0.5 * ((joints2d[..., coordinate, None] - centre) * rows / 2) ** 2).exp())
    spot = (axes[0][..., None] * axes[1][..., None, :]).flatten(2)
    return spot / spot.sum(2, keepdim=True).clamp(min=1e-6)


def mean_parameters(batches: RenderedBatches) -> Tensor:
    """The starting point of the regression: mean rotations facing the camera, mean shape, median camera."""
    parts = [batches[i] for i in range(8)]
    rotmats, betas = (torch.cat(p).mean(0) for p in ([b.rotmats for b in parts], [b.betas for b in parts]))
    cam = torch.cat([b.cam for b in parts]).median(0).values
    rotmats[0] = torch.diag(torch.tensor([1.0, -1.0, -1.0]))
    return torch.cat([rotmats[:, :, :2].flatten(), betas, cam])


@torch.no_grad()
def evaluate(fitter: Fitter, count: int, workers: int = 1) -> dict[str, float]:
    """Errors on at least `count` held-out crops.

    mpjpe_mm: mean joint position error, pelvis at the same place; pa_mpjpe_mm: the same after the best similarity
    transform; pve_mm: mean error of the vertices, clothes included, pelvis at the same place; yaw_median_deg and
    front_back (share over 90 degrees): error of the heading; joints2d_px: mean distance of the projected joints, in
    pixels of a 128-pixel crop; iou: of the body's silhouette and the person's, clothes included but nothing carried,
    ridden or worn on the head; bad: share of crops whose vertices are off by more than 150 mm, and doubted: the share
    of those among the fifth least confident.
    """
    batches = held_out(count, workers, HELD_OUT)
    rows = [measure(fitter, fitter(list(b.images.numpy()), [""] * len(b.images)), b) for b in batches]
    return summary({name: torch.cat([row[name] for row in rows]) for name in rows[0]})


def held_out(count: int, workers: int, first: int) -> DataLoader:
    """At least `count` crops in batches of 64, from the seed `first` on."""
    return DataLoader(RenderedBatches(-(-count // 64), 64, first), batch_size=None, num_workers=workers)


def measure(fitter: Fitter, fit: BodyFit, truth: Batch) -> dict[str, Tensor]:
    """Of each crop, what `evaluate` averages."""
    assert fit.rotmats is not None and fit.joints is not None
    true = fitter.body(truth.rotmats, truth.betas)
    a, b = fit.joints - fit.joints[:, :1], true.joints - true.joints[:, :1]
    vertices = (fit.verts - fit.joints[:, :1]) - (true.verts - true.joints[:, :1])
    forward, true_forward = fit.rotmats[:, 0, :, 2], truth.rotmats[:, 0, :, 2]  # where the body's +z points
    turn = torch.atan2(forward[:, 0], forward[:, 2]) - torch.atan2(true_forward[:, 0], true_forward[:, 2])
    row = {
        "mpjpe": (a - b).norm(dim=-1).mean(1),
        "pa": (procrustes(a, b) - b).norm(dim=-1).mean(1),
        "pve": vertices.norm(dim=-1).mean(1),
        "yaw": torch.atan2(turn.sin(), turn.cos()).abs() * 180 / pi,
        "joints2d": (project_joints(fit.joints, fit.cam) - truth.joints2d).norm(dim=-1).mean(1) * INPUT_SIZE[0] / 2,
        "confidence": fit.confidence,
    }
    if truth.clothed is not None:
        body = shape_of(fitter.body, fit.verts, fit.cam, INPUT_SIZE[0])
        row["iou"] = (body & truth.clothed).sum((1, 2)) / (body | truth.clothed).sum((1, 2))
    return row


def summary(rows: dict[str, Tensor]) -> dict[str, float]:
    """The figures of `evaluate` from what `measure` says of each crop."""
    bad, sure = rows["pve"] > BAD, rows["confidence"]
    return {
        "crops": len(sure),
        "mpjpe_mm": round(1e3 * rows["mpjpe"].mean().item(), 1),
        "pa_mpjpe_mm": round(1e3 * rows["pa"].mean().item(), 1),
        "pve_mm": round(1e3 * rows["pve"].mean().item(), 1),
        "yaw_median_deg": round(rows["yaw"].median().item(), 1),
        "front_back": round((rows["yaw"] > 90).float().mean().item(), 4),
        "joints2d_px": round(rows["joints2d"].mean().item(), 2),
        "iou": round(rows["iou"].mean().item(), 3),
        "bad": round(bad.float().mean().item(), 4),
        "doubted": round(((sure <= sure.quantile(0.2)) & bad).sum().item() / max(int(bad.sum()), 1), 3),
    }


def procrustes(a: Tensor, b: Tensor) -> Tensor:
    """Points a (B,J,3) moved, turned and scaled to lie as near to b as they can."""
    centre_a, centre_b = a.mean(1, keepdim=True), b.mean(1, keepdim=True)
    x, y = a - centre_a, b - centre_b
    u, s, vh = torch.linalg.svd(x.transpose(1, 2) @ y)
    flip = torch.ones_like(s)
    flip[:, 2] = torch.sign(torch.linalg.det(u @ vh))
    rotation = (u * flip[:, None]) @ vh
    scale = (s * flip).sum(1) / (x**2).sum((1, 2))
    return scale[:, None, None] * x @ rotation + centre_b


def save_weights(model: Regressor, recipe: Recipe, hours: float, path: Path) -> None:
    half = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in model.state_dict().items()}
    note = {"format": FORMAT, "trained_on": "reid3d synthetic people"}
    note |= {"recipe": json.dumps(asdict(recipe)), "hours": f"{hours:.2f}"}
    with atomic_write(path) as file:
        file.write(save(half, note))


@torch.no_grad()
def learn_trust(weights: Path, count: int, workers: int) -> Tensor:
    """The weights (5,) of a logistic regression that tells good fits from bad ones, from crops of no other use."""
    fitter, signs, good = EmbeddedFitter(weights), [], []
    for batch in held_out(count, workers, TRUST):
        fit, sign = fitter.fit(list(batch.images.numpy()))
        signs.append(sign)
        good.append((measure(fitter, fit, batch)["pve"] <= BAD).float())
    x, y = torch.cat(signs), torch.cat(good)
    with torch.enable_grad():
        trust = torch.zeros(x.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS([trust], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Any:
            optimizer.zero_grad()
            value = F.binary_cross_entropy_with_logits(x @ trust, y) + 1e-4 * (trust**2).sum()
            value.backward()
            return value

        optimizer.step(closure)
    return trust.detach()


def train(recipe: Recipe, out: Path, workers: int, device: str = "cpu") -> None:
    """Train until recipe.steps, from out/checkpoint.pt if there is one, and write the weights and log.jsonl.

    A run can go on with more steps than it was begun with, as long as its rate has not begun to fall.

    Raises:
        ValueError: steps or seed leave the held-out crops no seeds of their own; the processes cannot share a batch;
            fall is no share; the checkpoint is of another recipe.
    """
    if not 0 < recipe.steps * recipe.processes < 1 << RUN_BITS or not 0 <= recipe.seed < MEAN >> RUN_BITS:
        raise ValueError(
            f"steps times processes must be in 1..{(1 << RUN_BITS) - 1} and seed in 0..{(MEAN >> RUN_BITS) - 1}, "
            f"got {recipe.steps} times {recipe.processes} and {recipe.seed}"
        )
    if not 0 < recipe.fall <= 1:
        raise ValueError(f"fall must be above 0 and at most 1, got {recipe.fall}")
    if recipe.batch % recipe.processes or recipe.batch < 2 * recipe.processes:
        raise ValueError(
            "batch must be a multiple of processes, 2 crops or more for each, "
            f"got {recipe.batch} and {recipe.processes}"
        )
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, done = out / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        done, old = state["step"], Recipe(**state["recipe"])
        if replace(old, steps=recipe.steps) != recipe or any(old.rate(i) != recipe.rate(i) for i in range(done)):
            raise ValueError(f"{checkpoint} must come from the same recipe, got {state['recipe']}")
    if done < recipe.steps:
        if recipe.processes == 1:
            _train(0, recipe, out, workers, device, None)
        else:
            with TemporaryDirectory() as folder:
                rest = (recipe, out, workers, device, f"file://{folder}/meeting")
                torch.multiprocessing.start_processes(_train, rest, recipe.processes)
    model, note = load_regressor(out / WEIGHTS)
    model.trust.copy_(learn_trust(out / WEIGHTS, TRUST_CROPS, workers))
    save_weights(model, recipe, float(note["hours"]), out / WEIGHTS)


def _train(rank: int, recipe: Recipe, out: Path, workers: int, device: str, meeting: str | None) -> None:
    """What one of the processes does, the first of which also writes; meeting: where they find each other."""
    if meeting is not None:
        # So they hear when the one that started them is gone; in the background of a shell they would ignore it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=recipe.processes)
    body = own_body(load_body("low")).to(device)
    body = some_vertices(body, farthest_point_sample(body.v_template[None], SKIN)[0])
    torch.manual_seed(recipe.seed)
    model = Regressor().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    share, first = recipe.batch // recipe.processes, recipe.seed << RUN_BITS
    checkpoint, log = out / "checkpoint.pt", out / "log.jsonl"
    done, hours = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        done, hours = state["step"], state["hours"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if rank == 0:
            print(f"resuming at step {done}")
    else:
        model.mean.copy_(mean_parameters(RenderedBatches(8, 64, MEAN)))
    loader = DataLoader(
        RenderedBatches(recipe.steps * recipe.processes, share, first),
        batch_size=None,
        sampler=range(done * recipe.processes + rank, recipe.steps * recipe.processes, recipe.processes),
        num_workers=workers,
        prefetch_factor=8 if workers else None,
    )
    start, running = time.time(), 0.0
    for step, batch in enumerate(loader, done + 1):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step - 1)
        batch = batch._replace(**{k: v.to(device) for k, v in batch._asdict().items() if v is not None})
        model.train()
        with torch.autocast(device, torch.bfloat16):  # halves the time of a step where the processor has bf16
            maps = model.maps_of(normalise(batch.images))
        features, seen = model.read(*(part.float() for part in maps))
        value = loss(body, model.regress(features, seen.joints2d), seen, batch)
        optimizer.zero_grad()
        value.backward()
        if meeting is not None:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            mean = torch.cat([gradient.flatten() for gradient in gradients])
            torch.distributed.all_reduce(mean)
            mean /= recipe.processes
            for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)  # nearly always: every batch counts alike
        optimizer.step()
        running = value.item() if step == done + 1 else 0.98 * running + 0.02 * value.item()
        if rank == 0 and (step % CHECKPOINT_EVERY == 0 or step == recipe.steps):
            seconds = time.time() - start
            state = {
                "recipe": asdict(recipe),
                "step": step,
                "hours": hours + seconds / 3600,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            buffer = BytesIO()
            torch.save(state, buffer)
            with atomic_write(checkpoint) as file:
                file.write(buffer.getbuffer())
            save_weights(model, recipe, state["hours"], out / WEIGHTS)
            line = {"step": step, "images": step * recipe.batch, "hours": round(state["hours"], 3)}
            line |= {"loss": round(running, 4), "images_a_second": round((step - done) * recipe.batch / seconds)}
            if step % EVALUATE_EVERY == 0 or step == recipe.steps:
                line |= evaluate(EmbeddedFitter(out / WEIGHTS), EVALUATE_CROPS, 0)
            with log.open("a") as lines:
                lines.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m reid3d.preprocess.train_fitter",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, weights, log and figures")
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    parser.add_argument("--workers", type=int, default=0, help="more processes, for each, that render (default 0)")
    parser.add_argument("--device", default="cpu", help="where it trains (default cpu)")
    parser.add_argument("--evaluate", action="store_true", help="measure the weights in --out, train nothing")
    parser.add_argument("--held-out", type=int, default=5120, help="held-out crops (default 5120)")
    args = parser.parse_args(argv)
    recipe = Recipe(**{k: getattr(args, k) for k in asdict(Recipe())})
    torch.set_num_threads(1)
    try:
        if not args.evaluate:
            train(recipe, args.out, args.workers, args.device)
        _, note = load_regressor(args.out / WEIGHTS)
    except (ValueError, OSError) as error:
        sys.exit(f"{parser.prog}: error: {error}")
    recipe = Recipe(**json.loads(note["recipe"]))
    figures = {
        "command": " ".join([parser.prog, *(f"--{k.replace('_', '-')} {v}" for k, v in asdict(recipe).items())]),
        "recipe": asdict(recipe),
        "images": recipe.steps * recipe.batch,
        "hours": float(note["hours"]),
        "torch": str(torch.__version__),
        "held_out_first_seed": HELD_OUT,
        **evaluate(EmbeddedFitter(args.out / WEIGHTS), args.held_out, args.workers),
    }
    with atomic_write(args.out / "fitter.json") as file:
        file.write(json.dumps(figures, indent=2).encode() + b"\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
