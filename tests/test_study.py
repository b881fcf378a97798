"""Studies: tables of runs under the same conditions, that go on where they stopped; products by hand."""

import csv
import itertools
import json
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn

from reid3d import models, ops, studies, study, synth
from reid3d.cli import STUDIES, main
from reid3d.cloud import PointCloud
from reid3d.config import read_config
from reid3d.data import layouts, list_images, open_clouds, open_dataset
from reid3d.data.transforms import EvalTransform
from reid3d.io import hold_folder
from reid3d.models import create_model
from reid3d.preprocess.synth import TrueBodies, keep_person
from reid3d.retrieval import evaluate, extract, pair_scores, rerank, tlift
from reid3d.study import Row, Study, Trial, Turned, compare, macs, markdown, run_study
from tests.test_train import one_thread  # noqa: F401 (a fixture)
from tests.test_train_images import Tiny

CLOUDS = "model: {name: pointnet2_ssg, kwargs: {points: [16, 8]}}\ncloud: {points: 64, background: false}\n"
TRAINED = "train: {batch: 8, epochs: 1, warmup: 0}\n"


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(models.MODELS, "tiny", Tiny)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return synth(tmp_path_factory.mktemp("world"), preset="easy", ids=8, cams=2, tracklets=1, images=2, workers=1)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Recipes of a network of clouds and of a method of images."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "points.yaml").write_text(CLOUDS + TRAINED)
    (folder / "pixels.yaml").write_text(f"model: {{name: tiny}}\nimage: {{height: 32, width: 16}}\n{TRAINED}")
    return [str(folder / "points.yaml"), str(folder / "pixels.yaml")]


