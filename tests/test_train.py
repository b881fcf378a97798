"""Training: resuming to the bit, balanced draws, schedules, what the run folder holds, and errors before any work."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from reid3d.cloud import PointCloud
from reid3d.config import (
    CircleConfig,
    CloudConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    dump_config,
    read_config,
    recipe_path,
    recipes,
)
from reid3d.data.samplers import BalancedSampler
from reid3d.io import Record, hold_folder, write_shard
from reid3d.models import create_model
from reid3d.train import learning_rate, loss_factor, train

SIZE = (16, 8)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_people(root, counts, pids=None, conversion=None, name="bounding_box_train/{:04d}_c1s1_{:06d}_00.jpg"):
    """A folder of clouds: person p has counts[p] clouds of one colour each person, with noise."""
    rng = np.random.default_rng(0)
    root.mkdir()
    clouds, records = [], []
    n = SIZE[0] * SIZE[1]
    for person, count in enumerate(counts):
        colour = rng.integers(40, 215, 3)
        pid = person + 1 if pids is None else pids[person]
        for i in range(count):
            xyz = (rng.random((n, 3)) - 0.5) * (0.6, 1.6, 0.3)
            rgb = (colour + rng.integers(-40, 40, (n, 3))).astype(np.uint8)
            clouds.append(PointCloud(xyz.astype(np.float32), rgb, np.full(n, -1, np.int32)))
            records.append(Record(name.format(max(pid, 0), i), "train", pid, 1, i, SIZE, (1.0, 0.0, 0.0), {}))
    write_shard(root / "train-00000.safetensors", clouds, records, config=conversion or {})
    return root


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return write_people(tmp_path_factory.mktemp("people") / "data", [5, 4, 3])


def config(data, out, epochs=3, workers=0, **optim):
    return TrainConfig(
        data=str(data),
        out=str(out),
        model=ModelConfig("ognet_small", {"init_points": 32, "k": 4}),
        cloud=CloudConfig(points=96, workers=workers),
        train=OptimConfig(**{"epochs": epochs, "batch": 4, "warmup": 1, "device": "cpu", **optim}),
    )


def weights(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)["model"]


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.fixture(scope="module")
def whole_run(people, tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run = train(config(people, tmp_path_factory.mktemp("runs") / "whole"))
    torch.set_num_threads(threads)
    return run


def test_run_folder(people, whole_run):
    lines = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) and 0 <= line["accuracy"] <= 1 for line in lines)
    assert read_config(str(whole_run / "config.yaml")) == config(people, whole_run)
    model = create_model(weights=whole_run / "model.safetensors", num_classes=3)
    for key, value in weights(whole_run).items():
        assert torch.equal(model.state_dict()[key], value)
    assert not list(whole_run.glob("*.tmp")) and not list(whole_run.glob(".*.tmp"))


def test_learns(people, tmp_path):
    settings = config(people, tmp_path / "run", epochs=10, batch=12)
    settings.model.kwargs["dropout"] = 0.0
    run = train(settings)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(math.log(3), abs=1e-3)  # the classifier starts at nothing
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]


def test_same_seed_same_weights_and_another_seed_others(people, whole_run, tmp_path):
    torch.rand(7)  # the caller's generator has no part in it
    before = torch.get_rng_state()
    again = train(config(people, tmp_path / "again"))
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_weights(again, whole_run)
    other = weights(train(config(people, tmp_path / "other", seed=1)))
    assert any(not torch.equal(other[key], value) for key, value in weights(whole_run).items())


def test_workers_do_not_matter(people, whole_run, tmp_path):
    assert_same_weights(train(config(people, tmp_path / "run", workers=2)), whole_run)


def test_interrupted_run_ends_in_the_same_weights(people, whole_run, tmp_path, monkeypatch):
    import reid3d.train as module

    real, calls = module.F.cross_entropy, []

    def stop_in_the_second_epoch(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module.F, "cross_entropy", stop_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        train(config(people, tmp_path / "run"))
    monkeypatch.undo()
    run = tmp_path / "run"
    assert torch.load(run / "checkpoint.pt", weights_only=True)["epoch"] == 1
    create_model(weights=run / "model.safetensors")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2, "lo')  # as a kill in the middle of the line leaves it
    train(config(people, run))
    assert_same_weights(run, whole_run)
    assert [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


KILLED = """
import os, signal, sys, torch
from torch.nn import functional
torch.set_num_threads(1)
module, name, calls = {"step": functional, "file": os}[sys.argv[2]], sys.argv[3], int(sys.argv[4])
real = getattr(module, name)
def call(*args):
    global calls
    calls -= 1
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
setattr(module, name, call)
from reid3d.config import read_config
from reid3d.train import train
train(read_config(sys.argv[1]))
"""


@pytest.mark.parametrize(
    "moment",
    [
        ("step", "cross_entropy", 5),  # the second of the three steps of epoch 2
        ("file", "replace", 5),  # of config, weights, checkpoint, weights, checkpoint: weights of epoch 2 are there
    ],
)
def test_killed_run_ends_in_the_same_weights(moment, people, whole_run, tmp_path):
    """kill -9; the same command again finishes the job."""
    run = tmp_path / "killed"
    (tmp_path / "recipe.yaml").write_text(dump_config(config(people, run)))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "recipe.yaml"), *map(str, moment)]
    assert subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode == -signal.SIGKILL
    assert torch.load(run / "checkpoint.pt", weights_only=True)["epoch"] == 1
    command[-1] = "0"
    result = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "going on after epoch 1 of 3" in result.stderr
    assert_same_weights(run, whole_run)


def test_finished_run_is_left_alone(people, whole_run, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in whole_run.glob("*.[ps]*t*")}
    assert train(config(people, whole_run)) == whole_run
    assert "already trained for 3 epochs" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in whole_run.glob("*.[ps]*t*")} == before


def test_run_of_another_config(people, whole_run):
    with pytest.raises(ValueError, match=r"another config \(train.lr was 0.001 and is 0.002\)"):
        train(config(people, whole_run, lr=2e-3))


@pytest.mark.parametrize("counts, conversion", [([5, 4, 3, 2], {}), ([5, 4, 3], {"fitter": "another"})])
def test_run_of_other_clouds(counts, conversion, whole_run, tmp_path):
    with pytest.raises(ValueError, match="trained on other clouds"):
        train(config(write_people(tmp_path / "data", counts, conversion=conversion), whole_run))


def test_clouds_of_any_name(tmp_path):
    data = write_people(tmp_path / "data", [3, 3], name="bounding_box_train/{}_c1_{}\udcff.jpg")
    assert (train(config(data, tmp_path / "run", epochs=1)) / "checkpoint.pt").exists()


def test_a_folder_is_claimed_by_its_first_checkpoint(people, tmp_path, monkeypatch):
    """What stops before it, a typo or Ctrl-C, leaves the folder free for another config."""
    import reid3d.train as module

    run, settings = tmp_path / "run", config(people, tmp_path / "run", epochs=1)
    with pytest.raises(ValueError, match="name must be one of"):
        train(replace(settings, model=ModelConfig("ognet-small")))
    with pytest.raises(ValueError, match="init_points must leave"):
        train(replace(settings, model=ModelConfig("ognet_small", {"init_points": 32})))
    with pytest.raises(ValueError, match="cloud.points must be at least 32 for this model, got 31"):
        train(replace(settings, cloud=CloudConfig(points=31)))
    assert not run.exists()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_train_epoch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    assert (run / "config.yaml").exists()
    train(config(people, run, epochs=1, lr=2e-3))
    assert read_config(str(run / "config.yaml")).train.lr == 2e-3


def test_a_full_disk_is_named(people, tmp_path):
    import reid3d.train as module

    model = create_model("ognet_small", 3)
    optimizer = torch.optim.Adam(model.parameters())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            module._save(tmp_path, model, optimizer, "", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(tmp_path / "checkpoint.pt")
    assert os.listdir(tmp_path) == []


def test_two_processes_cannot_train_in_one_folder(people, tmp_path):
    (tmp_path / "run").mkdir()
    with hold_folder(tmp_path / "run", "a test"), pytest.raises(BlockingIOError, match="another training is writing"):
        train(config(people, tmp_path / "run"))


def test_model_argument_of_the_wrong_kind_is_one_line_and_claims_nothing(people, tmp_path):
    with pytest.raises(ValueError, match="model.kwargs: k must be an int, got 'four'"):
        train(replace(config(people, tmp_path / "run"), model=ModelConfig("ognet_small", {"k": "four"})))
    assert not (tmp_path / "run").exists()


def test_broken_checkpoint(people, tmp_path):
    run = train(config(people, tmp_path / "run", epochs=1))
    whole = (run / "checkpoint.pt").read_bytes()
    for broken in (b"", b"nonsense", whole[: len(whole) // 2]):
        (run / "checkpoint.pt").write_bytes(broken)
        with pytest.raises(ValueError, match="checkpoint.pt cannot be read"):
            train(config(people, run, epochs=1))


@pytest.mark.parametrize(
    ("counts", "pids", "message"),
    [
        ([6], None, "at least 2 people"),
        ([], None, "at least 2 people"),
        ([1, 1, 1], None, "train.batch must not exceed the 3 clouds"),
        ([4, 4], [3, -1], "4 clouds have pid -1"),
    ],
)
def test_too_little_to_train_on(counts, pids, message, tmp_path):
    data = write_people(tmp_path / "data", counts, pids)
    with pytest.raises(ValueError, match=message):
        train(config(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_no_data_and_no_device(people, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(config(tmp_path / "nowhere", tmp_path / "run"))
    with pytest.raises(RuntimeError, match="device 'abacus' cannot be used"):
        train(config(people, tmp_path / "run", device="abacus"))


def test_loss_that_is_no_number_stops_before_the_checkpoint(people, tmp_path):
    with pytest.raises(RuntimeError, match="train.lr .* may be too high"):
        train(config(people, tmp_path / "run", lr=1e30))
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_schedules():
    assert [learning_rate(2.0, e, 4) for e in (0, 2, 4)] == pytest.approx([2.0, 1.01, 0.02])
    assert [loss_factor(s, 10) for s in (1, 5, 10, 11)] == pytest.approx([0.19, 0.55, 1.0, 1.0])
    assert loss_factor(1, 0) == 1.0


def test_adam_step_by_hand():
    """As published: weight decay is part of the gradient, and amsgrad keeps the largest second moment."""
    weight = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = torch.optim.Adam([weight], lr=0.1, weight_decay=0.5, amsgrad=True)
    w, m, v, top = 2.0, 0.0, 0.0, 0.0
    for step, gradient in enumerate((3.0, -0.1, 0.2), start=1):
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        g = gradient + 0.5 * w
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        top = max(top, v)
        w -= 0.1 * (m / (1 - 0.9**step)) / (math.sqrt(top / (1 - 0.999**step)) + 1e-8)
        assert weight.item() == pytest.approx(w)


class TestBalancedSampler:
    def test_each_identity_is_equally_likely(self):
        labels = np.repeat([7, 3, 9], [800, 100, 100])
        sampler = BalancedSampler(labels, seed=1)
        drawn, draws = np.array(list(sampler)).T
        assert draws.tolist() == list(range(1000))
        assert len(sampler) == len(drawn) == 1000
        counts = np.array([(labels[drawn] == label).sum() for label in (7, 3, 9)])
        assert (abs(counts - 1000 / 3) < 4 * math.sqrt(1000 * 2 / 9)).all()
        assert len(set(drawn)) < 1000  # with replacement

    def test_seed_and_epoch_decide(self):
        labels = np.arange(50) % 5
        sampler, twin = BalancedSampler(labels, seed=3), BalancedSampler(labels, seed=3)
        first = list(sampler)
        assert first == list(sampler) == list(twin)
        sampler.set_epoch(1)
        assert first != list(sampler)
        assert first != list(BalancedSampler(labels, seed=4))

    def test_errors(self):
        with pytest.raises(ValueError, match="non-empty"):
            BalancedSampler(np.array([], np.int64))
        with pytest.raises(ValueError, match="non-empty"):
            BalancedSampler(np.zeros((2, 2), np.int64))
        with pytest.raises(TypeError, match="integers"):
            BalancedSampler(np.array([0.5, 1.0]))
        with pytest.raises(ValueError, match="seed"):
            BalancedSampler(np.array([0, 1]), seed=-1)


class TestConfig:
    def test_recipe_and_overrides(self, tmp_path):
        path = tmp_path / "recipe.yaml"
        path.write_text("model: {name: ognet, kwargs: {k: 9}}\ntrain: {lr: 2e-3, epochs: 7}\n")
        read = read_config(str(path), ["--data", "d", "--out", "o", "--train.lr", "1e-3", "--cloud.flip", "false"])
        assert (read.model.name, read.model.kwargs, read.train.epochs) == ("ognet", {"k": 9}, 7)
        assert (read.train.lr, read.cloud.flip, read.data, read.out) == (1e-3, False, "d", "o")
        assert read.train.batch == OptimConfig().batch

    @pytest.mark.parametrize(
        ("text", "overrides", "message"),
        [
            ("train: {rate: 1}", [], "rate"),
            ("{}", ["--train.rate", "1"], "train.rate"),
            ("{}", ["--train.lr", "fast"], "train.lr"),
            ("{}", ["--train.lr", "0"], "train.lr must be positive"),
            ("{}", ["--train.batch", "1"], "train.batch must be at least 2"),
            ("{}", ["--cloud.workers", "-1"], "cloud.workers must not be negative"),
            ("{}", ["--train.seed", "99999999999999999999"], "train.seed must be less than 2\\*\\*63, got 9999"),
            ("loss: {circle: {wieght: 1}}", [], "wieght"),
            ("{}", ["--loss.circle.wieght", "1"], "loss.circle.wieght"),
            ("{}", ["--loss.circle.weight", "-1"], "loss.circle.weight must not be negative, got -1"),
            ("{}", ["--loss.circle.gamma", "0"], "loss.circle.gamma must be positive, got 0"),
            ("{}", ["--loss.circle.over", "all"], "loss.circle.over"),
            ("{}", ["--loss.triplet.margin", "-0.1"], "loss.triplet.margin must not be negative, got -0.1"),
            ("{}", ["--loss.label_smoothing", "1"], "loss.label_smoothing must be at least 0 and less than 1, got 1"),
            ("{}", ["--sampling.kind", "random"], "sampling.kind"),
            ("{}", ["--sampling.k", "1"], "sampling.k must be at least 2 .*, got 1"),
            ("{}", ["--sampling.n", "0"], "sampling.n must be positive, got 0"),
            ("{}", ["--train.clip", ".nan"], "train.clip must not be negative, got nan"),
            ("{}", ["--train.average_from", "1.1"], "train.average_from must be from 0 to 1, got 1.1"),
            ("{}", ["--validation.share", "1"], "validation.share must be at least 0 and less than 1, got 1"),
            ("model: [", [], "config"),
        ],
    )
    def test_errors(self, text, overrides, message, tmp_path):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            read_config(str(path), ["--data", "d", "--out", "o", *overrides])
        assert "\n" not in str(caught.value)

    def test_choices_are_checked_in_python_too(self):
        with pytest.raises(ValueError, match="train.optimizer must be one of adam, adamw, sgd, got 'adma'"):
            TrainConfig("d", "o", train=OptimConfig(optimizer="adma"))
        with pytest.raises(ValueError, match="loss.circle.over must be one of anchors, batch, got 'pairs'"):
            TrainConfig("d", "o", loss=LossConfig(circle=CircleConfig(over="pairs")))

    def test_parts_of_parts(self, tmp_path):
        path = tmp_path / "recipe.yaml"
        path.write_text(
            "loss: {circle: {weight: 1, over: batch}, triplet: {margin: null}}\nsampling: {kind: pk, k: 2}\n"
        )
        read = read_config(str(path), ["--data", "d", "--out", "o", "--loss.circle.gamma", "96", "--sampling.p", "8"])
        assert read.loss.circle == CircleConfig(1.0, 0.25, 96.0, "batch")
        assert (read.loss.triplet.margin, read.loss.triplet.weight, read.batch) == (None, 0.0, 16)
        path.write_text(dump_config(read))
        assert read_config(str(path)) == read
        assert read_config(str(path), ["--sampling.kind", "class"]).batch == OptimConfig().batch

    def test_data_and_out_are_needed(self):
        with pytest.raises(ValueError, match="required: .*out"):
            read_config(None, ["--data", "d"])

    def test_unknown_recipe(self):
        with pytest.raises(ValueError, match="one of demo, ognet_deep_market, ognet_market, ognet_small_market, synth"):
            recipe_path("demonstration")

    @pytest.mark.parametrize("name", ["demo", "ognet_deep_market", "ognet_market", "ognet_small_market", "synth"])
    def test_packaged_recipes(self, name):
        assert name in recipes()
        read = read_config(name, ["--data", "d", "--out", "o"])
        create_model(read.model.name, 2, **read.model.kwargs)
