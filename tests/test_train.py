"""Training: resuming to the bit, balanced draws, schedules, what the run folder holds, and errors before any work."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from reid3d.cloud import PointCloud
from reid3d.config import (
    CircleConfig,
    CloudConfig,
    ContrastiveConfig,
    InstanceConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    SamplingConfig,
    TrainConfig,
    TripletConfig,
    ValidationConfig,
    dump_config,
    read_config,
    recipe_path,
    recipes,
)
from reid3d.data import open_dataset
from reid3d.data.samplers import BalancedSampler
from reid3d.io import Record, hold_folder, write_shard
from reid3d.losses import circle_loss, contrastive_loss, instance_loss, triplet_loss
from reid3d.models import Output, create_model, list_models
from reid3d.models.head import Head
from reid3d.train import learning_rate, train, warmup_factor

SIZE = (16, 8)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_people(
    root, counts, pids=None, conversion=None, name="bounding_box_train/{:04d}_c1s1_{:06d}_00.jpg", cameras=(1,)
):
    """A folder of clouds: person p has counts[p] clouds of one colour each person, with noise, from cameras in turn."""
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
            camera = cameras[i % len(cameras)]
            records.append(Record(name.format(max(pid, 0), i), "train", pid, camera, i, SIZE, (1.0, 0.0, 0.0), {}))
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

    def stop_in_the_second_epoch(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

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
def call(*args, **kwargs):
    global calls
    calls -= 1
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
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

    state = module._State(config(people, tmp_path), create_model("ognet_small", 3), torch.device("cpu"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            module._save(tmp_path, state, {})
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
    assert [warmup_factor(s, 10) for s in (1, 5, 10, 11)] == pytest.approx([0.19, 0.55, 1.0, 1.0])
    assert warmup_factor(1, 0) == 1.0
    steps = [learning_rate(2.0, e, 20, "step") for e in (0, 15, 16, 18, 19)]
    assert steps == pytest.approx([2.0, 2.0, 0.2, 0.2, 0.02])


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


class Tiny(torch.nn.Module):
    """Enough of a network to train: each point alone, the largest of each channel, the head."""

    inputs = "cloud"

    def __init__(self, num_classes=0, *, dropout=0.0):
        super().__init__()
        self.each = torch.nn.Linear(6, 16)
        self.head = Head(16, 8, num_classes, dropout)

    def forward(self, xyz, rgb):
        return self.head(self.each(torch.cat((xyz, rgb), 2)).relu().amax(1))


@pytest.fixture
def tiny(monkeypatch):
    import reid3d.models

    monkeypatch.setitem(reid3d.models.MODELS, "tiny", Tiny)


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    return write_people(tmp_path_factory.mktemp("crowd") / "data", [5, 4, 3, 4, 6], cameras=(1, 2))


def small(data, out, dropout=0.0, **optim):
    return replace(config(data, out, **optim), model=ModelConfig("tiny", {"dropout": dropout}))


def everything(data, out):
    """All that can be switched on."""
    return TrainConfig(
        str(data),
        str(out),
        ModelConfig("tiny", {"dropout": 0.3}),
        CloudConfig(points=64),
        SamplingConfig("pk", p=2, k=2),
        LossConfig(0.1, "dropped", CircleConfig(0.5), TripletConfig(1.0, None), instance=InstanceConfig(2.0)),
        OptimConfig(
            epochs=5,
            optimizer="adamw",
            schedule="step",
            warmup=1,
            warmup_of="lr",
            clip=1.0,
            precision="float16",
            average_from=0.5,
            device="cpu",
            tensorboard=True,
        ),
        ValidationConfig(0.4, 2),
    )


def figures(run):
    """The lines of metrics.jsonl, but for what the clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "clouds_per_second")} for line in lines]