def test_one_table_of_2d_and_3d_that_goes_on_where_it_stopped(world, both, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = ["study", "compare", "--models", *both, "--data", str(world), "--out", str(out), "--seeds", "2"]
    trained, real = [], study.train

    def stop_at_the_last(config):
        trained.append(config.out)
        if len(trained) == 4:
            raise KeyboardInterrupt
        return real(config)

    monkeypatch.setattr(study, "train", stop_at_the_last)
    assert main(arguments) == 130 and len(trained) == 4
    assert main([*arguments, "--json", str(tmp_path / "table.json")]) == 0
    assert len(trained) == 5 and trained[4] == trained[3]  # what was done was not done again
    printed = capsys.readouterr().out
    table = json.loads((out / "compare.json").read_text())
    assert table == json.loads((tmp_path / "table.json").read_text())
    assert markdown(table) + "\n" == (out / "compare.md").read_text() and markdown(table) in printed
    points, pixels = table["rows"]
    assert (points["recipe"], points["inputs"], pixels["recipe"], pixels["inputs"]) == (
        *("points", "cloud"),
        *("pixels", "image"),
    )
    assert pixels["parameters"] == 3 * 9 * 16 + 16 + 2 * 16 and pixels["feature_size"] == 16
    assert pixels["macs"] == 15 * 7 * 16 * 27  # of 32 x 16 pixels
    assert points["parameters"] == sum(p.numel() for p in create_model("pointnet2_ssg").parameters())
    for row in table["rows"]:
        assert [run["seed"] for run in row["runs"]] == [0, 1] and row["ms"] > 0
        assert row["mAP"] == pytest.approx(sum(run["mAP"] for run in row["runs"]) / 2, abs=1e-4)
        assert {(run["num_query"], run["epochs"]) for run in row["runs"]} == {(8, 1)}
        assert 0 < row["mAP"] <= 1 and 0 < row["chance_mAP"] < 1
    lines = markdown(table).splitlines()
    assert lines[0].startswith("| model | input | epochs | Rank-1, % | mAP, % |")
    assert lines[2].startswith("| points | 64 points | 1 | ") and lines[3].startswith(
        "| pixels | 32 x 16 pixels | 1 | "
    )
    assert "2 seeds" in lines[-2] and "±" in lines[3]


@pytest.mark.parametrize("recipe", ["synth_plr_osnet", "synth_relation_s", "synth_rmgl", "synth_qaconv50"])
def test_the_packaged_recipes_of_2d_methods_from_yaml_to_scores(recipe, world, tmp_path):
    words = ["--data", str(world), "--out", str(tmp_path / "run"), "--train.epochs", "1", "--train.device", "cpu"]
    words += ["--sampling.p", "4", "--sampling.k", "2", "--train.batch", "8"]
    config = read_config(recipe, words)
    run = study.train(config)
    model, crops = create_model(weights=run / "model.safetensors"), open_dataset(world)
    assert model.name == config.model.name
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    query, gallery = (extract(model, split, progress=False) for split in (crops.query, crops.gallery))
    assert len(query) == 8 and len(gallery) == len(crops.gallery)
    scores = pair_scores(model, query, gallery)
    assert (scores is not None) == (config.model.name == "qaconv50")
    result = evaluate(query, gallery, scores=scores)
    assert result.num_valid == 8 and 0 < result.mAP <= 1


def test_runs_of_other_configs_lie_beside_each_other(world, both, tmp_path):
    few, more = (compare(both[1:], world, tmp_path / "out", epochs=epochs) for epochs in (1, 2))
    again = compare(both[1:], world, tmp_path / "out", epochs=1)
    runs = [table["rows"][0]["runs"][0] for table in (few, more, again)]
    assert runs[0]["run"] != runs[1]["run"] and runs[2] == runs[0]
    assert {path.name for path in (tmp_path / "out").glob("*.md")} == {"compare-1.md", "compare-2.md"}


def test_other_data_are_never_taken_for_these(world, both, tmp_path, monkeypatch):
    """A folder of studies is refused to other images of the first place, each time; what was tested on others is tested
    again.
    """
    size = {"preset": "easy", "cams": 2, "tracklets": 1, "images": 2, "workers": 1, "world": "B"}
    other, third = synth(tmp_path / "other", ids=8, **size), synth(tmp_path / "third", ids=12, **size)
    out = tmp_path / "out"
    rows = [Row(name, recipe, test=Trial(on=1)) for name, recipe in zip(("points", "pixels"), both, strict=True)]
    study_ = Study("transfer", "T", tuple(rows))
    before = run_study(study_, [world, other], out)
    tested = []
    monkeypatch.setattr(study, "extract", lambda *given, **more: tested.append(given) or extract(*given, **more))
    assert run_study(study_, [world, other], out)["rows"] == before["rows"] and not tested
    for names, message in (([both[0]], "was begun otherwise"), ([both[1]], "trained on other")):
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                compare(names, third, out)
    pixels = study_._replace(rows=study_.rows[1:])
    after = run_study(pixels, [world, third], out)
    assert (
        len(tested) == 2 and after["rows"][0]["runs"][0]["num_query"] == 12 != before["rows"][1]["runs"][0]["num_query"]
    )


def test_times_are_of_the_clock_that_was_asked_for(world, both, tmp_path):
    lifted = Study("lifted", "L", (Row("r", both[1], test=Trial(lift=True)),))
    tables = [run_study(lifted, [world], tmp_path / "out", clock=clock) for clock in ("frames", "seconds")]
    run = tmp_path / "out" / "runs" / tables[0]["rows"][0]["runs"][0]["run"]
    assert {path.name for path in run.glob("result*")} == {
        f"result-clock_{c}-lift_1.json" for c in ("frames", "seconds")
    }
    assert [table["clock"] for table in tables] == ["frames", "seconds"]
    assert "Times by the clock seconds." in markdown(tables[1])


def test_what_is_lacking_is_said_before_anything_is_trained(world, both, tmp_path, monkeypatch):
    trained = counting(monkeypatch)
    lines = ["path,pid,camid,split"]
    for split, folder in (("train", "bounding_box_train"), ("query", "query"), ("gallery", "bounding_box_test")):
        for path in sorted((world / folder).glob("*.jpg")):
            pid, camid = path.name.split("_")[:2]
            name = path.relative_to(world.parent)
            lines += [f"{name},{int(pid)},{int(camid[1])},{split}"] if int(pid) > 0 else []
    table = world.parent / "people.csv"
    table.write_text("\n".join(lines))
    rows = (Row("plain", both[1]), Row("lifted", both[1], test=Trial(lift=True)))
    with pytest.raises(ValueError, match="times must be known"):
        run_study(Study("s", "S", rows), [table], tmp_path / "out")
    with monkeypatch.context() as without, pytest.raises(ImportError, match=r"pip install 'reid3d\[study\]'"):
        without.setitem(sys.modules, "matplotlib.figure", None)
        compare(both[1:], table, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="none.pth"):
        run_study(studies.study("models", "cpu"), [world], tmp_path / "w", backbones={"osnet": tmp_path / "none.pth"})
    assert not trained and not (tmp_path / "w").exists()
    assert compare(both[1:], table, tmp_path / "out")["rows"][0]["runs"][0]["num_query"] == 8  # a table is no folder
    fewer = table.with_name("fewer.csv")  # of the same folder
    fewer.write_text("\n".join(line for line in lines if ",query" not in line or ",1,query" in line))
    rows = (Row("here", both[1]), Row("there", both[1], test=Trial(on=1)))
    tested = run_study(Study("s", "S", rows), [table, fewer], tmp_path / "out2")["rows"]
    assert [row["runs"][0]["num_query"] for row in tested] == [8, 4]


def test_figures_and_recipes_of_the_data_set(monkeypatch, tmp_path):
    """Shown where a row is of their data sets, and began as they did; recipes are those of the data set."""
    assert study._recipe("ognet_small_{}", "duke") == "ognet_small_duke"
    assert study._recipe("ognet_small_{}", None) == "ognet_small_market"
    assert [study._recipe("plr_osnet_{}", data) for data in ("cuhk", "duke")] == ["plr_osnet_cuhk", "plr_osnet"]

    def shown(row, *shorts, whole=True, **files):
        worlds = [SimpleNamespace(short=short, whole=whole, name=short) for short in shorts]
        config = study._config(row, 0, None, "cpu", tmp_path, shorts[row.trained_on], files)
        run = {"rank1": 0, "mAP": 0, "mINP": 0, "chance_mAP": 0}
        return study._row(row, "image", [run], config, worlds, Study("s", "S", ()))["paper"]

    plr, cloud, moved = (
        studies.study("plr_osnet", "paper").rows[2],
        studies.study("models", "paper").rows[4],
        next(row for row in studies.study("transfer", "paper").rows if row.name == "QAConv, A to B"),
    )
    assert shown(plr, "market", osnet="file") == [95.6, 88.9] and shown(plr, "market") is None
    monkeypatch.setattr(study, "_bare", lambda config: SimpleNamespace(size=(1, 1)))
    assert shown(cloud, "duke") == [76.53, 57.92] and shown(cloud, None) is None
    assert shown(cloud, "duke", whole=False) is None
    assert shown(moved, "market", "duke", resnet50="file") == [48.8, 28.7]
    assert shown(moved, "market", "market", resnet50="file") is None
    circle = {row.recipe for name in ("components", "shortcut") for row in studies.study(name, "paper").rows}
    assert circle == {"ognet_small_circle_{}", "ognet_deep_circle_{}"}


def test_names_of_models_are_trained_by_the_defaults(tmp_path):
    config = study._config(Row("dgcnn", None, "dgcnn"), 3, 5, "cpu", tmp_path)
    assert re.fullmatch(r"dgcnn-[0-9a-f]{8}-3", Path(config.out).name)
    words = ["--data", "", "--out", config.out, "--model.name", "dgcnn"]
    assert config == read_config(None, [*words, "--train.seed", "3", "--train.epochs", "5", "--train.device", "cpu"])
    assert study._config(Row("synth", "synth"), 0, None, "cpu", tmp_path).train.epochs == 6  # a recipe's own


def test_products_by_hand():
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 2, 5))
    assert macs(layers, torch.rand(2, 3, 8, 4)) == 2 * (8 * 4 * 2 * 27 + 5 * 64)


