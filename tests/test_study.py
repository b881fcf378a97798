"""Studies: a table of 2D and 3D under the same conditions, that goes on where it stopped; products by hand."""

import json

import pytest
import torch
from torch import nn

from reid3d import models, ops, study, synth
from reid3d.cli import main
from reid3d.config import read_config
from reid3d.data import open_dataset
from reid3d.models import create_model
from reid3d.retrieval import evaluate, extract, pair_scores
from reid3d.study import compare, macs, markdown
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
    assert lines[0].startswith("| model | input | Rank-1, % | mAP, % |") and lines[2].startswith("| points | cloud | ")
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


def test_a_run_of_another_config_is_not_taken_for_this_one(world, both, tmp_path):
    compare(both[1:], world, tmp_path / "out")
    with pytest.raises(ValueError, match="train.epochs"):
        compare(both[1:], world, tmp_path / "out", epochs=2)


def test_names_of_models_are_trained_by_the_defaults(tmp_path):
    config = study._config("dgcnn", 3, 5, "cpu", tmp_path)
    words = ["--data", "", "--out", str(tmp_path / "runs" / "dgcnn-3"), "--model.name", "dgcnn"]
    assert config == read_config(None, [*words, "--train.seed", "3", "--train.epochs", "5", "--train.device", "cpu"])
    assert study._config("synth", 0, None, "cpu", tmp_path).train.epochs == 6  # a recipe's own


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
        (([both[0]] * 2, world), "models must be different recipes"),
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
