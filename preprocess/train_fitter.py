"""Train the embedded fitter on rendered people, and measure it on ones it never saw.

    python -m reid3d.preprocess.train_fitter --out runs/fitter             # resumes if run again
    python -m reid3d.preprocess.train_fitter --out runs/fitter --evaluate  # only measures its weights

Every batch is rendered from its own seed, so no image is ever seen twice, a run that was interrupted goes on as if it
had not been, and the held-out crops, whose seeds lie in another range, are new whatever the length of the training.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from io import BytesIO
from math import cos, pi
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from reid3d.io import atomic_write

from .body import Body, load_body
from .fit import FORMAT, WEIGHTS, load_regressor
from .hmr import Regressed, Regressor
from .synth.render import Renderer, sample_scenes

CHECKPOINT_EVERY = 250  # steps
# The batches share out the seeds: run r trains on r << 20, (r << 20) + 1, ...
RUN_BITS = 20
MEAN = 2 << 30  # first seed of the batches that give the mean
HELD_OUT = 3 << 30  # first seed of the held-out batches


@dataclass(frozen=True)
class Recipe:
    """What decides the weights."""

    steps: int = 12000
    batch: int = 64
    lr: float = 2e-3
    weight_decay: float = 1e-4
    seed: int = 0


class RenderedBatches(Dataset):
    """Item i is the batch rendered from seed first + i: images, rotmats, betas, cam, joints2d."""

    def __init__(self, count: int, batch: int, first: int) -> None:
        self.count, self.batch, self.first = count, batch, first
        self.renderer: Renderer | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        if self.renderer is None:  # one for each worker process
            self.renderer = Renderer()
        rng = np.random.default_rng(self.first + i)
        people, poses, action, streets, shots = sample_scenes(self.batch, rng)
        images, truth = self.renderer(people, poses, action, streets, shots)
        for k in np.flatnonzero(rng.random(self.batch) < 0.4):
            jpeg = BytesIO()
            Image.fromarray(images[k].numpy()).save(jpeg, "JPEG", quality=int(shots.quality[k]))
            images[k] = torch.from_numpy(np.array(Image.open(jpeg)))
        return images, truth.rotmats, truth.betas, truth.cam, truth.joints2d


def normalise(images: Tensor) -> Tensor:
    """Images (B,H,W,3) uint8 to the network's (B,3,H,W) in [-1,1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1  # channels last in memory, which is the faster layout


def project_joints(joints: Tensor, cam: Tensor) -> Tensor:
    """Joints (B,24,3) to (B,24,2) in half crop heights."""
    return cam[:, None, :1] * (joints[..., :2] + cam[:, None, 1:])


def loss(body: Body, out: Regressed, rotmats: Tensor, betas: Tensor, cam: Tensor, joints2d: Tensor) -> Tensor:
    """Weighted sum of errors in rotations, root-relative joints, projected joints, shape and camera scale."""
    weight = torch.ones(24)
    weight[0], weight[22:] = 4.0, 0.3  # the heading matters most, the hands' own rotation least
    joints, truth = body.joints(out.rotmats, out.betas)[1], body.joints(rotmats, betas)[1]
    relative = (joints - joints[:, :1]) - (truth - truth[:, :1])
    rotation = ((out.rotmats - rotmats) ** 2).sum((2, 3)) * weight
    projected = (project_joints(joints, out.cam) - joints2d).abs().sum(-1)
    return (
        rotation.mean()
        + 8 * relative.abs().sum(-1).mean()
        + 10 * projected.mean()
        + 0.06 * ((out.betas - betas) ** 2).mean()
        + 2 * ((out.cam[:, 0] / cam[:, 0] - 1) ** 2).mean()
    )


def mean_parameters(batches: RenderedBatches) -> Tensor:
    """The starting point of the regression: mean rotations facing the camera, mean shape, median camera."""
    parts = [batches[i] for i in range(8)]
    rotmats, cam = torch.cat([p[1] for p in parts]).mean(0), torch.cat([p[3] for p in parts]).median(0).values
    rotmats[0] = torch.diag(torch.tensor([1.0, -1.0, -1.0]))
    return torch.cat([rotmats[:, :, :2].flatten(), torch.zeros(10), cam])