class Pooling(nn.Module):
    """Gated pooling alone: H = 6 channels, r = 2 hidden ones, C = 5."""

    def forward(self, points, idx):
        gate = ops.Gate(torch.rand(2, 6), torch.rand(2), torch.rand(6, 2), torch.rand(6))
        weight, centers = torch.rand(5, 6), torch.rand(1, len(idx[0]), 6)
        return ops.gated_pool(points, centers, idx, weight, gate if self.training else None)


def test_products_within_gated_pooling_are_counted():
    points, idx = torch.rand(1, 7, 6), torch.randint(7, (1, 4, 3))  # 12 pairs
    assert macs(Pooling(), points, idx) == 12 * (2 * 6 + 6 * 2 + 5 * 6)
    assert macs(Pooling().eval(), points, idx) == 12 * 5 * 6


@pytest.mark.parametrize(
    "name, giga",
    [
        ("plr_osnet", 1.216),
        ("relation_s", 6.088),
        ("relation_f", 6.098),
        ("rmgl", 22.02),
        ("qaconv50", 3.437),
        ("qaconv50_ibn_b", 3.437),
        ("qaconv152", 10.71),
    ],
)
def test_products_of_the_2d_methods(name, giga):
    """What facts measured elsewhere, and docs/baselines.md says."""
    with torch.device("meta"):
        model = create_model(name).eval()
        assert macs(model, torch.rand(1, 3, *model.size)) / 1e9 == pytest.approx(giga, rel=2e-3)


