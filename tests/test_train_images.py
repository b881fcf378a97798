"""Training of methods of images: their feed, their own losses, slower backbones, and what does not go together."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from reid3d import models
from reid3d import train as module
from reid3d.baselines.image_model import Heads, ImageModel
from reid3d.cli import main
from reid3d.config import (
    ImageConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    TripletConfig,
    ValidationConfig,
    read_config,
)
from reid3d.data import open_crops, open_dataset
from reid3d.models import create_model
from reid3d.retrieval import evaluate, extract, pair_scores, rerank, tlift
from reid3d.train import learning_rate, train
from tests.test_train import assert_same_weights, one_thread, weights, write_people  # noqa: F401 (a fixture)


class Tiny(ImageModel):
    """A convolution, its mean, a classifier; and a bias that only the loss changes, as a class memory would be."""

    size = (24, 12)
    flip = True
    backbone = ("conv.",)
    classifiers = ("classifier.", "seen")

    def __init__(self, num_classes: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 2)
        self.norm = nn.BatchNorm1d(16)
        self.classifier = nn.Linear(16, num_classes) if num_classes else None
        self.register_buffer("seen", torch.zeros(num_classes))

    def describe(self, images):
        feats = self.norm(F.relu(self.conv(images)).mean((2, 3)))
        return Heads((feats,), (self.classifier(feats),)) if self.training else feats

    def loss(self, output, labels):
        self.seen += torch.bincount(labels, minlength=len(self.seen))
        # A name that the losses of clouds have too, and a weight of their own there.
        return {"entropy": 2 * F.cross_entropy(output.logits[0], labels), "triplet": output.feats[0].square().mean()}


class Matcher(Tiny):
    """Compares by itself: the opposite of what the features say."""

    def scores(self, q, g):
        return -q.feats @ g.feats.T

    def distances(self, q, g):
        return (1 - self.scores(q, g)) / 2


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(models.MODELS, "tiny", Tiny)
    monkeypatch.setitem(models.MODELS, "matcher", Matcher)


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """Nine people of one colour each, four images from two cameras; three of them are searched for."""
    root, rng = tmp_path_factory.mktemp("crops"), np.random.default_rng(0)
    for pid in range(1, 10):
        colour = rng.integers(30, 225, 3)
        for i in range(4):
            folder = "bounding_box_train" if pid < 7 else "query" if i == 0 else "bounding_box_test"
            (root / folder).mkdir(exist_ok=True)
            pixels = np.clip(colour + rng.integers(-25, 25, (24, 12, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{pid:04d}_c{1 + i % 2}s1_{i:06d}_00.png")
    return root


def config(data, out, name="tiny", **optim):
    how = {"batch": 6, "epochs": 3, "warmup": 0, "lr": 1e-2, "device": "cpu", **optim}
    return TrainConfig(str(data), str(out), ModelConfig(name), train=OptimConfig(**how))


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_and_its_weights_know_their_images(crops, tmp_path):
    run = train(replace(config(crops, tmp_path / "run", epochs=12), image=ImageConfig(height=30)))
    first, *_, last = lines(run)
    assert last["loss"] == pytest.approx(last["entropy"] + last["triplet"]) and last["triplet"] > 0
    assert last["loss"] < first["loss"] * 0.7 and last["accuracy"] > first["accuracy"]
    assert last["images_per_second"] > 0
    model = create_model(weights=run / "model.safetensors")
    assert model.size == (30, 12) and model.points is None
    assert json.loads(model.trained_on)["images"] == 24
    assert weights(run)["seen"].sum() == 12 * 24  # buffers that the loss changes are kept
    dataset = open_dataset(crops)
    query, gallery = (extract(model, split, progress=False) for split in (dataset.query, dataset.gallery))
    assert evaluate(query, gallery).mAP > 0.8


def test_an_interrupted_run_and_other_workers_end_in_the_same_weights(crops, tmp_path):
    whole = train(config(crops, tmp_path / "whole"))
    other = replace(config(crops, tmp_path / "other", epochs=3), image=ImageConfig(workers=2))
    stopped = []

    def stop(*args, **kwargs):
        stopped.append(1)
        if len(stopped) == 2:
            raise KeyboardInterrupt
        return saved(*args, **kwargs)

    saved = module._save
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_save", stop)
        train(other)
    train(other)
    assert_same_weights(whole, tmp_path / "other")


def test_a_feature_is_the_mean_of_image_and_mirror_image(crops):
    model, split = create_model("tiny").eval(), open_crops(crops).query
    features = extract(model, split, progress=False)
    assert features.feats.shape == (3, 16) and features.names == split.names and not model.training
    pixels = torch.stack([split[i][0] for i in range(3)]).float() / 255  # 256 x 128, another size
    model.size = (256, 128)
    again = extract(model, split, progress=False)
    with torch.no_grad():
        both = model(pixels) + model(pixels.flip(3))
    np.testing.assert_allclose(again.feats, F.normalize(both).numpy(), atol=1e-6)
    assert again.made_by != features.made_by
    model.flip = False
    with torch.no_grad():
        alone = F.normalize(model(pixels)).numpy()
    np.testing.assert_allclose(extract(model, split, progress=False).feats, alone, atol=1e-6)


def test_the_backbone_learns_more_slowly(crops, tmp_path):
    """One step of plain gradient descent: what the backbone moves by scales with backbone_lr, all else stays."""

    def moved(share):
        how = {"optimizer": "sgd", "lr": 1e-3, "weight_decay": 0.0, "epochs": 1, "batch": 24, "backbone_lr": share}
        run = train(config(crops, tmp_path / str(share), **how))
        torch.manual_seed(0)
        start = create_model("tiny", 6).state_dict()
        return {name: tensor - start[name] for name, tensor in weights(run).items()}

    whole, tenth = moved(1.0), moved(0.1)
    torch.testing.assert_close(tenth["conv.weight"], whole["conv.weight"] / 10, rtol=1e-2, atol=1e-7)
    torch.testing.assert_close(tenth["classifier.weight"], whole["classifier.weight"])
    assert whole["conv.weight"].abs().max() > 1e-5


def test_milestones():
    rates = [learning_rate(1.0, epoch, 10, "step", [3, 7]) for epoch in (0, 2, 3, 6, 7, 9)]
    np.testing.assert_allclose(rates, [1, 1, 0.1, 0.1, 0.01, 0.01])
    np.testing.assert_allclose([learning_rate(1.0, epoch, 10, "step") for epoch in (7, 8, 9)], [1, 0.1, 0.1])
    for stones, schedule in (([7, 3], "step"), ([0], "step"), ([3, 3], "step"), ([3], "cosine")):
        with pytest.raises(ValueError, match=r"train.milestones must be ascending epochs, with train.schedule step"):
            TrainConfig("d", "o", train=OptimConfig(schedule=schedule, milestones=stones))
    assert read_config("plr_osnet", ["--data", "d", "--out", "o"]).train.milestones == [60, 90]


def test_plain_adam_has_no_amsgrad(crops):
    model = Tiny(2)
    for name, amsgrad in (("adam", True), ("plain_adam", False)):
        optimizer = module._optimizer(OptimConfig(optimizer=name), model)
        assert isinstance(optimizer, torch.optim.Adam) and optimizer.defaults["amsgrad"] is amsgrad


def test_validation_uses_the_models_own_matcher(crops, tmp_path):
    found = {}
    for name in ("tiny", "matcher"):
        settings = replace(config(crops, tmp_path / name, name), validation=ValidationConfig(0.5, 3))
        found[name] = lines(train(settings))[-1]["mAP"]
    assert found["matcher"] < found["tiny"] - 0.2
    query = extract(Tiny(), open_crops(crops).query, progress=False)
    assert pair_scores(Tiny(), query, query) is None and pair_scores(Matcher(), query, query).shape == (3, 3)


class Frozen(Tiny):
    """Its norm does not learn statistics, and another has some in the loss alone."""

    def __init__(self, num_classes: int = 0) -> None:
        super().__init__(num_classes)
        self.late = nn.BatchNorm1d(16)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self

    def loss(self, output, labels):
        return {"loss": F.cross_entropy(output.logits[0], labels) + self.late(output.feats[0]).square().sum()}


def test_averaged_weights_have_statistics_of_all_norms_that_learn_them(crops, tmp_path, monkeypatch):
    monkeypatch.setitem(models.MODELS, "frozen", Frozen)
    run = train(config(crops, tmp_path / "run", "frozen", average_from=0.5))
    model = create_model(weights=run / "model.safetensors")
    assert torch.equal(model.norm.running_var, torch.ones(16))  # as they began, not 0
    assert model.late.running_var.min() > 0 and model.late.running_mean.abs().max() > 0


def test_a_matcher_is_not_left_out_without_a_word(crops, tmp_path, capsys):
    run = train(config(crops, tmp_path / "run", "matcher"))
    assert main(["eval", str(run), str(crops)]) == 0
    assert main(["eval", str(run), str(crops), "--calibrate"]) == 2
    assert "--calibrate compares features, and matcher has its own matcher" in capsys.readouterr().err
    assert main(["search", "--query", str(crops), "--gallery", str(crops), "--weights", str(run)]) == 1
    assert "search compares features, and matcher has its own" in capsys.readouterr().err


def test_reranking_and_times_take_the_distances_of_a_matcher(crops, tmp_path, monkeypatch):
    """Scores that the features alone would not give, to the last digit."""
    run = train(config(crops, tmp_path / "run", "matcher"))
    taken = {}

    def keep(q, g, own=None, **more):
        taken["times" if own is not None and "seconds" in more else "other"] = own
        return tlift(q, g, own, **more)

    def keep_all(q, g, **more):
        taken["all"] = more["distances"]
        return rerank(q, g, **more)

    monkeypatch.setattr("reid3d.retrieval.tlift", keep)
    monkeypatch.setattr("reid3d.retrieval.rerank", keep_all)
    assert main(["eval", str(run), str(crops), "--rerank"]) == 0
    model, ds = create_model(weights=run / "model.safetensors"), open_crops(crops)
    q, g = (extract(model, split, progress=False) for split in (ds.query, ds.gallery))
    pairs = (q, q), (q, g), (g, g)
    assert all(np.allclose(got, Matcher().distances(*pair)) for got, pair in zip(taken["all"], pairs, strict=True))
    assert main(["eval", str(run), str(crops), "--tlift", "frames"]) == 0
    assert np.allclose(taken["times"], 1 - taken["all"][1]) and "other" not in taken


def test_search_among_photos_by_a_method_of_images(crops, tmp_path, capsys):
    run = train(config(crops, tmp_path / "run", epochs=6))
    words = ["--query", str(crops), "--gallery", str(crops), "--weights", str(run), "-k", "2"]
    assert main(["search", *words, "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["matches"]
    assert [len(one["matches"]) for one in found] == [2, 2, 2]


def test_what_does_not_go_together(crops, tmp_path, monkeypatch):
    clouds, out = write_people(tmp_path / "clouds", [3, 3, 3]), tmp_path / "run"
    cases = [
        (config(clouds, out), "tiny takes images, and .* holds clouds: give the folder of the images"),
        (config(crops, out, "ognet_small"), "ognet_small takes clouds, and .* holds images: reid3d convert"),
        (replace(config(crops, out), loss=LossConfig(triplet=TripletConfig(1.0))), "loss must be left out: tiny has"),
        (config(clouds, out, "ognet_small", backbone_lr=0.1), "train.backbone_lr are for 2D methods, got ognet_small"),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            train(settings)
        assert not out.exists()
    with pytest.raises(ValueError, match="model must take images, as .* holds, got one that takes clouds"):
        extract(create_model("ognet_small"), open_crops(crops).query)
    for name in ("erasing", "shift"):
        with pytest.raises(ValueError, match=f"image.{name} must be from 0 to 1, got 2"):
            TrainConfig("d", "o", image=ImageConfig(**{name: 2}))
    with pytest.raises(ValueError, match="image.height must be positive, got -1"):
        TrainConfig("d", "o", image=ImageConfig(height=-1))