@torch.no_grad()
def evaluate(model: Regressor, count: int, batch: int = 64, workers: int = 1) -> dict[str, float]:
    """Errors on at least `count` held-out crops.

    mpjpe_mm: mean joint position error, pelvis at the same place; pa_mpjpe_mm: the same after the best similarity
    transform; yaw_median_deg and front_back (share over 90 degrees): error of the heading; joints2d_px: mean distance
    of the projected joints, in pixels of a 128-pixel crop.
    """
    body = load_body("low")
    loader = DataLoader(RenderedBatches(-(-count // batch), batch, HELD_OUT), batch_size=None, num_workers=workers)
    model.eval()
    rows: dict[str, list[Tensor]] = {"mpjpe": [], "pa": [], "yaw": [], "joints2d": []}
    for images, rotmats, betas, _, joints2d in loader:
        out = model(normalise(images))
        joints, truth = body.joints(out.rotmats, out.betas)[1], body.joints(rotmats, betas)[1]
        a, b = joints - joints[:, :1], truth - truth[:, :1]
        rows["mpjpe"].append((a - b).norm(dim=-1).mean(1))
        rows["pa"].append((procrustes(a, b) - b).norm(dim=-1).mean(1))
        forward, true_forward = out.rotmats[:, 0, :, 2], rotmats[:, 0, :, 2]  # where the body's +z points
        turn = torch.atan2(forward[:, 0], forward[:, 2]) - torch.atan2(true_forward[:, 0], true_forward[:, 2])
        rows["yaw"].append(torch.atan2(turn.sin(), turn.cos()).abs() * 180 / pi)
        rows["joints2d"].append((project_joints(joints, out.cam) - joints2d).norm(dim=-1).mean(1) * 64)
    all_rows = {k: torch.cat(v) for k, v in rows.items()}
    return {
        "crops": len(all_rows["yaw"]),
        "mpjpe_mm": round(1e3 * all_rows["mpjpe"].mean().item(), 1),
        "pa_mpjpe_mm": round(1e3 * all_rows["pa"].mean().item(), 1),
        "yaw_median_deg": round(all_rows["yaw"].median().item(), 1),
        "front_back": round((all_rows["yaw"] > 90).float().mean().item(), 3),
        "joints2d_px": round(all_rows["joints2d"].mean().item(), 2),
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


def train(recipe: Recipe, out: Path, workers: int) -> Regressor:
    """Train until recipe.steps, from out/checkpoint.pt if there is one.

    Raises:
        ValueError: steps or seed leave the held-out crops no seeds of their own; the checkpoint is of another recipe.
    """
    if not 0 < recipe.steps < 1 << RUN_BITS or not 0 <= recipe.seed < MEAN >> RUN_BITS:
        raise ValueError(
            f"steps must be in 1..{(1 << RUN_BITS) - 1} and seed in 0..{(MEAN >> RUN_BITS) - 1}, "
            f"got {recipe.steps} and {recipe.seed}"
        )
    out.mkdir(parents=True, exist_ok=True)
    body = load_body("low")
    torch.manual_seed(recipe.seed)
    model = Regressor()
    model.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    warm = min(200, recipe.steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, 0.5 * (1 + cos(pi * s / recipe.steps)) + 1e-3)
    )
    first = recipe.seed << RUN_BITS
    checkpoint = out / "checkpoint.pt"
    done = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["recipe"] != asdict(recipe):
            raise ValueError(f"{checkpoint} must come from the same recipe, got {state['recipe']}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        done = state["step"]
        print(f"resuming at step {done}")
    else:
        model.mean.copy_(mean_parameters(RenderedBatches(8, recipe.batch, MEAN)))
    batches = RenderedBatches(recipe.steps, recipe.batch, first)
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(done, recipe.steps),
        num_workers=workers,
        prefetch_factor=8 if workers else None,
    )
    start, running = time.time(), 0.0
    for step, (images, *truth) in enumerate(loader, done + 1):
        model.train()
        with torch.autocast("cpu", torch.bfloat16):  # halves the time of a step where the processor has bf16
            features = model.features(normalise(images))
        value = loss(body, model.regress(features.float()), *truth)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        running = value.item() if step == done + 1 else 0.98 * running + 0.02 * value.item()
        if step % CHECKPOINT_EVERY == 0 or step == recipe.steps:
            speed = (step - done) * recipe.batch / (time.time() - start)
            figures = evaluate(model, 512) if step % 1000 == 0 else ""
            print(f"step {step} loss {running:.3f} {speed:.0f} images/s {figures}", flush=True)
            state = {
                "recipe": asdict(recipe),
                "step": step,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
            }
            buffer = BytesIO()
            torch.save(state, buffer)
            with atomic_write(checkpoint) as file:
                file.write(buffer.getbuffer())
    half = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in model.state_dict().items()}
    note = {"recipe": json.dumps(asdict(recipe)), "trained_on": "reid3d synthetic people", "format": FORMAT}
    with atomic_write(out / WEIGHTS) as file:
        file.write(save(half, note))
    return model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m reid3d.preprocess.train_fitter",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, weights and figures")
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    parser.add_argument("--workers", type=int, default=1, help="processes that render (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads that train (default 1)")
    parser.add_argument("--evaluate", action="store_true", help="measure the weights in --out, train nothing")
    parser.add_argument("--held-out", type=int, default=2048, help="held-out crops (default 2048)")
    args = parser.parse_args(argv)
    recipe = Recipe(**{k: getattr(args, k) for k in asdict(Recipe())})
    torch.set_num_threads(args.threads)
    try:
        if not args.evaluate:
            train(recipe, args.out, args.workers)
        regressor, note = load_regressor(args.out / WEIGHTS)
    except (ValueError, OSError) as error:
        sys.exit(f"{parser.prog}: error: {error}")
    recipe = Recipe(**json.loads(note["recipe"]))
    figures = {
        "command": " ".join([parser.prog, *(f"--{k.replace('_', '-')} {v}" for k, v in asdict(recipe).items())]),
        "recipe": asdict(recipe),
        "torch": str(torch.__version__),
        "held_out_first_seed": HELD_OUT,
        **evaluate(regressor, args.held_out, workers=args.workers),
    }
    with atomic_write(args.out / "fitter.json") as file:
        file.write(json.dumps(figures, indent=2).encode() + b"\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