def test_what_cannot_be_compared(world, both, tmp_path):
    cases = [
        (([], world), "models must be different recipes, at least one, got none"),
        (([both[0], str(Path("elsewhere") / "points.yaml")], world), "models must be different recipes"),
        ((["nobody"], world), "models must be YAML files, the recipes .*, or the models .*tiny.*, got 'nobody'"),
        ((both, world, {"seeds": 0}), "seeds must be at least 1, got 0"),
        ((both, world / "query"), "data must have the splits train, query and gallery, got no train"),
    ]
    for (names, data, *more), message in cases:
        with pytest.raises(ValueError, match=message):
            compare(names, data, tmp_path / "out", **(more[0] if more else {}))
    compare(both[:1], world, tmp_path / "out")
    with pytest.raises(ValueError, match="data must be a folder of images, .*, got clouds"):
        compare(both, tmp_path / "out" / "clouds", tmp_path / "again")


# The papers' tables.


@pytest.fixture
def toy(monkeypatch):
    """The budget "cpu", of a size for eight people."""
    words = ("--cloud.background", "true", "--cloud.points", "128", "--train.batch", "8", "--train.epochs", "1")
    size = studies.CPU._replace(words=words, points=128, net={"k": 2, "init_points": 32, "dropout": 0.3})
    monkeypatch.setitem(studies.BUDGETS, "cpu", size)
    return size


def counting(monkeypatch):
    trained, real = [], study.train
    monkeypatch.setattr(study, "train", lambda config: (trained.append(config.out), real(config))[1])
    return trained


def test_every_study_can_be_built(tmp_path):
    assert tuple(studies.STUDIES) == STUDIES  # what the command line offers, without importing torch
    built: set[str] = set()
    for budget, name in itertools.product(("cpu", "gpu", "paper"), STUDIES):
        made = studies.study(name, budget)
        assert made.name == name and len({row.name for row in made.rows}) == len(made.rows) > 1
        placed = [row.x is not None for row in made.rows]
        assert placed == sorted(placed, reverse=True) and placed[0] == (made.axis is not None)
        for row in made.rows:
            config = study._config(row, 0, None, "cpu", tmp_path, "duke")
            sizes = json.dumps([asdict(config.model), config.cloud.points, config.image.height])
            if sizes in built:
                continue
            built.add(sizes)
            with torch.device("meta"):
                model = study._bare(config)
                if model.inputs == "image":
                    model(torch.rand(2, 3, *model.size))
            assert model.inputs in ("cloud", "image") and config.cloud.points >= getattr(model, "min_points", 1)


@pytest.mark.parametrize(
    ("name", "budget", "message"),
    [
        ("nothing", "cpu", "study must be one of inputs, .*, got 'nothing'"),
        ("k", "tpu", "budget must be one of cpu, gpu, paper, got 'tpu'"),
    ],
)
def test_what_is_no_study(name, budget, message):
    with pytest.raises(ValueError, match=message):
        studies.study(name, budget)