def board(run, name):
    """(epoch, value) as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [(event.step, event.value) for event in EventAccumulator(str(run / "tensorboard")).Reload().Scalars(name)]


class TestEverything:
    def test_run_folder(self, crowd, tiny, tmp_path):
        run = train(everything(crowd, tmp_path / "run"))
        names = {"config.yaml", "metrics.jsonl", "checkpoint.pt", "tensorboard"}
        names |= {"model.safetensors", "model_last.safetensors", "model_best.safetensors"}
        assert names <= set(os.listdir(run))
        lines = figures(run)
        assert [sorted(line) for line in lines] == [
            sorted(["epoch", "loss", "cross_entropy", "circle", "triplet", "instance", "accuracy", "lr", *more])
            for more in ([], ["rank1", "mAP"], [], ["rank1", "mAP"], ["rank1", "mAP"])
        ]
        for line in lines:
            parts = line["cross_entropy"] + 0.5 * line["circle"] + line["triplet"] + 2 * line["instance"]
            assert line["loss"] == pytest.approx(parts, rel=1e-5)
        assert [line["lr"] for line in lines] == pytest.approx([1e-3] * 4 + [1e-4])
        for name in ("loss", "triplet", "mAP"):
            seen = board(run, name)
            told = [(line["epoch"], line[name]) for line in lines if name in line]
            assert [step for step, _ in seen] == [step for step, _ in told]
            assert [value for _, value in seen] == pytest.approx([value for _, value in told])

    def test_run_interrupted_at_any_file_ends_the_same(self, crowd, tiny, tmp_path, monkeypatch):
        def settings(out):
            part = everything(crowd, out)
            part.train.epochs, part.train.tensorboard = 3, False
            return part

        whole = train(settings(tmp_path / "whole"))
        names = ("model.safetensors", "model_last.safetensors", "model_best.safetensors")
        real, moment = os.replace, 0
        while True:
            moment, calls = moment + 1, []

            def stop(*args, moment=moment, calls=calls):
                calls.append(args)
                if len(calls) == moment:
                    raise KeyboardInterrupt
                return real(*args)

            run = tmp_path / str(moment)
            try:
                with monkeypatch.context() as patch:
                    patch.setattr(os, "replace", stop)
                    train(settings(run))
                break
            except KeyboardInterrupt:
                train(settings(run))
            assert_same_weights(run, whole)
            assert figures(run) == figures(whole)
            for name in names:
                ours, theirs = (load_file(folder / name) for folder in (run, whole))
                assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name
        assert moment > 9  # files: the config, of each epoch the weights and the checkpoint, the average and the last

    def test_a_run_that_was_thrown_away_leaves_nothing(self, crowd, tiny, tmp_path):
        run = train(everything(crowd, tmp_path / "run"))
        (run / "checkpoint.pt").unlink()
        train(small(crowd, run, epochs=1))
        assert not (run / "model_last.safetensors").exists() and not (run / "model_best.safetensors").exists()

    def test_run_interrupted_in_a_step_ends_the_same(self, crowd, tiny, tmp_path, monkeypatch):
        import reid3d.train as module

        whole = train(everything(crowd, tmp_path / "whole"))
        real = module.triplet_loss
        for moment in (6, 9):  # of 3 steps an epoch: the last of epoch 2, the last of epoch 3
            calls = []

            def stop(*args, moment=moment, calls=calls, **kwargs):
                calls.append(1)
                if len(calls) == moment:
                    raise KeyboardInterrupt
                return real(*args, **kwargs)

            run = tmp_path / str(moment)
            with monkeypatch.context() as patch:
                patch.setitem(module.METRIC_LOSSES, "triplet", stop)
                with pytest.raises(KeyboardInterrupt):
                    train(everything(crowd, run))
            train(everything(crowd, run))
            assert_same_weights(run, whole)
            assert figures(run) == figures(whole)
            assert board(run, "loss") == board(whole, "loss")

    def test_run_killed_between_the_average_and_the_last_weights_ends_the_same(self, crowd, tmp_path):
        def settings(out):
            part = everything(crowd, out)
            part.train.epochs, part.train.tensorboard = 2, False
            return replace(part, model=ModelConfig("ognet_small", {"init_points": 32, "k": 4}))

        whole, run = train(settings(tmp_path / "whole")), tmp_path / "killed"
        (tmp_path / "recipe.yaml").write_text(dump_config(settings(run)))
        # Of config, weights, checkpoint, then weights, best, checkpoint, average, last.
        command = [sys.executable, "-c", KILLED, str(tmp_path / "recipe.yaml"), "file", "replace", "8"]
        assert subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode == -signal.SIGKILL
        assert not (run / "model_last.safetensors").exists()
        train(settings(run))
        assert_same_weights(run, whole)
        for name in ("model", "model_last", "model_best"):
            ours, theirs = (load_file(folder / f"{name}.safetensors") for folder in (run, whole))
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


class TestLosses:
    def test_settings_reach_the_losses(self):
        from reid3d.train import _losses

        rng = torch.Generator().manual_seed(0)
        feats, dropped, logits = (torch.randn(8, width, generator=rng) for width in (5, 5, 3))
        labels = torch.tensor([0, 0, 1, 1, 2, 2, 0, 1])
        circle, triplet = CircleConfig(1.0, 0.1, 32.0, "batch"), TripletConfig(0.5, None)
        settings = LossConfig(0.2, "clean", circle, triplet, ContrastiveConfig(2.0, 1.5), InstanceConfig(3.0, 8.0))
        for features in ("clean", "dropped"):
            seen = dropped if features == "dropped" else feats
            found = _losses(replace(settings, features=features), Output(feats, logits, dropped), labels)
            expected = {
                "cross_entropy": torch.nn.CrossEntropyLoss(label_smoothing=0.2)(logits, labels),
                "circle": circle_loss(seen, labels, margin=0.1, gamma=32.0, over="batch"),
                "triplet": triplet_loss(seen, labels, margin=None),
                "contrastive": contrastive_loss(seen, labels, margin=1.5),
                "instance": instance_loss(seen, labels, scale=8.0),
            }
            assert found == expected
        assert list(_losses(LossConfig(), Output(feats, logits), labels)) == ["cross_entropy"]
        with pytest.raises(ValueError, match="loss.features must be clean for this model"):
            _losses(replace(settings, features="dropped"), Output(feats, logits), labels)

    def test_the_head_hands_out_what_its_classifier_sees(self):
        head = Head(6, 200, 3, dropout=0.7)
        output = head(torch.randn(4, 6))
        kept = output.dropped != 0
        assert 0.2 < kept.float().mean() < 0.4
        torch.testing.assert_close(output.dropped[kept], output.feats[kept] / 0.3)
        torch.testing.assert_close(output.logits, head.classifier(output.dropped))


class TestOptimisation:
    @pytest.mark.parametrize("clip, precision", [(1e-3, "float32"), (1e-3, "float16"), (0.0, "float32")])
    def test_clipped_nesterov_step_by_hand(self, clip, precision, people, tiny, tmp_path):
        """In the first step the velocity is the gradient g, and the step lr * (g + 0.9 g)."""
        how = {"optimizer": "sgd", "lr": 0.5, "weight_decay": 0.0, "warmup": 0}
        settings = small(people, tmp_path / "run", epochs=1, batch=12, clip=clip, precision=precision, **how)
        torch.manual_seed(0)
        before = create_model("tiny", 3).state_dict()
        after = weights(train(settings))
        names = [name for name in before if "running" not in name and "num_batches" not in name]
        step = math.sqrt(sum((after[name] - before[name]).square().sum() for name in names))
        if clip:
            assert step == pytest.approx(0.5 * 1.9 * clip, rel=2e-3)
        else:
            assert step > 0.5 * 1.9 * 1e-3

    def test_warmup_of_the_rate(self, people, tiny, tmp_path, monkeypatch):
        """Of three steps an epoch."""
        rates = []
        real = torch.optim.SGD.step
        monkeypatch.setattr(
            torch.optim.SGD, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or real(self)
        )
        how = {"optimizer": "sgd", "warmup": 2, "warmup_of": "lr", "lr": 1.0, "schedule": "step"}
        train(small(people, tmp_path / "run", epochs=4, **how))
        ramp = [0.1 + 0.9 * step / 6 for step in range(1, 7)]
        assert rates == pytest.approx(ramp + [1.0] * 6)

    @pytest.mark.parametrize("precision", ["bfloat16", "float16"])
    def test_half_precision(self, precision, people, tiny, tmp_path):
        runs = [train(small(people, tmp_path / p, precision=p)) for p in ("float32", precision)]
        exact, half = (weights(run) for run in runs)
        assert all(value.dtype in (torch.float32, torch.int64) for value in half.values())
        assert any(not torch.equal(half[name], exact[name]) for name in exact)  # autocast had its say
        for line, other in zip(*map(figures, runs), strict=True):
            assert line["loss"] == pytest.approx(other["loss"], rel=0.05)
        scaler = torch.load(runs[1] / "checkpoint.pt", weights_only=True)["scaler"]
        assert ("scale" in scaler) == (precision == "float16")

    @pytest.mark.parametrize("sampling", [SamplingConfig("class", n=2), SamplingConfig("pk", p=3, k=2)])
    def test_samplings_train(self, sampling, people, tiny, tmp_path):
        run = train(replace(small(people, tmp_path / "run", epochs=1), sampling=sampling))
        assert len(figures(run)) == 1


class TestAverage:
    def test_average_of_the_last_epochs_with_statistics_of_one_more(self, people, tiny, tmp_path, monkeypatch):
        import reid3d.train as module

        seen, real = [], module._save

        def save(run, state, about):
            seen.append({name: value.clone() for name, value in state.model.state_dict().items()})
            real(run, state, about)

        monkeypatch.setattr(module, "_save", save)
        settings = small(people, tmp_path / "run", epochs=5, average_from=0.5)
        run = train(settings)
        average, last = (create_model(weights=run / f"{n}.safetensors", num_classes=3) for n in ("model", "model_last"))
        for name, value in last.state_dict().items():
            assert torch.equal(value, weights(run)[name])
        for name, _ in average.named_parameters():  # from 50 % on: epochs 4 and 5 of 5 (index 2.5 and later)
            expected = torch.stack([epoch[name] for epoch in seen[3:]]).mean(0)
            torch.testing.assert_close(average.get_parameter(name), expected)
        split = open_dataset(people).train
        feed = module._Feed(settings, split, module._Team(torch.device("cpu")), None)
        batches = [inputs for inputs, _ in feed.epoch(5)]
        oracle = create_model(weights=run / "model.safetensors", num_classes=3)

        class Taking(torch.nn.Module):  # update_bn hands on the first of what the loader gives
            def __init__(self):
                super().__init__()
                self.inner = oracle

            def forward(self, clouds):
                return self.inner(*clouds)

        torch.optim.swa_utils.update_bn([[clouds] for clouds in batches], Taking())
        for name in ("head.norm.running_mean", "head.norm.running_var"):
            torch.testing.assert_close(average.state_dict()[name], oracle.state_dict()[name])
            assert not torch.equal(average.state_dict()[name], last.state_dict()[name])

    def test_a_share_as_published(self):
        from reid3d.train import _average, _State

        for epochs, count in ((1500, 150), (1000, 100), (600, 60)):
            part = OptimConfig(epochs=epochs, average_from=0.9)
            state = _State(TrainConfig("d", "o", train=part), torch.nn.Linear(1, 1, bias=False), torch.device("cpu"))
            for epoch in range(epochs):
                state.model.weight.data.fill_(epoch)
                _average(state, epoch, part)
            assert state.average["weight"].item() == pytest.approx(epochs - 1 - (count - 1) / 2)


class TestValidation:
    def test_people_held_out_are_ranked_and_not_learnt(self, crowd, tiny, tmp_path):
        import reid3d
        from reid3d.data import EvalTransform

        settings = replace(small(crowd, tmp_path / "run", epochs=5), validation=ValidationConfig(0.4, 2))
        run = train(settings)
        lines = figures(run)
        assert [line["epoch"] for line in lines if "mAP" in line] == [2, 4, 5]
        split = open_dataset(crowd).train
        held = np.random.default_rng((5, 0)).choice(5, 2, replace=False)
        rest = split.subset(np.flatnonzero(np.isin(split.labels, held))).with_transform(EvalTransform(96))
        best = create_model(weights=run / "model_best.safetensors", num_classes=3)  # 3 of 5 are learnt
        feats = reid3d.extract(best, rest, progress=False)
        assert reid3d.evaluate(feats, feats).mAP == pytest.approx(max(line["mAP"] for line in lines if "mAP" in line))

    def test_a_cloud_does_not_find_itself(self, tmp_path):
        from reid3d.train import _splits

        data = write_people(tmp_path / "data", [2, 2, 2, 2], cameras=(-1,))
        settings = replace(config(data, tmp_path / "run"), validation=ValidationConfig(0.5))
        split, held = _splits(settings)
        assert len(split) == len(held) == 4 and split.num_pids == held.num_pids == 2
        assert len(set(held.camids)) == 4 and -1 not in held.camids

    @pytest.mark.parametrize(
        ("share", "cameras", "message"),
        [
            (0.2, (1, 2), "validation.share must hold out at least 2 of the 5 people .* and leave 2, got 0.2"),
            (0.8, (1, 2), "validation.share must hold out at least 2 of the 5 people .* and leave 2, got 0.8"),
            (0.4, (1,), "validation.share: of the people held out, .* have no match from another camera"),
        ],
    )
    def test_errors(self, share, cameras, message, tmp_path):
        data = write_people(tmp_path / "data", [5, 4, 3, 4, 6], cameras=cameras)
        settings = replace(config(data, tmp_path / "run"), validation=ValidationConfig(share))
        with pytest.raises(ValueError, match=message):
            train(settings)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("counts", "change", "message"),
    [
        ([3, 3, 1], {"sampling": SamplingConfig("pk", p=3, k=2)}, "sampling.p must not exceed the 2 identities"),
        ([1] * 6, {"sampling": SamplingConfig("pk", p=2, k=2)}, "sampling.p must not exceed the 0 identities"),
        ([1] * 6, {"loss": LossConfig(triplet=TripletConfig(1.0))}, "metric losses need people with at least 2 clouds"),
        ([2] * 2, {"sampling": SamplingConfig("class", n=1)}, None),
    ],
)
def test_batches_that_cannot_hold_pairs(counts, change, message, tiny, tmp_path):
    settings = replace(small(write_people(tmp_path / "data", counts), tmp_path / "run", epochs=1), **change)
    if message is None:
        train(settings)
    else:
        with pytest.raises(ValueError, match=message):
            train(settings)
        assert not (tmp_path / "run").exists()


def test_no_tensorboard(people, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="train.tensorboard needs TensorBoard: pip install tensorboard"):
        train(config(people, tmp_path / "run", tensorboard=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cloud_that_is_no_number_is_named(workers, people, tiny, tmp_path):
    import safetensors.numpy

    data = tmp_path / "data"
    shutil.copytree(people, data)
    path = data / "train-00000.safetensors"
    content = bytearray(path.read_bytes())
    tensors = safetensors.numpy.load(bytes(content))
    length = int.from_bytes(content[:8], "little")
    at = 8 + length + json.loads(content[8 : 8 + length])["xyz"]["data_offsets"][0]
    content[at : at + 3 * tensors["xyz"].itemsize] = np.full(3, np.nan, tensors["xyz"].dtype).tobytes()
    path.write_bytes(content)
    settings = small(data, tmp_path / "run", workers=workers)
    with pytest.raises(ValueError, match="bounding_box_train/0001_c1s1_000000_00.jpg.*xyz must be finite"):
        train(settings)


def test_processes_see_what_one_with_the_whole_batch_sees(crowd, tmp_path):
    from reid3d.train import _Feed, _Team

    split, device = open_dataset(crowd).train, torch.device("cpu")
    parts = [_Feed(config(crowd, "o", batch=3), split, _Team(device, rank, 2), None) for rank in range(2)]
    whole = _Feed(config(crowd, "o", batch=6, workers=2), split, _Team(device), None)
    for epoch in (0, 3):
        feeds = [[(*inputs, labels) for inputs, labels in feed.epoch(epoch)] for feed in (whole, *parts)]
        batches = list(zip(*feeds, strict=True))
        assert len(batches) == 3
        for one, *shares in batches:
            for value, *shared in zip(one, *shares, strict=True):
                assert torch.equal(value, torch.cat(shared))


def test_two_processes_train_as_one(tmp_path):
    """torchrun: half of each batch each, and the norms, metric losses, clipping and averages of the whole."""
    data = write_people(tmp_path / "data", [4, 4, 3, 4, 6, 3, 4, 2], cameras=(1, 2))

    def settings(out, p):
        loss = LossConfig(0.1, circle=CircleConfig(1.0), triplet=TripletConfig(1.0))
        how = {"optimizer": "sgd", "lr": 0.02, "clip": 2.0, "average_from": 0.5, "epochs": 2, "warmup_of": "lr"}
        settings = config(data, out, **how)
        # Of its last graph, in feature space, each point is in all neighbourhoods: rounding decides on none.
        settings.model.kwargs |= {"dropout": 0.0, "k": 8}
        return replace(
            settings, loss=loss, sampling=SamplingConfig("pk", p=p, k=2), validation=ValidationConfig(0.3, 1)
        )

    one = train(settings(tmp_path / "one", 4))
    two = tmp_path / "two"
    (tmp_path / "recipe.yaml").write_text(dump_config(settings(two, 2)))
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", "localhost:0", "-m", "reid3d", "train", str(tmp_path / "recipe.yaml")]
    result = subprocess.run(
        [sys.executable, *launch], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{two}\n"
    for line, other in zip(figures(one), figures(two), strict=True):
        assert line == pytest.approx(other, rel=1e-3)
    assert weights(one).keys() == weights(two).keys()
    for name in ("model", "model_last"):
        ours, theirs = (create_model(weights=run / f"{name}.safetensors").state_dict() for run in (one, two))
        for key, value in ours.items():
            torch.testing.assert_close(theirs[key], value, rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
    with pytest.raises(ValueError, match="was trained by 2 processes, got 1"):
        train(settings(two, 2))


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


# Of the README of layumi/person-reid-3d: data, model, gamma of the circle loss, Rank-1, mAP, batch, learning rate,
# epochs, sampling, start of the average, weight decay. Duke's OG-Net-Small has --class without a value there.
SYNTH = {"synth_plr_osnet", "synth_relation_s", "synth_rmgl", "synth_qaconv50"}
PAPERS = {"plr_osnet", "plr_osnet_cuhk", "relation_s", "relation_f", "rmgl", "qaconv50", "qaconv152", "qaconv50_ibn_b"}
METHODS = SYNTH | PAPERS
PUBLISHED = """\
market ognet - 86.82 69.02 36 1e-3 1500 class:3 0.9 5e-4
market ognet 64 87.80 70.56 36 1e-3 1500 balanced 0.9 5e-4
market ognet_small - 86.79 67.92 36 1e-3 1000 balanced 0.9 5e-4
market ognet_small 64 87.38 70.48 36 1e-3 1500 balanced 0.9 5e-4
market ognet_deep 64 88.81 72.91 30 6e-4 1000 balanced - 5e-4
duke ognet_small - 77.33 57.74 36 1e-3 1000 class:1 0.9 5e-4
duke ognet_small 32 77.15 58.51 36 1e-3 1000 balanced 0.9 5e-4
duke ognet - 76.53 57.92 36 1e-3 1000 class:1 0.9 5e-4
duke ognet 64 78.37 60.07 36 1e-3 1000 balanced 0.9 5e-4
duke ognet_deep - 76.97 59.23 36 6e-4 1000 balanced - 5e-4
duke ognet_deep 64 78.50 60.70 36 6e-4 1000 balanced - 5e-4
cuhk ognet - 44.00 39.28 36 8e-4 1000 class:1 - 1e-3
cuhk ognet 96 48.29 43.73 36 1e-3 1000 class:3 - 1e-3
cuhk ognet_small - 43.07 38.06 36 1e-3 1000 class:1 - 1e-3
cuhk ognet_small 64 46.43 41.79 36 8e-4 1000 balanced - 1e-3
cuhk ognet_deep - 45.71 41.15 36 6e-4 1500 class:3 - 5e-4
cuhk ognet_deep 64 49.43 45.71 36 6e-4 1500 balanced - 5e-4
msmt ognet - 44.27 21.57 36 6e-4 600 balanced 0.9 5e-4
msmt ognet 64 45.28 22.81 36 6e-4 600 balanced 0.9 5e-4
msmt ognet_small - 42.44 20.31 36 6e-4 600 class:1 0.9 5e-4
msmt ognet_small 64 43.84 21.79 36 6e-4 600 balanced 0.9 5e-4
msmt ognet_deep - 44.56 21.41 30 4e-4 600 balanced - 5e-4
msmt ognet_deep 64 47.32 24.07 30 4e-4 600 balanced - 5e-4"""


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
        with pytest.raises(ValueError, match="train.optimizer must be one of adam, plain_adam, adamw, sgd, got 'adma'"):
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
        with pytest.raises(
            ValueError, match="one of demo, ognet_circle_cuhk, .*, synth, synth_plr_osnet, .*, synth_rmgl, got"
        ):
            recipe_path("demonstration")

    @pytest.mark.parametrize("name", ["demo", "ognet_deep_market", "ognet_strong", "synth"])
    def test_packaged_recipes(self, name):
        assert name in recipes()
        read = read_config(name, ["--data", "d", "--out", "o"])
        create_model(read.model.name, 2, **read.model.kwargs)

    def test_the_strong_recipe(self):
        read = read_config("ognet_strong", ["--data", "d", "--out", "o"])
        assert read.model == ModelConfig("ognet", {"grouping": "spread"})
        assert (read.sampling.kind, read.batch, read.train.warmup_of) == ("pk", 36, "lr")
        assert (read.loss.features, read.loss.circle.over) == ("clean", "anchors")
        assert min(read.loss.circle.weight, read.loss.triplet.weight, read.train.clip) > 0
        assert not read.cloud.scale and read.loss.label_smoothing == 0

    def test_recipes_of_2d_methods(self):
        for name in sorted(METHODS):
            read = read_config(name, ["--data", "d", "--out", "o"])
            model = name.removeprefix("synth_").removesuffix("_cuhk")
            assert read.model.name == model and model in list_models()
            with torch.device("meta"):
                assert create_model(model, 5, **read.model.kwargs).inputs == "image"
            first = recipe_path(name).read_text().splitlines()
            assert name.startswith("synth_") or first[1].startswith("# Published, Rank-1 / mAP (%): ")

    @pytest.mark.parametrize("row", PUBLISHED.split("\n"), ids=lambda row: "_".join(row.split()[:2]))
    def test_published_recipes(self, row):
        data, name, gamma, rank1, mean, batch, lr, epochs, sampling, average, decay = row.split()
        recipe = f"{name}_{'' if gamma == '-' else 'circle_'}{data}"
        read = read_config(recipe, ["--data", "d", "--out", "o"])
        assert recipe_path(recipe).read_text().splitlines()[0].endswith(f"Published: Rank-1 {rank1}, mAP {mean} (%).")
        kind, _, n = sampling.partition(":")
        circle = CircleConfig() if gamma == "-" else CircleConfig(1.0, 0.25, float(gamma), "batch")
        assert read == TrainConfig(
            "d",
            "o",
            ModelConfig(name),
            CloudConfig(points=4096, workers=4),
            SamplingConfig(kind, n=int(n or 3)),
            LossConfig(features="clean" if gamma == "-" else "dropped", circle=circle),
            OptimConfig(
                epochs=int(epochs),
                batch=int(batch),
                lr=float(lr),
                weight_decay=float(decay),
                average_from=1.0 if average == "-" else float(average),
                # what all of the published recipes have
                optimizer="adam",
                schedule="cosine",
                warmup=10,
                warmup_of="loss",
                clip=0.0,
                precision="float32",
            ),
        )
        create_model(read.model.name, 2, **read.model.kwargs)

    def test_there_are_no_other_recipes(self):
        rows = [row.split() for row in PUBLISHED.split("\n")]
        published = {f"{name}_{'' if gamma == '-' else 'circle_'}{data}" for data, name, gamma, *_ in rows}
        assert len(published) == 23
        assert set(recipes()) == published | METHODS | {"demo", "ognet_deep_market", "ognet_strong", "synth"}
