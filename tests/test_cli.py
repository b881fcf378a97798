"""The command line: what each command reads and writes, exit codes, and one-line errors."""

import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

import reid3d
from reid3d import cli
from reid3d.models import create_model, save_weights
from reid3d.models.official import write_official
from tests.capsules import write_capsules

COMMANDS = ["synth", "convert", "train", "eval", "search", "export-features", "view", "doctor", "bench"]
GROUPS = [f"--{group}" for group in ("model", "cloud", "sampling", "loss", "train", "validation")]
GROUPS += [f"--loss.{name}" for name in ("circle", "triplet", "contrastive", "instance")]
SMALL = {"init_points": 128, "k": 8}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_capsules(tmp_path_factory.mktemp("cli") / "clouds", ids=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as training leaves it."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    folder.mkdir()
    save_weights(create_model("ognet_small", **SMALL), folder / "model.safetensors", trained_on='{"points": 200}')
    return folder


def call(capsys, *argv) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line run in this process."""
    try:
        code = cli.main([str(word) for word in argv])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def one_error(err: str) -> str:
    """The last and only line of an error."""
    assert "Traceback" not in err
    *progress, line = err.strip().splitlines()
    assert line.startswith("reid3d: error: ") and not any("error" in other for other in progress)
    return line


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_shows_the_defaults(command, capsys):
    code, out, _ = call(capsys, command, "--help")
    assert code == 0 and f"reid3d {command}" in out
    for option in [line.split()[0] for line in out.splitlines() if line.startswith("  --")]:
        if option not in ("--json", "--recipe", "--data", "--out", "--query", "--gallery", *GROUPS):
            help = " ".join(out.split()).split(f" {option} ")[-1]
            assert "default: " in help, option


def test_help_and_version(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0 and all(re.search(rf"^    {command}\s", out, re.M) for command in COMMANDS)
    assert call(capsys, "--version") == (0, f"reid3d {reid3d.__version__}\n", "")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "a command is needed: synth, convert, train, eval, search, export-features, view, study, doctor, bench"),
        (["evaluate"], "invalid choice: 'evaluate'"),
        (["synth"], "the following arguments are required: OUT"),
        (["synth", "out", "--seed", "-1"], "argument --seed: must be a whole number from 0 to 9223372036854775807"),
        (["synth", "out", "--cams", "3.5"], "argument --cams: must be a whole number, got '3.5'"),
        (["synth", "out", "--occlusion", "much"], "argument --occlusion: must be a number, got 'much'"),
        (["synth", "out", "--preset", "brutal"], "argument --preset: invalid choice: 'brutal'"),
        (["convert", "src", "out", "--width", "7"], "argument --width: must be a whole number of at least 8, got '7'"),
        (["convert", "src"], "the following arguments are required: OUT (see reid3d convert --help)"),
        (["convert"], "the following arguments are required: SRC, OUT"),
        (["convert", "a", "b", "--shard", "2/2"], "argument --shard: must be I/N with I from 0 to N - 1, got '2/2'"),
        (
            ["convert", "a", "b", "--min-confidence", "2"],
            "argument --min-confidence: must be a number from 0 to 1, got",
        ),
        (["convert", "a", "b", "--official", "--mode", "dense"], "not allowed with argument --official"),
        (["eval", "run", "data", "--ap", "coco"], "argument --ap: invalid choice: 'coco'"),
        (["eval", "run"], "RUN_OR_WEIGHTS and DATA are needed"),
        (["eval", "run", "--matrix", "a", "--on", "b"], "a matrix needs --matrix RUN... and --on DATA..."),
        (["eval", "--matrix", "a", "--on", "b", "--rerank"], "a matrix needs --matrix RUN... and --on DATA..."),
        (["eval", "run", "data", "--tlift", "clock"], "argument --tlift: invalid choice: 'clock'"),
        (["eval", "--matrix", "a"], "a matrix needs --matrix RUN... and --on DATA..."),
        (["eval", "run", "data", "--calibrate", "1"], "argument --calibrate: must be above 0 and below 1, got 1"),
        (["eval", "run", "data", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["eval", "run", "data", "--feat", "x"], "unrecognized arguments: --feat x"),
        (["search", "--query", "a.jpg"], "the following arguments are required: --gallery"),
        (["search", "--query", ".", "--gallery", ".", "-k", "0"], "argument -k: must be a whole number of at least 1"),
        (["search", "--query", ".", "--gallery", "."], "--weights is needed: . is not a feature file"),
        (["export-features", "f", "f.bin"], "OUT must end in .npy, .parquet or .faiss, got f.bin"),
        (["doctor", "now"], "unrecognized arguments: now"),
        (["bench"], "the following arguments are required: SUITE"),
        (["bench", "models"], "argument SUITE: invalid choice: 'models'"),
        (["bench", "kernels", "--threads", "0"], "argument --threads: must be a whole number from 1 to 1024, got '0'"),
        (["bench", "kernels", "--device", "abacus"], "argument --device: must be cpu, cuda or cuda:N, got 'abacus'"),
        (["bench", "kernels", "--seconds", "nan"], "argument --seconds: must be a number greater than 0, got 'nan'"),
        (["bench", "kernels", "--seconds", "long"], "argument --seconds: must be a number greater than 0, got 'long'"),
        (["train", "--data", "d"], "out"),
        (["train", "no-recipe", "--data", "d", "--out", "o"], "no-recipe"),
        (["train", "--data", "d", "--out", "o", "--train.lrr", "1"], "train.lrr"),
        (["train", "--data", "d", "--out", "o", "--train.epochs", "many"], "train.epochs"),
        (["train", "--data", "d", "--out", "o", "--train.epochs", "0"], "train.epochs must be positive, got 0"),
        (["train", "--data", "d", "--out", "o", "stray"], "stray"),
        (["train", "demo", "--data", "d", "--out", "o", "stray"], "stray"),
        (["train", "--data", "d", "--out", "o", "--train.seed", "9" * 20], "train.seed must be less than 2**63"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *argv)
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1 and message in one_error(err) and "--help)" in err
    assert os.listdir(tmp_path) == []


def test_eval_and_view(run, data, capsys, tmp_path):
    code, out, err = call(capsys, "eval", run, data, "--ap", "mean", "--json", tmp_path / "new" / "eval.json")
    assert code == 0, err
    figures = json.loads((tmp_path / "new" / "eval.json").read_text())
    assert f"Rank-1 {figures['rank1']:13.2%}" in out and f"mAP (mean) {figures['mAP']:9.2%}" in out
    assert f"chance {figures['chance_rank1']:6.2%}" in out and f"chance {figures['chance_mAP']:6.2%}" in out
    assert "4 of 4 queries have a match in the gallery of 5" in out
    assert figures["ap"] == "mean" and figures["points"] == 200 and figures["num_gallery"] == 5
    assert 0 < figures["chance_rank1"] < figures["chance_mAP"] < 1

    features = run / "features"
    assert sorted(os.listdir(features)) == ["gallery.safetensors", "query.safetensors"]
    with safe_open(features / "query.safetensors", framework="numpy") as file:
        assert file.metadata()["format"] == "reid3d-features-1" and file.get_tensor("feats").shape == (4, 512)

    page = tmp_path / "page.html"
    code, out, err = call(capsys, "view", features, "--out", page, "--queries", "3")
    assert (code, out) == (0, f"{page}\n")
    assert len(json.loads(re.search(r'id="report">(.*?)</script>', page.read_text())[1])["rows"]) == 3
    moved = data.rename(data.with_name("moved"))
    try:
        code, _, err = call(capsys, "view", features, "--out", tmp_path / "other.html")
        assert code == 1 and f"the clouds were in {data}, which is not there: --data DIR says" in one_error(err)
        assert call(capsys, "view", features, "--out", tmp_path / "other.html", "--data", moved)[0] == 0
    finally:
        moved.rename(data)


def test_view_of_runs_that_did_not_end(run, data, capsys, tmp_path):
    """Each a page, with what is missing and the command that comes next; all of it where nothing is."""
    line = '{"epoch": 1, "loss": 2.0, "lr": 0.1}\n'

    def folder(name, **texts):
        (tmp_path / name).mkdir()
        for file, text in texts.items():
            (tmp_path / name / file.replace("_", ".")).write_text(text)
        return tmp_path / name

    config = f"data: {data}\nout: o\nmodel: {{name: ognet_small}}\n"
    empty = folder("empty 'é\" & run", config_yaml=config)
    failed = folder("failed", config_yaml=config, metrics_jsonl=line + '{"epoch": 2, "lo')
    logged = folder("logged", metrics_jsonl=line)
    trained = folder("trained", config_yaml=config, metrics_jsonl=line)
    shutil.copy(run / "model.safetensors", trained)
    page = tmp_path / "page.html"

    def shown(what):
        code, out, err = call(capsys, "view", what, "--out", page)
        assert (code, out) == (0, f"{page}\n"), err
        return html.unescape(page.read_text())

    for what, curves in ((empty, 0), (failed, 2), (logged, 2)):
        text = shown(what)
        assert "has no weights (model.safetensors): the reid3d train command" in text and str(what) in text
        assert text.count("<svg") == curves
    ends = f"has no features of queries and gallery yet: reid3d eval {trained} DATA makes them."
    assert ends in shown(trained)
    assert call(capsys, "eval", trained, data)[0] == 0
    text = shown(trained)
    assert ends not in text and "Rank-1" in text and text.count("<svg") == 5 and '"kind":"query"' in text
    (trained / "features" / "gallery.safetensors").unlink()
    assert ends in shown(trained)
    code, _, err = call(capsys, "view", logged, "--png", tmp_path / "a.png")
    assert code == 1 and "has no features to show" in one_error(err)


def test_view_shows_k_matches(run, data, capsys, tmp_path):
    assert call(capsys, "eval", run, data, "--features", tmp_path / "f")[0] == 0
    page = tmp_path / "page.html"
    for k in (1, 3):
        assert call(capsys, "view", tmp_path / "f", "--out", page, "-k", k)[0] == 0
        rows = json.loads(re.search(r'id="report">(.*?)</script>', page.read_text())[1])["rows"]
        assert {sum("place" in card and "missed" not in card for card in row["cards"]) for row in rows} == {k}


def test_five_lines_of_python_give_the_figures_of_eval(run, data, capsys, tmp_path):
    code, _, err = call(capsys, "eval", run, data, "--features", tmp_path / "f", "--json", tmp_path / "eval.json")
    assert code == 0, err
    figures = json.loads((tmp_path / "eval.json").read_text())
    ds = reid3d.open_dataset(data)
    model = reid3d.create_model("ognet_small", weights=run / "model.safetensors")
    query, gallery = reid3d.extract(model, ds.query), reid3d.extract(model, ds.gallery)
    result = reid3d.evaluate(query, gallery)
    assert (result.cmc[0], result.mAP, result.mINP) == (figures["rank1"], figures["mAP"], figures["mINP"])
    for name, features in (("query", query), ("gallery", gallery)):
        saved = reid3d.Features.load(tmp_path / "f" / f"{name}.safetensors")
        assert saved.made_by == features.made_by
        assert (saved.feats == features.feats).all()


def test_a_matrix_of_runs_and_data(run, data, capsys, tmp_path):
    other = write_capsules(tmp_path / "others", ids=3)
    argv = ("eval", "--matrix", run, "--on", data, other, "--json", tmp_path / "matrix.json")
    code, out, err = call(capsys, *argv)
    assert code == 0, err
    matrix = json.loads((tmp_path / "matrix.json").read_text())
    assert list(matrix["scores"]) == [run.name] and list(matrix["scores"][run.name]) == ["clouds", "others"]
    for path, name in ((data, "clouds"), (other, "others")):
        assert call(capsys, "eval", run, path, "--features", tmp_path / "f", "--json", tmp_path / "e.json")[0] == 0
        alone = json.loads((tmp_path / "e.json").read_text())
        found = matrix["scores"][run.name][name]
        assert found == {key: alone[key] for key in found} and found["num_query"] > 0
        assert f"{100 * found['rank1']:.1f} / {100 * found['mAP']:.1f}" in out.splitlines()[1]
    assert out.splitlines()[0].split() == ["Rank-1", "/", "mAP,", "%", "clouds", "others"]
    shutil.copytree(other, tmp_path / "more" / "others")  # of the same name
    code, out, _ = call(capsys, "eval", "--matrix", run, "--on", other, tmp_path / "more" / "others")
    assert code == 0 and out.splitlines()[0].split()[-2:] == [str(other), str(tmp_path / "more" / "others")]


def test_thresholds_are_kept_beside_the_weights(run, capsys, tmp_path):
    clouds = write_capsules(tmp_path / "clouds", ids=40)
    shutil.copytree(run, tmp_path / "run")
    argv = ("eval", tmp_path / "run", clouds, "--calibrate", "0.1", "0.05", "--json", tmp_path / "e.json")
    code, out, err = call(capsys, *argv)
    assert code == 0, err
    file = tmp_path / "run" / "calibration.json"
    assert out.splitlines()[-1] == f"calibration: {file}"
    found = reid3d.retrieval.Calibration.load(file)
    query = reid3d.Features.load(tmp_path / "run" / "features" / "query.safetensors")
    assert found.made_by == query.made_by and [row.fmr for row in found.thresholds] == [0.1, 0.05]
    assert json.loads((tmp_path / "e.json").read_text())["calibration"]["thresholds"][1]["fmr"] == 0.05
    (tmp_path / "e.json").unlink()
    code, _, err = call(capsys, *argv[:4], "1e-7", *argv[-2:])
    assert code == 1 and "fmr must be at least 30 of the " in one_error(err)
    assert "calibration" not in json.loads((tmp_path / "e.json").read_text())  # what was found is kept
    assert reid3d.retrieval.Calibration.load(file) == found


def test_what_re_ranking_and_times_make_of_it(run, data, capsys, tmp_path):
    def scores(*more):
        code, out, err = call(
            capsys, "eval", run, data, "--features", tmp_path / "f", "--json", tmp_path / "e.json", *more
        )
        assert code == 0, err
        figures = json.loads((tmp_path / "e.json").read_text())
        heads = [line.removeprefix("after ").rstrip(":") for line in out.splitlines() if line.startswith("after ")]
        assert heads == list(figures.get("after", {}))
        return figures

    assert "after" not in scores()
    both = scores("--rerank", "--tlift", "frames")
    assert list(both["after"]) == ["times", "re-ranking", "re-ranking and times"]
    assert scores("--rerank")["after"] == {"re-ranking": both["after"]["re-ranking"]}
    assert scores("--tlift", "frames")["after"] == {"times": both["after"]["times"]}
    query, gallery = (reid3d.Features.load(tmp_path / "f" / f"{side}.safetensors") for side in ("query", "gallery"))
    assert (gallery.pids == -1).any()
    gallery = gallery.subset((gallery.pids != -1).nonzero()[0])
    scored = reid3d.tlift(query, gallery, reid3d.rerank(query, gallery))
    result = reid3d.evaluate(query, gallery, scores=scored)
    assert both["after"]["re-ranking and times"]["mAP"] == result.mAP


def test_search_says_who_is_the_same(run, capsys, tmp_path):
    clouds = write_capsules(tmp_path / "clouds", ids=40)
    shutil.copytree(run, tmp_path / "run")
    argv = (
        "search",
        "--query",
        clouds,
        "--gallery",
        clouds,
        "--weights",
        tmp_path / "run",
        "-k",
        "4",
        "--cross-camera",
    )
    json_file = tmp_path / "found.json"
    code, _, err = call(capsys, *argv, "--fmr", "0.05")
    assert code == 1 and "--fmr needs --weights RUN with a calibration" in one_error(err)
    assert call(capsys, "eval", tmp_path / "run", clouds, "--calibrate", "0.2", "0.05")[0] == 0
    rows = reid3d.retrieval.Calibration.load(tmp_path / "run" / "calibration.json").thresholds
    for more, row in (((), rows[1]), (("--fmr", "0.2"), rows[0])):
        code, out, err = call(capsys, *argv, "--json", json_file, *more)
        assert code == 0, err
        assert f"same person: from similarity {row.similarity:.4f} on" in out.splitlines()[-1]
        assert out.splitlines()[1] == "rank  similarity  same person  name"
        found = json.loads(json_file.read_text())
        assert found["threshold"]["fmr"] == row.fmr
        said = [(match["similarity"], match["same_person"]) for one in found["matches"] for match in one["matches"]]
        assert {same for _, same in said} == {True, False}
        assert all(same == (sim >= row.similarity) for sim, same in said if abs(sim - row.similarity) > 1e-4)
        assert out.count("          yes  ") == sum(same for _, same in said)
    code, _, err = call(capsys, *argv, "--fmr", "0.5")
    assert code == 1 and "fmr must be one that was calibrated (0.2, 0.05), got 0.5" in one_error(err)
    # Of other weights it says nothing.
    save_weights(
        create_model("ognet_small", **SMALL), tmp_path / "run" / "model.safetensors", trained_on='{"points": 150}'
    )
    code, out, err = call(capsys, *argv)
    assert code == 0 and "same person" not in out and "is of other weights or points than these features" in err
    code, _, err = call(capsys, *argv, "--fmr", "0.2")
    assert code == 1 and "run reid3d eval --calibrate again" in one_error(err)


def test_eval_of_a_published_checkpoint(data, capsys, tmp_path):
    write_official(create_model("ognet_small", 3), tmp_path / "model_last.pth")
    code, _, err = call(
        capsys, "eval", tmp_path / "model_last.pth", data, "--points", "800", "--json", tmp_path / "eval.json"
    )
    assert code == 0, err
    figures = json.loads((tmp_path / "eval.json").read_text())
    assert json.loads(figures["trained_on"]) == {"ids": 3, "points": 4096} and figures["points"] == 800


def test_view_refuses_files_that_do_not_belong_together(run, data, capsys, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    assert call(capsys, "eval", run, data, "--features", one)[0] == 0
    assert call(capsys, "eval", run, data, "--features", other, "--points", "128")[0] == 0
    os.replace(one / "query.safetensors", other / "query.safetensors")
    code, _, err = call(capsys, "view", other, "--out", tmp_path / "page.html")
    assert code == 1 and "do not belong together: run reid3d eval again" in one_error(err)
    assert not (tmp_path / "page.html").exists()


def test_a_failing_eval_writes_neither_file(run, data, capsys, tmp_path, monkeypatch):
    real = reid3d.retrieval.extract

    def extract(model, split, **more):
        if split.name == "gallery":
            raise RuntimeError("out of memory")
        return real(model, split, **more)

    monkeypatch.setattr("reid3d.retrieval.extract", extract)
    assert call(capsys, "eval", run, data, "--features", tmp_path / "f")[0] == 1
    assert os.listdir(tmp_path / "f") == []


def test_eval_of_a_weights_file_with_other_options(run, data, capsys, tmp_path):
    weights = run / "model.safetensors"
    argv = ("eval", weights, data, "--features", tmp_path / "f", "--points", "128", "--batch", "3", "--device", "cpu")
    code, out, _ = call(capsys, *argv)
    assert code == 0 and f"features: {tmp_path / 'f'}" in out and "mAP (market)" in out
    assert sorted(os.listdir(tmp_path / "f")) == ["gallery.safetensors", "query.safetensors"]


def test_train_reads_recipe_and_overrides_in_order(data, capsys, tmp_path, monkeypatch):
    seen = []

    def train(config):
        seen.append(config)
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        (run / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2, "loss": 0.5}\n')
        return run

    monkeypatch.setattr("reid3d.train.train", train)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train: {epochs: 7, lr: 0.5}\n")
    argv = (
        "train",
        recipe,
        "--data",
        data,
        "--train.lr",
        "1e-3",
        "--json",
        tmp_path / "t.json",
        "--out",
        tmp_path / "run",
    )
    code, out, err = call(capsys, *argv)
    assert (code, out) == (0, f"{tmp_path / 'run'}\n"), err
    (config,) = seen
    assert (config.data, config.out) == (str(data), str(tmp_path / "run"))
    assert (config.train.epochs, config.train.lr) == (7, 1e-3)
    assert json.loads((tmp_path / "t.json").read_text()) == {"run": str(tmp_path / "run"), "epoch": 2, "loss": 0.5}
    assert call(capsys, "train", "--data", data, "--out", "x")[0] == 0
    assert seen[1].train.epochs == 1000
    for argv in (("--data", data, recipe, "--out=x"), ("--data", data, "--out", "x", recipe)):  # anywhere
        assert call(capsys, "train", *argv)[0] == 0
        assert (seen[-1].train.epochs, seen[-1].out) == (7, "x")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ids", "1"], "ids must be in 2..9000, got 1: one identity cannot be told from another"),
        (["--cams", "0"], "cams must be in 2..6, got 0: people are searched for across cameras"),
        (["--images", "80"], "images must not exceed the 75 frames of a passage, got 80: each is another frame"),
        (["--occlusion", "nan"], "occlusion must be in 0..1, got nan"),
    ],
)
def test_a_world_that_cannot_be_is_bad_usage(capsys, tmp_path, argv, message):
    code, _, err = call(capsys, "synth", tmp_path / "out", *argv)
    assert code == 2 and message in one_error(err)
    assert not (tmp_path / "out").exists()


def test_synth_and_convert_hand_their_options_on(capsys, tmp_path, monkeypatch):
    import reid3d.preprocess.batch
    import reid3d.preprocess.synth
    from reid3d.preprocess.convert import Recipe

    calls = []
    monkeypatch.setattr(reid3d.preprocess.synth, "synth", lambda *a, **k: calls.append((a, k)) or a[0])
    report = reid3d.preprocess.batch.Report(3, 0, 0, 1.5)
    monkeypatch.setattr(reid3d.preprocess.batch, "convert_folder", lambda *a, **k: calls.append((a, k)) or report)
    out = tmp_path / "people"
    assert call(capsys, "synth", out, "--ids", "8", "--seed", "3", "--preset", "hard", "--occlusion", "0.5") == (
        0,
        f"{out}\n",
        "",
    )
    code, text, _ = call(capsys, "convert", out, tmp_path / "clouds", "--height", "256", "--width", "128")
    assert code == 0 and "3 clouds written" in text
    more = ["--fitter", "mean", "--body", "smpl.npz", "--official", "--min-confidence", "0.5", "--refine", "a"]
    more += [
        "--refine",
        "b",
        "--workers",
        "3",
        "--shard",
        "1/4",
        "--engine",
        "ray",
        "--batch",
        "8",
        "--shard-size",
        "9",
        "--distractors",
    ]
    assert call(capsys, "convert", out, tmp_path / "clouds", *more, "--json", tmp_path / "report.json")[0] == 0
    assert json.loads((tmp_path / "report.json").read_text())["written"] == 3
    cores = len(os.sched_getaffinity(0))
    plain = {"batch": 64, "shard_size": 1024, "part": (0, 1), "workers": cores, "engine": "local", "distractors": False}
    other = {"batch": 8, "shard_size": 9, "part": (1, 4), "workers": 3, "engine": "ray", "distractors": True}
    recipe = Recipe("mean", Path("smpl.npz"), "official", (128, 64), 0.5, (Path("a"), Path("b")))
    assert calls == [
        ((out,), {"preset": "hard", "world": "A", "seed": 3, "workers": None, "ids": 8, "occlusion": 0.5}),
        ((out, tmp_path / "clouds", Recipe(size=(256, 128))), plain),
        ((out, tmp_path / "clouds", recipe), other),
    ]


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    from reid3d.preprocess.synth import synth

    return synth(tmp_path_factory.mktemp("cli") / "people", ids=2, cams=2, images=2, progress=False)


def test_a_table_is_converted_and_the_doctor_reads_both(people, capsys, tmp_path):
    images = sorted(people.glob("query/*.jpg"))
    rows = [
        f"{image.relative_to(people).as_posix()},p{k},{'query' if k else 'gallery'}" for k, image in enumerate(images)
    ]
    (people / "some.csv").write_text("\n".join(["path,pid,split", *rows, "gone.jpg,p0,query"]) + "\n")
    clouds = tmp_path / "clouds.v1"
    assert call(capsys, "convert", people / "some.csv", clouds, "--workers", "1")[0] == 0
    (people / "some.csv").rename(tmp_path / "some.csv")
    report = call(capsys, "doctor", "--data", clouds, "--json", tmp_path / "data.json")
    assert report[0] == 0 and report[1].splitlines() == [
        f"clouds in {clouds}",
        f"query             {len(images) - 1} images, {len(images) - 1} people, 0 cameras, no cameras, no times",
        "gallery           1 images, 1 people, 0 cameras, no cameras, no times",
        "not used          1 files, such as gone.jpg: in the table, but there is no such file",
    ]
    assert json.loads((tmp_path / "data.json").read_text())["splits"]["gallery"]["images"] == 1
    for line in ('{"a": 1}', "[1]", "no"):
        (clouds / "failures.jsonl").write_text(line)
        code, _, err = call(capsys, "doctor", "--data", clouds)
        assert code == 1 and "failures.jsonl: not the failures of a conversion" in err
    code, out, _ = call(capsys, "doctor", "--data", people)
    assert code == 0 and out.startswith(f"Market-1501's layout in {people}\ntrain ")
    code, _, err = call(capsys, "doctor", "--data", tmp_path / "no")
    assert code == 1 and "root: no such folder or image" in err


@pytest.fixture(scope="module")
def photos(people, tmp_path_factory):
    """A folder of images that say nothing of who is on them, and a file that is none."""
    folder = tmp_path_factory.mktemp("cli") / "photos"
    folder.mkdir()
    for number, image in enumerate(sorted(people.glob("*/*.jpg"))[:5]):
        (folder / f"photo {number}.jpg").write_bytes(image.read_bytes())
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no more")
    return folder


def test_search_among_photos(photos, run, capsys, tmp_path):
    photo, saved, page = photos / "photo 3.jpg", tmp_path / "photos.safetensors", tmp_path / "page.html"
    argv = ("search", "--query", photo, "--weights", run, "-k", "3")
    code, out, err = call(capsys, *argv, "--gallery", photos, "--save", saved, "--out", page)
    assert code == 0, err
    header, first, *others, last = out.splitlines()
    assert header == "rank  similarity  name" and first == "   1      1.0000  photo 3.jpg" and last == str(page)
    assert len(others) == 2 and all(line.split()[2] == "photo" for line in others)
    assert f"reid3d: 1 files of {photos} gave no cloud, such as broken.jpg: broken image" in err
    assert len(json.loads(re.search(r'id="report">(.*?)</script>', page.read_text())[1])["rows"]) == 1
    features = reid3d.Features.load(saved)
    assert features.names == [f"photo {i}.jpg" for i in range(5)] and features.source == ""

    shutil.copytree(photos, tmp_path / "photos")
    shutil.copy(saved, tmp_path / "photos")  # does not make it a folder of clouds
    assert call(capsys, *argv, "--gallery", tmp_path / "photos")[1].splitlines() == [header, first, *others]

    code, again, err = call(capsys, *argv, "--gallery", saved, "--json", tmp_path / "found.json")
    assert code == 0 and again.splitlines() == [header, first, *others], err
    (found,) = json.loads((tmp_path / "found.json").read_text())["matches"]
    assert found["query"] == "photo 3.jpg" and [match["rank"] for match in found["matches"]] == [1, 2, 3]
    assert found["matches"][0]["name"] == "photo 3.jpg" and found["matches"][0]["similarity"] == 1.0
    code, _, err = call(capsys, *argv, "--gallery", saved, "--out", page)
    assert code == 1 and "--out shows clouds, and those of the gallery were not kept" in one_error(err)


def test_search_in_clouds_and_features(run, data, capsys, tmp_path):
    assert call(capsys, "eval", run, data, "--features", tmp_path / "f")[0] == 0
    folder = ("search", "--query", tmp_path / "f", "--gallery", tmp_path / "f", "--cross-camera")
    code, from_features, err = call(capsys, *folder)
    assert code == 0, err
    clouds = ("search", "--query", data, "--gallery", data, "--weights", run / "model.safetensors", "--cross-camera")
    assert call(capsys, *clouds)[:2] == (0, from_features)
    lines = from_features.splitlines()
    assert [line for line in lines if line.startswith("query ")] == [
        f"query {name}" for name in reid3d.open_dataset(data).query.names
    ]
    page = tmp_path / "page.html"
    assert call(capsys, *folder, "--out", page)[1].splitlines() == [*lines, str(page)]
    code, _, err = call(capsys, *clouds[:-1], "--gallery", tmp_path / "f" / "query.safetensors", "-k", "1")
    assert code == 0, err


def test_search_by_an_index(run, capsys, tmp_path):
    import numpy as np

    rng = np.random.default_rng(0)
    feats = rng.standard_normal((400, 16)).astype(np.float32)
    known = np.arange(1, 401)
    names = [f"{i}.jpg" for i in range(399)] + ["a\nb"]
    for name, rows in (("g", slice(None)), ("q", slice(395, 400))):
        some = reid3d.Features(feats[rows], known[rows], known[rows], names[rows], made_by="x")
        some.save(tmp_path / f"{name}.safetensors")
    index = tmp_path / "g.faiss"
    assert call(capsys, "export-features", tmp_path / "g.safetensors", index)[:2] == (0, f"{index}\n")
    argv = ("search", "--query", tmp_path / "q.safetensors", "--gallery", tmp_path / "g.safetensors", "-k", "1")
    code, out, err = call(capsys, *argv, "--index", index)
    assert code == 0, err
    assert [line.split()[-1] for line in out.splitlines()[2::3]] == [*names[395:399], r"a\nb"]
    assert call(capsys, *argv)[1] == out
    code, out, _ = call(capsys, *argv, "--cross-camera")
    assert code == 0 and "1.0000" not in out
    none = tmp_path / "none.safetensors"
    reid3d.Features.load(tmp_path / "g.safetensors").subset(known[:0]).save(none)
    code, _, err = call(capsys, *argv[:3], "--gallery", none, "--index", index)
    assert code == 1 and "index must be of the gallery's 0 items" in one_error(err)
    code, _, err = call(capsys, "export-features", tmp_path, tmp_path / "g.npy")
    assert code == 1 and "is a folder: give a feature file" in one_error(err)
    npy = tmp_path / "g.npy"
    assert call(capsys, "export-features", tmp_path / "g.safetensors", npy)[1] == f"{npy}\n{npy.with_suffix('.csv')}\n"
    assert np.load(npy).shape == (400, 16)


def test_what_cannot_be_searched(run, photos, data, capsys, tmp_path):
    import numpy as np

    def save(name, dim=512, names=("a", "b"), **more):
        count = len(names)
        feats, people = np.ones((count, dim), np.float32), np.full(count, -1)
        reid3d.Features(feats, people, people, list(names), **more).save(tmp_path / name)
        return tmp_path / name

    photo, empty, text, none = photos / "photo 0.jpg", tmp_path / "empty", tmp_path / "a.txt", tmp_path / "none"
    empty.mkdir()
    text.write_text("x")
    plain, other = save("plain.safetensors"), save("other.safetensors", made_by="another")
    narrow, twice = save("narrow.safetensors", dim=3), save("twice.safetensors", names=("a", "b", "a"))
    cases = [
        (none, plain, [], f"no such query: {none}"),
        (plain, none, [], f"no such gallery: {none}"),
        (plain, empty, ["--weights", run], "src holds no crops to convert"),
        (text, plain, ["--weights", run], "a.txt: not an image name"),
        (photos / "broken.jpg", plain, ["--weights", run], "broken.jpg could be used: broken.jpg: broken image"),
        (photo, plain, ["--weights", none], f"no weights at {none}"),
        (photo, other, ["--weights", run], "q and g must be features of one model, got made_by"),
        (plain, narrow, [], "features of the same dimension, got 512 and 3"),
        (plain, twice, [], "names must differ, got a more than once in"),
        (plain, run / "model.safetensors", [], "is not a reid3d feature file"),
        (plain, plain, ["--cross-camera"], "--cross-camera needs to know people: nothing in"),
        (plain, plain, ["--index", none], f"no such index: {none} (reid3d export-features GALLERY {none} makes it)"),
        (plain, plain, ["--device", "abacus"], "device 'abacus' cannot be used"),
    ]
    for query, gallery, more, message in cases:
        code, out, err = call(capsys, "search", "--query", query, "--gallery", gallery, *more)
        assert (code, out) == (1, ""), message
        assert message in one_error(err), err
    code, out, _ = call(capsys, "search", "--query", plain, "--gallery", save("n.safetensors", names=()))
    assert (code, out) == (0, "query a\nno match\nquery b\nno match\n")
    code, _, err = call(capsys, "export-features", none, tmp_path / "f.npy")
    assert code == 1 and f"no such feature file: {none}" in one_error(err)


@pytest.mark.parametrize("suffix", ["ply", "obj", "glb"])
def test_convert_one_image_to_a_file(people, capsys, tmp_path, suffix):
    import reid3d.formats as formats

    image, out = sorted(people.glob("query/*.jpg"))[0], tmp_path / f"a.{suffix}"
    code, text, err = call(capsys, "convert", image, out, "--mode", "surface", "--json", tmp_path / "r.json")
    assert (code, text, err) == (0, f"{out}\n", "")
    assert json.loads((tmp_path / "r.json").read_text()) == {"out": str(out)}
    if suffix == "glb":
        verts, faces, rgb = formats.read_glb(out)
        assert len(verts) == len(rgb) == 6872 and len(faces) == 13717
    else:
        cloud = formats.read_ply(out) if suffix == "ply" else formats.read_obj(out)
        assert len(cloud) == 8192


def test_convert_one_image_to_a_file_of_an_unknown_kind(people, capsys, tmp_path):
    image, out = sorted(people.glob("query/*.jpg"))[0], tmp_path / "a.xyz"
    code, _, err = call(capsys, "convert", image, out)
    assert code == 2 and f"must end in .ply, .obj or .glb, or be a folder, got {out}" in err and not out.exists()
    out.mkdir()
    assert call(capsys, "convert", image, out, "--workers", "1")[0] == 0 and (out / "dataset.json").is_file()


def test_convert_there_and_back(people, capsys, tmp_path):
    from reid3d.data import open_dataset

    clouds, tree, back = tmp_path / "clouds", tmp_path / "tree", tmp_path / "back"
    code, text, _ = call(
        capsys, "convert", people, clouds, "--workers", "1", "--official", "--json", tmp_path / "r.json"
    )
    assert code == 0 and "clouds written" in text and "the worst: worst.png" in text
    count = json.loads((tmp_path / "r.json").read_text())["written"]
    assert count == json.loads((tmp_path / "r.json").read_text())["quality"]["clouds"] > 5
    assert call(capsys, "convert", "--verify", clouds)[:2] == (0, f"{clouds}: whole\n")
    exported = call(capsys, "convert", clouds, tree, "--to", "obj", "--json", tmp_path / "t.json")
    assert exported[:2] == (0, f"{count} files written\n")
    assert json.loads((tmp_path / "t.json").read_text()) == {"written": count}
    assert call(capsys, "convert", tree, back, "--workers", "1")[0] == 0
    assert len(open_dataset(back).query) == len(open_dataset(clouds).query) > 0
    shard = clouds / "query-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0\0")
    code, out, err = call(capsys, "convert", "--verify", clouds, "--json", tmp_path / "v.json")
    assert code == 1 and str(shard) in out and one_error(err) == f"reid3d: error: 1 problems in {clouds}"
    assert len(json.loads((tmp_path / "v.json").read_text())["problems"]) == 1


def test_doctor(capsys, tmp_path):
    code, out, _ = call(capsys, "doctor", "--json", tmp_path / "doctor.json")
    assert code == 0 and "torch" in out
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert f"open3d    {found['open3d']}" in out.splitlines()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"ops": {"cpu": {"knn": "ok", "group_max": "failed: x"}}}, "not all ops work: group_max on cpu"),
        ({"extension_error": "_C.so cannot be loaded"}, "_C.so cannot be loaded"),
    ],
)
def test_doctor_fails_when_something_does_not_work(capsys, monkeypatch, change, line):
    from reid3d import doctor

    found = {**doctor.report(), **change}
    monkeypatch.setattr(doctor, "report", lambda: found)
    code, _, err = call(capsys, "doctor")
    assert (code, err) == (1, f"reid3d: error: {line}\n")


def test_inputs_that_are_not_there_or_not_of_that_kind(run, data, capsys, tmp_path):
    file, empty = tmp_path / "file", tmp_path / "empty"
    file.write_text("x")
    empty.mkdir()
    none = tmp_path / "none"
    cases = [
        (["eval", none, data], "no weights at"),
        (["eval", empty, data], "model.safetensors (is the training done?)"),
        (["eval", file, data], "weights must be a safetensors file"),
        (["eval", run, none], "no such folder"),
        (["eval", run, file], "no such folder"),
        (["eval", run, empty], "holds no cloud shards"),
        (["eval", run, data, "--features", file], "File exists"),
        (["eval", run, none, "--device", "abacus"], "device 'abacus' cannot be used"),
        (["bench", "kernels", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["bench", "kernels", "--json", file / "f.json"], str(file)),
        (["bench", "kernels", "--json", empty], f"Is a directory: {empty}"),
        (["eval", run, none, "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["train", "--data", none, "--out", tmp_path / "run", "--train.device", "hpu"], "device 'hpu' cannot be used"),
        (["view", none], "no such folder of a run or of features"),
        (["view", file], "no such folder of a run or of features"),
        (["view", empty], "no such feature file"),
        (["convert", none, tmp_path / "out"], str(none)),
        (["convert", "--verify", none], str(none)),
        (["convert", file, tmp_path / "out.ply"], "not a JPEG, PNG, BMP or WebP image"),
        (["convert", none, tmp_path / "out", "--to", "obj"], str(none)),
        (["convert", run, tmp_path / "out", "--fitter", "best"], "src holds no crops"),
        (["convert", empty, tmp_path / "out"], str(empty)),
        (["synth", file], str(file)),
        (["train", "--data", none, "--out", tmp_path / "run"], str(none)),
    ]
    for argv, message in cases:
        code, out, err = call(capsys, *argv)
        assert (code, out) == (1, ""), argv
        assert message in one_error(err), argv


def test_a_data_set_without_query(run, capsys, tmp_path):
    root = write_capsules(tmp_path / "clouds", ids=2)
    code, _, err = call(capsys, "eval", run, root)  # two people: both splits hold one of them
    assert code == 0
    for path in root.glob("query*"):
        path.unlink()
    code, _, err = call(capsys, "eval", run, root)
    assert code == 1 and "has no query clouds" in one_error(err)


def test_queries_without_a_match_are_named_before_any_work(run, capsys, tmp_path):
    code, _, err = call(capsys, "eval", run, write_capsules(tmp_path / "clouds", ids=2, cams=1))
    assert code == 1 and "1 of 1 queries have no match from another camera in the gallery: query/0002" in one_error(err)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "reid3d: interrupted; run the same command again to go on"),
        (OSError(28, "No space left on device", "x.json"), 1, "reid3d: error: No space left on device: x.json"),
        (RuntimeError("out of memory\nadvice\n"), 1, "reid3d: error: out of memory"),
        (ValueError("a\n  b"), 1, "reid3d: error: a b"),
        (
            ValueError(
                "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback:\nValueError: a.jpg: b: c"
            ),
            1,
            "reid3d: error: a.jpg: b: c",
        ),
        (MemoryError(), 1, "reid3d: error: MemoryError"),
    ],
)
def test_failures_are_one_line(error, code, line, capsys, monkeypatch):
    def fail(options):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "doctor", fail)
    assert call(capsys, "doctor") == (code, "", line + "\n")
    monkeypatch.setenv("REID3D_DEBUG", "1")
    with pytest.raises(type(error)):
        cli.main(["doctor"])


def test_our_own_bugs_keep_their_traceback(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "doctor", lambda options: {}["missing"])
    with pytest.raises(KeyError):
        cli.main(["doctor"])


def command(*argv, **more) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "reid3d", *map(str, argv)], capture_output=True, text=True, **more)


def test_as_a_program(tmp_path):
    assert command("--version").stdout == f"reid3d {reid3d.__version__}\n"
    missing = command("view", tmp_path / "none")
    assert (missing.returncode, missing.stdout) == (1, "") and one_error(missing.stderr)
    assert command("eval").returncode == 2
    shown = command("view", tmp_path / "none", env={**os.environ, "REID3D_DEBUG": "1"})
    assert shown.returncode == 1 and "Traceback" in shown.stderr


def test_help_loads_no_dependency():
    code = (
        "import sys\nfrom reid3d.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "jsonargparse", "PIL", "tqdm", "safetensors"} & set(loaded)


def test_ctrl_c(tmp_path):
    """An interrupt while a command works: 130, the hint, no traceback."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time\nfrom reid3d import cli\n"
        "def slow(options):\n    print('working', flush=True)\n    time.sleep(60)\n"
        "cli.COMMANDS['doctor'] = slow\nsys.exit(cli.main(['doctor']))\n"
    )
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "working\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err == "reid3d: interrupted; run the same command again to go on\n"