def test_a_study_of_inputs_from_the_command_line(world, toy, tmp_path, monkeypatch, capsys):
    trained, out = counting(monkeypatch), tmp_path / "out"
    market = shutil.copytree(world, tmp_path / "Market-1501")  # whose figures stand in the paper
    command = ["study", "inputs", "--data", str(market), "--out", str(out), "--device", "cpu"]
    name, published = layouts.PUBLISHED["Market-1501"]
    monkeypatch.setitem(layouts.PUBLISHED, "Market-1501", (name, layouts.count(list_images(market).images)))
    assert main([*command, "--json", str(tmp_path / "table.json")]) == 0
    printed = capsys.readouterr().out
    assert len(trained) == 3
    table = json.loads((out / "inputs.json").read_text())
    assert table == json.loads((tmp_path / "table.json").read_text())
    visible, flat, both = table["rows"]
    minutes = sum(row["runs"][0]["minutes"] for row in table["rows"])
    assert table["environment"]["seconds"] == round(60 * minutes) and table["environment"]["commit"]
    assert visible["paper"] == [77.64, 54.52] and "| 77.6 / 54.5 |" in (out / "inputs.md").read_text()
    assert markdown(table) in printed
    lines = list(csv.DictReader((out / "inputs.csv").open()))
    assert [line["recipe"] for line in lines] == [row["recipe"] for row in table["rows"]]
    assert [float(line["mAP"]) for line in lines] == [row["mAP"] for row in table["rows"]]
    assert ElementTree.parse(out / "inputs.svg").getroot().tag.endswith("svg")
    configs = [read_config(str(out / "runs" / row["runs"][0]["run"] / "config.yaml")) for row in table["rows"]]
    assert [config.cloud.background for config in configs] == [False, True, True]
    assert [config.model.kwargs.get("flat", False) for config in configs] == [False, True, False]
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert main(command) == 0 and len(trained) == 3  # all was done
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    density = ["study", "density", "--data", str(market), "--out", str(out), "--device", "cpu"]
    assert main(density) == 0 and len(set(trained)) == 3  # the third run of inputs serves here too
    monkeypatch.setitem(layouts.PUBLISHED, "Market-1501", (name, published))
    capsys.readouterr()
    assert main(command) == 0 and "these are not all of the published images" in capsys.readouterr().err
    assert not any(row["paper"] for row in json.loads((out / "inputs.json").read_text())["rows"])


def test_one_run_is_tested_in_many_ways(world, both, tmp_path, monkeypatch):
    """After re-ranking and times, turned, with fewer points: each as computed here from its features."""
    trained = counting(monkeypatch)
    tests = [
        Trial(),
        Trial(rerank=True),
        Trial(lift=True),
        Trial(rerank=True, lift=True),
        Trial(turn=90.0),
        Trial(points=32),
    ]
    rows = [Row(f"{i}", both[0], test=test) for i, test in enumerate(tests)]
    seen: list[str] = []
    monkeypatch.setattr(study, "extract", lambda net, of, **more: (seen.append(of.name), extract(net, of, **more))[1])
    table = run_study(Study("ways", "Ways", tuple(rows)), [world], tmp_path / "out")
    assert len(trained) == len(tests) and len(set(trained)) == 1  # asked each time, and done once
    assert seen == ["gallery", "query", "query", "gallery", "query"]  # again only what others are
    run = tmp_path / "out" / "runs" / table["rows"][0]["runs"][0]["run"]
    clouds = open_clouds(tmp_path / "out" / "clouds")
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
    model = create_model(weights=run / "model.safetensors")
    q, g = (extract(model, split, progress=False) for split in (clouds.query, clouds.gallery))
    turned = (
        clouds.query.with_transform(Turned(64, False, 90.0)),
        clouds.gallery.with_transform(EvalTransform(64, False)),
    )
    turned = [extract(model, split, progress=False) for split in turned]
    few = [extract(model, split, points=32, progress=False) for split in (clouds.query, clouds.gallery)]
    mine = g.subset(np.flatnonzero(g.pids != -1))
    again = rerank(q, mine)
    expected = [
        evaluate(q, g),
        evaluate(q, mine, scores=again),
        evaluate(q, mine, scores=tlift(q, mine)),
        evaluate(q, mine, scores=tlift(q, mine, again)),
        evaluate(*turned),
        evaluate(*few),
    ]
    assert [row["mAP"] for row in table["rows"]] == [round(result.mAP, 4) for result in expected]
    assert len({row["mAP"] for row in table["rows"]}) > 3  # they do differ


def test_transfer_tests_a_run_on_the_other_world(world, both, tmp_path, monkeypatch):
    trained = counting(monkeypatch)
    other = synth(tmp_path / "other", preset="easy", world="B", ids=8, cams=2, tracklets=1, images=2, workers=1)
    rows = [Row(f"{a} to {b}", both[0], trained_on=a, test=Trial(on=b)) for a in (0, 1) for b in (0, 1)]
    table = run_study(Study("transfer", "T", tuple(rows)), [world, other], tmp_path / "out")
    assert len(set(trained)) == 2
    names = [row["runs"][0]["run"] for row in table["rows"]]
    assert names[0] == names[1] and names[2] == names[3] != names[0]
    model = create_model(weights=tmp_path / "out" / "runs" / names[0] / "model.safetensors")
    clouds = open_clouds(tmp_path / "out" / "clouds2")
    result = evaluate(*(extract(model, split, progress=False) for split in (clouds.query, clouds.gallery)))
    assert table["rows"][1]["mAP"] == round(result.mAP, 4)
    with pytest.raises(ValueError, match="data must be 2 folders of images, got 1"):
        run_study(Study("transfer", "T", tuple(rows)), [world], tmp_path / "out")


def test_runs_of_other_processes_are_passed_over_and_waited_for(world, both, tmp_path, monkeypatch):
    rows = [Row("first", both[0]), Row("second", both[0], words=("--train.lr", "2e-3"))]
    busy, said, slept = Path(study._config(rows[0], 0, None, "auto", tmp_path / "out").out), [], []
    busy.mkdir(parents=True)
    held = hold_folder(busy, "a test", name=".study")
    held.__enter__()

    def wait(seconds):
        slept.append(list(said))
        held.__exit__(None, None, None)

    monkeypatch.setattr(study.time, "sleep", wait)
    run_study(Study("shared", "S", tuple(rows)), [world], tmp_path / "out", say=said.append)
    assert [line.partition(",")[0] for line in said] == ["second", "first"]
    assert len(slept) == 1 and len(slept[0]) == 1  # only when nothing else was left


def test_a_run_that_fails_stops_none_of_the_others(world, both, tmp_path):
    rows = [Row("wild", both[1], words=("--train.lr", "1e30")), Row("tame", both[1])]
    rows.append(rows[0]._replace(name="wild again", test=Trial(rerank=True)))  # of the same run: no second time
    said, message = [], "wild, seed 0: the loss is (nan|inf) in epoch 1: train.lr 1e[+]30 may be too high"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"^1 of 2 runs failed, so that there is no table; the first, {message}"):
            run_study(Study("some", "S", tuple(rows)), [world], tmp_path / "out", say=said.append)
    assert re.fullmatch(message, said[0]) and said[1].startswith("tame, seed 0: Rank-1") and said[2:] == said[:2]
    assert not list((tmp_path / "out").glob("some*"))


def test_neither_does_one_that_the_memory_is_too_small_for(world, both, tmp_path, monkeypatch):
    real, said = study.train, []

    def small(config):
        if config.train.seed == 0:
            raise MemoryError("Unable to allocate 8 TiB")
        return real(config)

    monkeypatch.setattr(study, "train", small)
    with pytest.raises(
        RuntimeError, match="^1 of 2 runs failed, .*; the first, pixels, seed 0: Unable to allocate 8 TiB"
    ):
        run_study(Study("s", "S", (Row("pixels", both[1]),)), [world], tmp_path / "out", seeds=2, say=said.append)
    assert said[1].startswith("pixels, seed 1: Rank-1")


def test_bodies_of_a_study(world, toy, tmp_path):
    table = run_study(studies.study("fit", "cpu"), [world], tmp_path / "out")
    assert [row["recipe"] for row in table["rows"]] == ["true bodies", "fitted bodies", "an upright body"]
    folders = [tmp_path / "out" / name for name in ("clouds-true", "clouds", "clouds-mean")]
    true, fitted, mean = (open_clouds(folder).query.cloud(0) for folder in folders)
    assert not np.array_equal(true.xyz, fitted.xyz) and not np.array_equal(mean.xyz, fitted.xyz)
    with np.load(world / "gt.npz") as truth:
        name = truth["names"].tolist()[3]
        fit = TrueBodies(world)([np.zeros((128, 64, 3), np.uint8)], [name])
        assert np.array_equal(fit.cam.numpy()[0], truth["cam"][3])
    with pytest.raises(FileNotFoundError, match="world must be a synthetic one, with its truth, got no"):
        TrueBodies(tmp_path)


def test_clouds_of_a_person_alone(world, toy, tmp_path):
    """All that a cloud shows of the person stays; of the rest of the crop nothing does but where the body lies."""
    made = studies.study("background", "cpu")
    table = run_study(made._replace(rows=made.rows[3:5]), [world], tmp_path / "out")
    assert table["rows"][0]["runs"][0]["run"] != table["rows"][1]["runs"][0]["run"]
    every, person = (open_clouds(tmp_path / "out" / name) for name in ("clouds", "clouds-person"))
    with np.load(world / "gt.npz") as truth:
        seen = dict(zip(truth["names"].tolist(), np.unpackbits(truth["seen"], axis=1).astype(bool), strict=True))

    def shown(cloud, record, which):
        column, line = np.floor(record.project(cloud.xyz[which].astype(float)) + 1e-3).astype(int).T
        pixels = np.zeros((128, 64), bool)
        pixels[np.clip(line, 0, 127), np.clip(column, 0, 63)] = True
        return pixels

    left = 0
    for split in ("train", "query", "gallery"):
        for i, record in enumerate(getattr(person, split).records):
            whole, kept = (getattr(clouds, split).cloud(i) for clouds in (every, person))
            body, on, mask = whole.vertex >= 0, kept.vertex >= 0, seen[record.name].reshape(128, 64)
            assert record.points == len(kept) and np.array_equal(whole.xyz[body], kept.xyz[on])
            assert np.array_equal(shown(kept, record, ~on), shown(whole, record, ~body) & mask)
            left += (~on).sum()
    assert left > 0
    other = synth(tmp_path / "other", preset="easy", ids=8, cams=2, tracklets=1, images=2, workers=1, world="B")
    with pytest.raises(ValueError, match="clouds must be of the world .*other, which has no"):
        keep_person(other, tmp_path / "out" / "clouds", tmp_path / "nothing")


def test_turned_by_hand():
    xyz = np.array([[1, 5, 2], [3, 5, 2], [2, 6, 4]], np.float32)  # body: its middle is x = 2, z = 2
    cloud = PointCloud(xyz, np.arange(9, dtype=np.uint8).reshape(3, 3), np.array([0, 1, -1], np.int32))
    rng = np.random.default_rng(0)

    def placed(degrees):
        return Turned(3, True, degrees)(cloud, rng)[0].numpy()

    still = EvalTransform(3, True)(cloud, rng)
    assert np.array_equal(placed(0.0), still[0].numpy())
    quarter = np.array([[2, 5, 3], [2, 5, 1], [4, 6, 2]], np.float32)  # z to x, x to -z
    assert np.abs(placed(90.0) - (quarter - quarter.mean(0))).max() < 1e-6
    assert np.abs(placed(360.0) - still[0].numpy()).max() < 1e-6
    bare = PointCloud(xyz, cloud.rgb, np.full(3, -1, np.int32))  # nobody: about the middle of all
    assert np.isfinite(Turned(3, True, 45.0)(bare, rng)[0].numpy()).all()


def test_plots_of_bars_and_of_lines(tmp_path):
    rows = [
        {"recipe": f"<{i}>", "x": float(i), **dict.fromkeys(("rank1", "mAP", "rank1_std", "mAP_std"), 0.5)}
        for i in (1, 2)
    ]
    for axis in (None, "k & more"):
        table = {"suite": "s", "title": "A < B", "data": "d", "axis": axis, "rows": rows}
        for name in ("one.svg", "two.svg"):
            study.plot(table, tmp_path / name)
        assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
        ElementTree.parse(tmp_path / "one.svg")
    table["rows"] = [*rows, {**rows[0], "recipe": "of no place", "x": None}]
    study.plot(table, tmp_path / "beside.svg")
    assert "of no place" in (tmp_path / "beside.svg").read_text()  # as a comment: text is drawn
