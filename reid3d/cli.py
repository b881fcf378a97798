"""The command `reid3d`: one sub-command a stage, each reads files and writes files and can be run again.

Exit codes: 0 done, 1 failed with one line saying why, 2 bad usage, 130 interrupted. REID3D_DEBUG=1 shows tracebacks.
Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from . import __version__

JSON_HELP = "write the figures as JSON too"
CALIBRATION = "calibration.json"  # beside the weights
CLOUD_FILES = (".ply", ".obj", ".glb")
PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
RATES = (0.01, 0.001)  # of false matches
STUDIES = (
    *("inputs", "background", "models", "transfer", "components", "graphs", "shortcut", "k", "density", "views", "fit"),
    *("postproc", "plr_osnet", "relation", "rmgl"),
)
CLOCKS = ("frames", "seconds", "market-continuous", "market-official", "duke")
KNOBS = {  # of a synthetic world
    "ids": "identities, half of them for training",
    "cams": "cameras",
    "tracklets": "passages of each person through each camera",
    "images": "crops of each passage",
    "frames": "frames that a passage lasts, at 25 a second",
    "distractors": "boxes of strangers in the gallery, relative to the others",
    "junk": "badly cut boxes, the same",
    "look_alikes": "share of people dressed like another",
    "clothes_change": "share of passages in other clothes",
    "colour_cast": "how far the cameras' colours lie apart, about 1",
    "occlusion": "how often something stands before people, 0 to 1",
    "viewpoint": "how far the cameras' directions lie apart, 0 to 1",
    "detector": "how far boxes lie from people, about 1",
    "background": "share of training passages before a backdrop of the person's own",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name); returns the exit code, or exits on --help and bad usage."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if options.command is None:
        parser.error(f"a command is needed: {', '.join(COMMANDS)}")
    if options.command == "train":
        options.config = rest  # a recipe and values for the fields of TrainConfig
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        COMMANDS[options.command](options)
    except (KeyboardInterrupt, OSError, ValueError, RuntimeError, MemoryError, ImportError) as error:
        if os.environ.get("REID3D_DEBUG") == "1":
            raise
        code, message = _explain(error)
        print(f"reid3d: {message}", file=sys.stderr)
        return code
    return 0


class _UsageError(ValueError):
    """What was typed cannot be meant."""


def _explain(error: BaseException) -> tuple[int, str]:
    """Exit code and one line."""
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; run the same command again to go on"
    message = str(error).strip() or type(error).__name__
    if message.startswith("Caught ") and "DataLoader worker" in message:
        message = message.splitlines()[-1].partition(": ")[2]  # all before it is the traceback of the other process
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror + (f": {error.filename}" if error.filename else "")
    elif isinstance(error, RuntimeError):
        message = message.splitlines()[0]  # torch adds advice for programmers
    return 2 if isinstance(error, _UsageError) else 1, f"error: {' '.join(message.split())}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"reid3d: error: {message} (see {self.prog} --help)\n")


def _parser() -> _Parser:
    parser = _Parser(prog="reid3d", description="Person re-identification in 3D space.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"reid3d {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, help: str, **more: Any) -> argparse.ArgumentParser:
        about = help[0].upper() + help[1:] + "."
        return commands.add_parser(name, help=help, description=about, allow_abbrev=False, **more)

    synth = command("synth", "write synthetic pedestrians in the layout of Market-1501")
    synth.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    preset_help = "how hard it is (default: %(default)s)"
    synth.add_argument("--preset", choices=["easy", "standard", "hard"], default="standard", help=preset_help)
    world_help = "of two that share neither people nor cameras (default: %(default)s)"
    synth.add_argument("--world", choices=["A", "B"], default="A", help=world_help)
    _number(synth, "--seed", 0, "same seed, same bytes", least=0, most=2**63 - 1)
    _number(synth, "--workers", None, "processes (default: as many as cores)")
    knobs = synth.add_argument_group("knobs", "see docs/synth.md")
    for flag, help in KNOBS.items():
        whole = flag in ("ids", "cams", "tracklets", "images", "frames")
        knobs.add_argument(
            f"--{flag.replace('_', '-')}",
            metavar="N" if whole else "X",
            type=_knob(whole),
            help=f"{help} (default: the preset's)",
        )

    convert = command("convert", "turn pedestrian crops into clouds; a second call goes on where the first stopped")
    src_help = (
        "folder of a data set in any usual layout or of crops, table.csv, image, or published tree of .obj clouds"
    )
    convert.add_argument("src", metavar="SRC", nargs="?", type=Path, help=src_help)
    out_help = "folder of shards to write; for one image also FILE.ply or .obj (its cloud) or .glb (the fitted mesh)"
    convert.add_argument("out", metavar="OUT", nargs="?", type=Path, help=out_help)
    making = convert.add_argument_group("how a crop becomes a cloud")
    fitter_help = "default, mean, spin:FILE, hmr2:FILE or params:FILE.npz (default: %(default)s)"
    making.add_argument("--fitter", metavar="KIND[:FILE]", default="default", help=fitter_help)
    making.add_argument(
        "--body", metavar="FILE", type=Path, help="your SMPL file or its folder (default: embedded body)"
    )
    mode_help = "paper: one vertex a pixel; dense: all seen vertices; surface: all pixels (default: %(default)s)"
    modes = making.add_mutually_exclusive_group()
    modes.add_argument("--mode", choices=("paper", "dense", "surface"), default="paper", help=mode_help)
    modes.add_argument("--official", action="store_true", help="the published converter's rules (default: off)")
    _number(making, "--height", 128, "height in pixels that crops are resized to", least=8)
    _number(making, "--width", 64, "width in pixels that crops are resized to", least=8)
    confidence_help = "a fit with less becomes an upright body, and the manifest says so (default: %(default)s)"
    making.add_argument("--min-confidence", metavar="P", type=_share, default=0.1, help=confidence_help)
    refine_help = "2D keypoints (OpenPose, COCO, .npz) or a folder of masks to refine the fits by; may be repeated"
    refine_help += " (default: no refinement)"
    making.add_argument("--refine", metavar="PATH", type=Path, action="append", default=[], help=refine_help)
    work = convert.add_argument_group("how the work is done")
    _number(work, "--workers", None, "processes (default: as many as cores, 1 with a GPU)")
    work.add_argument("--shard", metavar="I/N", type=_part, default=(0, 1), help="make part I of N (default: 0/1)")
    work.add_argument("--engine", choices=("local", "ray"), default="local", help="default: %(default)s")
    _number(work, "--batch", 64, "crops fitted at once")
    _number(work, "--shard-size", 1024, "clouds per file")
    distractors_help = "Market-1501's 500k distractors, in images/, join the gallery (default: off)"
    work.add_argument("--distractors", action="store_true", help=distractors_help)
    other = convert.add_argument_group("other ways to use it")
    verify_help = "check every byte of a folder of shards, and nothing else (default: off)"
    other.add_argument("--verify", metavar="DIR", type=Path, help=verify_help)
    to_help = "SRC is a folder of shards: write a file for each cloud, obj as published (default: off)"
    other.add_argument("--to", choices=("obj", "ply"), help=to_help)
    other.add_argument("--json", metavar="FILE", type=Path, help=JSON_HELP)

    # Its other options are the fields of TrainConfig, which _train reads.
    train = command("train", "train a network; a second call goes on from the last epoch", add_help=False)
    train.add_argument("-h", "--help", action="store_true")
    train.add_argument("--json", metavar="FILE", type=Path, help=JSON_HELP)

    evaluate = command("eval", "extract the features of query and gallery and score the ranking")
    run_help = "folder of a run, or weights file"
    evaluate.add_argument("weights", metavar="RUN_OR_WEIGHTS", nargs="?", type=Path, help=run_help)
    data_help = "folder of shards with query and gallery"
    evaluate.add_argument("data", metavar="DATA", nargs="?", type=Path, help=data_help)
    ap_help = "definition of average precision (default: %(default)s)"
    evaluate.add_argument("--ap", choices=("market", "mean"), default="market", help=ap_help)
    evaluate.add_argument("--features", metavar="DIR", type=Path, help="default: features/ beside the weights")
    _number(evaluate, "--batch", 32, "clouds per step")
    _number(evaluate, "--workers", 0, "loader processes", least=0)
    _number(evaluate, "--points", None, "points per cloud (default: as trained)")
    evaluate.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: %(default)s)")
    evaluate.add_argument("--json", metavar="FILE", type=Path, help=JSON_HELP)
    more = evaluate.add_argument_group("what else is scored")
    rerank_help = "k-reciprocal re-ranking (default: off)"
    more.add_argument("--rerank", action="store_true", help=rerank_help)
    clock_help = "TLift by the times of the images, on this clock: see docs/retrieval.md (default: off)"
    more.add_argument("--tlift", metavar="CLOCK", choices=CLOCKS, help=f"{', '.join(CLOCKS)}: {clock_help}")
    other = evaluate.add_argument_group("other ways to use it")
    rates_help = "after RUN and DATA: find thresholds for these rates of false matches, for calibration.json beside RUN"
    other.add_argument("--calibrate", metavar="RATE", type=_rate, nargs="*", help=f"{rates_help} (default: 0.01 0.001)")
    matrix_help = "without RUN and DATA: score each of these runs on each data set of --on, the table of the papers"
    other.add_argument("--matrix", metavar="RUN", nargs="+", type=Path, help=f"{matrix_help} (default: off)")
    other.add_argument("--on", metavar="DATA", nargs="+", type=Path, help="data sets of --matrix (default: none)")

    find = command("search", "find the people most like those of QUERY, in photos, clouds or features")
    query_help = "image, folder of images, folder of clouds, or feature file"
    find.add_argument("--query", metavar="QUERY", type=Path, required=True, help=query_help)
    gallery_help = "what to search: the same, or a folder that reid3d eval wrote features to"
    find.add_argument("--gallery", metavar="GALLERY", type=Path, required=True, help=gallery_help)
    weights_help = "folder of a run, or weights file, for what is not a feature file (default: none)"
    find.add_argument("--weights", metavar="RUN_OR_WEIGHTS", type=Path, help=weights_help)
    _number(find, "-k", 10, "matches for each query")
    camera_help = "leave out junk, and the query's person in the query's camera (default: off)"
    find.add_argument("--cross-camera", action="store_true", help=camera_help)
    index_help = "index of the gallery's features, by reid3d export-features (default: none, all are compared)"
    find.add_argument("--index", metavar="FILE", type=Path, help=index_help)
    save_help = "write the gallery's features, to search them again (default: not kept)"
    find.add_argument("--save", metavar="FEATURES", type=Path, help=save_help)
    fmr_help = "say who is the same person, at this rate of false matches, one of reid3d eval --calibrate"
    find.add_argument("--fmr", metavar="RATE", type=_rate, help=f"{fmr_help} (default: its lowest, if there is one)")
    find.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: %(default)s)")
    find.add_argument("--out", metavar="PAGE", type=Path, help="write an HTML page of the matches too")
    find.add_argument("--json", metavar="FILE", type=Path, help="write the matches as JSON too")

    export = command("export-features", "write features for other tools, or an index for reid3d search")
    export.add_argument("features", metavar="FEATURES", type=Path, help="feature file")
    to_help = "NAME.npy (with NAME.csv), NAME.parquet, or NAME.faiss, an index of the features"
    export.add_argument("out", metavar="OUT", type=Path, help=to_help)

    view = command("view", "write a page of ranked matches as clouds that the mouse turns, and curves; or a picture")
    view.add_argument("what", metavar="RUN", type=Path, help="folder of a run, or of features, or clouds (see below)")
    out_help = "a page, a folder for a page of thousands of queries, or a picture (default: %(default)s)"
    view.add_argument("--out", metavar="FILE|DIR", type=Path, default=Path("ranks.html"), help=out_help)
    view.add_argument("--data", metavar="DIR", type=Path, help="default: the folder the features were made from")
    _number(view, "--queries", 12, "queries to show")
    _number(view, "-k", None, "matches beside each query (default: 6 in a page, 5 in Open3D)")
    window = view.add_argument_group("Open3D, in place of a page")
    window.add_argument("--open3d", action="store_true", help="a window with a query and its matches, and keys")
    window.add_argument("--png", metavar="FILE", type=Path, help="the same as a picture, without a display")
    window.add_argument("--query", metavar="QUERY", default="0", help="the first, by its name or number (default: 0)")
    of_clouds = (
        "RUN is a cloud (.ply, .obj, .glb), PATH:INDEX or PATH:NAME, one of a folder of clouds or of a shard, or"
    )
    of_clouds += " one of these, for the least trusted in it; --out FILE.png"
    of_cloud = view.add_argument_group("pictures of clouds", of_clouds)
    _number(of_cloud, "--count", 24, "clouds of a folder to show")
    why_about = "RUN is the folder of a run, with features/ of reid3d eval, or its weights; --out FILE.png"
    why = view.add_argument_group("what a model finds alike", why_about)
    explain_help = "show by what this query, by its name or number, is like its best matches (default: off)"
    why.add_argument("--explain", metavar="QUERY", help=explain_help)
    clouds_help = "clouds of the same crops, to show the matches of QAConv in them too (default: none)"
    why.add_argument("--clouds", metavar="DIR", type=Path, help=clouds_help)

    study = command("study", "train and test many networks under the same conditions; a second call goes on")
    study_help = f"compare: a table of --models; a table of the papers: {', '.join(STUDIES)}"
    study.add_argument("study", metavar="NAME", choices=("compare", *STUDIES), help=study_help)
    models_help = "of compare: recipes (packaged or YAML files), or models, trained by the defaults"
    study.add_argument("--models", metavar="RECIPE", nargs="+", help=models_help)
    images_help = (
        "images in any usual layout, with train, query and gallery; converted for networks of clouds; for transfer two"
    )
    study.add_argument("--data", metavar="IMAGES", type=Path, nargs="+", required=True, help=images_help)
    study.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of clouds, runs and tables")
    budget_help = "of a table: cpu (small networks, hours), gpu, paper (the published recipes) (default: %(default)s)"
    study.add_argument("--budget", choices=("cpu", "gpu", "paper"), default="cpu", help=budget_help)
    _number(study, "--seeds", 1, "runs of each, from seed 0")
    _number(study, "--epochs", None, "epochs of each run (default: the recipe's)")
    for name, models in (("osnet", "PLR-OSNet"), ("resnet50", "the other 2D methods")):
        begin_help = f"weights of ImageNet that {models} begin with in a table (default: from scratch)"
        study.add_argument(f"--{name}", metavar="FILE", type=Path, help=begin_help)
    study.add_argument("--clock", choices=CLOCKS, default="frames", help="of the images' times (default: %(default)s)")
    study.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: %(default)s)")
    study.add_argument("--json", metavar="FILE", type=Path, help=JSON_HELP)

    doctor = command("doctor", "say what is installed and compiled, and whether it works")
    data_help = "say what data set DIR holds, and what is missing from it: images or clouds (default: none)"
    doctor.add_argument("--data", metavar="DIR", type=Path, help=data_help)
    doctor.add_argument("--json", metavar="FILE", type=Path, help=JSON_HELP)

    bench = command("bench", "time the ops and OG-Net beside what else computes the same")
    suite_help = "what to time: kernels, or train (steps of OG-Net)"
    bench.add_argument("suite", metavar="SUITE", choices=("kernels", "train"), help=suite_help)
    device_help = "cpu, cuda, cuda:1 (default: %(default)s)"
    bench.add_argument("--device", type=_cpu_or_cuda, default="cpu", help=device_help)
    _number(bench, "--threads", 1, "threads on the CPU", most=1024)
    seconds_help = "time for each way to compute each case (default: %(default)s)"
    bench.add_argument("--seconds", metavar="S", type=_seconds, default=1.0, help=seconds_help)
    bench.add_argument("--json", metavar="FILE", type=Path, help=JSON_HELP)
    return parser


def _number(
    parser: argparse._ActionsContainer,
    flag: str,
    default: int | None,
    help: str,
    least: int = 1,
    most: int | None = None,
) -> None:
    def number(text: str) -> int:
        if not (text.isascii() and text.isdigit() and least <= int(text) <= (most or int(text))):
            rule = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"must be a whole number {rule}, got {text!r}")
        return int(text)

    help += "" if default is None else " (default: %(default)s)"
    parser.add_argument(flag, metavar="N", type=number, default=default, help=help)


def _knob(whole: bool) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            return int(text) if whole else float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a {'whole ' if whole else ''}number, got {text!r}") from None

    return number


def _cpu_or_cuda(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    return text


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text!r}")
    return share


def _rate(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be above 0 and below 1, got {text}")


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
    if not found or not int(found[1]) < int(found[2]):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N - 1, got {text!r}")
    return int(found[1]), int(found[2])


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number greater than 0, got {text!r}")
    return seconds


def _synth(options: argparse.Namespace) -> None:
    from .preprocess.synth import synth
    from .preprocess.synth.world import PRESETS, check_world

    knobs = {name: value for name in KNOBS if (value := getattr(options, name)) is not None}
    try:
        check_world(replace(PRESETS[options.preset], **knobs))
    except ValueError as error:
        raise _UsageError(str(error)) from error
    how = {"preset": options.preset, "world": options.world, "seed": options.seed, "workers": options.workers}
    print(synth(options.out, **how, **knobs))


def _convert(options: argparse.Namespace) -> None:
    if options.verify:
        return _verify(options)
    missing = [name.upper() for name in ("src", "out") if getattr(options, name) is None]
    if missing:
        raise _UsageError(f"the following arguments are required: {', '.join(missing)} (see reid3d convert --help)")
    if options.to:
        from .formats import export_tree

        written = export_tree(options.src, options.out, format=options.to)
        print(f"{written} files written")
        if options.json:
            _write_json(options.json, {"written": written})
        return
    is_image = options.src.is_file() and options.src.suffix.lower() != ".csv"
    if is_image and options.out.suffix and not options.out.is_dir():
        return _convert_one(options)
    import torch

    from .preprocess.batch import convert_folder
    from .preprocess.convert import Recipe

    workers = options.workers or (1 if torch.cuda.is_available() else len(os.sched_getaffinity(0)))
    report = convert_folder(
        options.src,
        options.out,
        Recipe(**_recipe(options)),
        batch=options.batch,
        shard_size=options.shard_size,
        part=options.shard,
        workers=workers,
        engine=options.engine,
        distractors=options.distractors,
    )
    print(report)
    if options.json:
        from dataclasses import asdict

        _write_json(options.json, asdict(report))


def _recipe(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "fitter": options.fitter,
        "body": options.body,
        "mode": "official" if options.official else options.mode,
        "size": (options.height, options.width),
        "min_confidence": options.min_confidence,
        "refine": tuple(options.refine),
    }


def _convert_one(options: argparse.Namespace) -> None:
    """One image to the file that OUT names."""
    if options.out.suffix not in (".ply", ".obj", ".glb"):
        raise _UsageError(f"OUT of one image must end in .ply, .obj or .glb, or be a folder, got {options.out}")
    from .formats import write_glb, write_obj, write_ply
    from .preprocess.convert import convert, convert_mesh

    recipe = _recipe(options)
    if options.out.suffix == ".glb":
        of_mesh = {name: recipe[name] for name in ("fitter", "body", "min_confidence", "refine")}
        write_glb(options.out, *convert_mesh(options.src, **of_mesh))
    else:
        (write_ply if options.out.suffix == ".ply" else write_obj)(options.out, convert(options.src, **recipe))
    print(options.out)
    if options.json:
        _write_json(options.json, {"out": str(options.out)})


def _verify(options: argparse.Namespace) -> None:
    from .preprocess.batch import verify

    problems = verify(options.verify)
    for problem in problems:
        print(problem)
    if options.json:
        _write_json(options.json, {"problems": problems})
    if problems:
        raise RuntimeError(f"{len(problems)} problems in {options.verify}")
    print(f"{options.verify}: whole")


def _train(options: argparse.Namespace) -> None:
    from .config import config_parser, read_config, recipes

    if options.help:
        parser = config_parser(prog="reid3d train [RECIPE]")
        parser.description = (
            "Train a network; a second call goes on from the last epoch. RECIPE is a YAML file or one of: "
            f"{', '.join(recipes())}. Options override it."
        )
        parser.add_argument("--json", metavar="FILE", help=JSON_HELP)
        parser.print_help()
        return
    words = list(options.config)
    # Each option takes one value, as --key VALUE or --key=VALUE; the first word that is neither is the recipe.
    values = {n + 1 for n, word in enumerate(words) if word.startswith("--") and "=" not in word}
    at = next((n for n, word in enumerate(words) if n not in values and not word.startswith("-")), None)
    recipe = None if at is None else words.pop(at)
    try:
        config = read_config(recipe, words)
    except ValueError as error:
        raise _UsageError(f"{error} (see reid3d train --help)") from error
    from .train import train

    run = train(config)
    if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0":
        return  # the first of the processes says it
    if options.json:
        last = (run / "metrics.jsonl").read_text().splitlines()[-1]
        _write_json(options.json, {"run": str(run), **json.loads(last)})
    print(run)


def _eval(options: argparse.Namespace) -> None:
    if options.matrix or options.on:
        others = options.weights, options.features, options.rerank, options.tlift, options.calibrate is not None
        if any(others) or not (options.matrix and options.on):
            message = (
                "a matrix needs --matrix RUN... and --on DATA..., and no RUN, DATA, --features, --calibrate, --rerank"
            )
            message += " or --tlift"
            raise _UsageError(f"{message} (see reid3d eval --help)")
        _eval_matrix(options)
        return
    if options.data is None:
        raise _UsageError("RUN_OR_WEIGHTS and DATA are needed, or --matrix and --on (see reid3d eval --help)")
    weights = _weights(options.weights)
    folder = options.features or weights.parent / "features"
    if options.tlift:  # before hours of extraction
        from .data import open_dataset
        from .retrieval import clock_seconds

        dataset = open_dataset(options.data)
        clock_seconds(options.tlift, *_timed(options.tlift, dataset.query, dataset.gallery, dataset))
    dataset, model, points, query, gallery, result = _scored(weights, options.data, options, folder)
    figures = {
        "weights": str(weights),
        "trained_on": str(model.trained_on),
        "data": str(options.data),
        "points": points,
        **_figures(result),
        "version": __version__,
    }

    def save() -> None:  # after each part: what is known does not depend on what comes
        if options.json:
            _write_json(options.json, figures)

    print(result)
    print(f"features: {folder}")
    save()
    for name, found in _after(dataset, model, query, gallery, options):
        figures.setdefault("after", {})[name] = _figures(found)
        save()
    if options.calibrate is not None:
        from .retrieval import calibrate

        thresholds = calibrate(query, gallery, options.calibrate or RATES)
        thresholds.save(weights.parent / CALIBRATION)
        print(f"{thresholds}\ncalibration: {weights.parent / CALIBRATION}")
        figures["calibration"] = asdict(thresholds)
        save()


def _eval_matrix(options: argparse.Namespace) -> None:
    runs, data = ({_short(path, paths): path for path in paths} for paths in (options.matrix, options.on))
    weights = {name: _weights(path) for name, path in runs.items()}  # all there before the first is used
    found: dict[str, dict[str, Any]] = {name: {} for name in runs}
    wide = max(map(len, [*runs, "Rank-1 / mAP, %"]))
    columns = [max(len(name), len("100.0 / 100.0")) for name in data]
    print("  ".join([f"{'Rank-1 / mAP, %':<{wide}}", *(f"{name:>{n}}" for name, n in zip(data, columns, strict=True))]))
    for run in runs:
        for name, path in data.items():
            *_, result = _scored(weights[run], path, options)
            found[run][name] = _figures(result)
        cells = [f"{100 * found[run][name]['rank1']:.1f} / {100 * found[run][name]['mAP']:.1f}" for name in data]
        row = [f"{run:<{wide}}", *(f"{cell:>{n}}" for cell, n in zip(cells, columns, strict=True))]
        print("  ".join(row), flush=True)
    if options.json:
        paths = {"runs": {k: str(v) for k, v in runs.items()}, "data": {k: str(v) for k, v in data.items()}}
        _write_json(options.json, {**paths, "scores": found, "version": __version__})


def _short(path: Path, paths: list[Path]) -> str:
    """The name of its folder, if no other of the paths has it."""
    same = [other for other in paths if other.resolve().name == path.resolve().name]
    return path.resolve().name if len(same) == 1 else str(path)


def _weights(run: Path) -> Path:
    weights = run / "model.safetensors" if run.is_dir() else run
    if not weights.is_file():
        hint = " (is the training done?)" if run.is_dir() else ""
        raise FileNotFoundError(f"no weights at {weights}{hint}")
    return weights


def _scored(weights: Path, data: Path, options: argparse.Namespace, folder: Path | None = None) -> tuple[Any, ...]:
    """The data set, the model, its points of each cloud, the features of query and gallery, and how well they do."""
    from .data import open_dataset, validate_protocol
    from .models import create_model, resolve_device
    from .retrieval import evaluate, extract, pair_scores

    device = resolve_device(options.device)
    dataset = open_dataset(data)
    splits = {"query": dataset.query, "gallery": dataset.gallery}
    for name, split in splits.items():
        if not len(split):
            raise ValueError(f"{data} has no {name} {split.inputs}s: a folder in Market-1501's layout has them")
    if message := validate_protocol(dataset.query, dataset.gallery):
        print(f"reid3d: {message}", file=sys.stderr)
    model = create_model(weights=weights)
    if hasattr(model, "scores") and options.calibrate is not None:
        raise _UsageError(f"--calibrate compares features, and {model.name} has its own matcher")
    points = (options.points or _points(model)) if dataset.query.inputs == "cloud" else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    features = {
        name: extract(model, split, points=points, batch=options.batch, workers=options.workers, device=device)
        for name, split in splits.items()
    }
    if folder is not None:
        for name in splits:  # all there before one is written: they belong together
            features[name].save(_feature_file(folder, name))
    scores = pair_scores(model, features["query"], features["gallery"])
    result = evaluate(features["query"], features["gallery"], ap=options.ap, scores=scores)
    return dataset, model, points, features["query"], features["gallery"], result


def _after(
    dataset: Any, model: Any, query: Any, gallery: Any, options: argparse.Namespace
) -> Iterator[tuple[str, Any]]:
    """What re-ranking and times make of it, printed: each alone and both, as far as they are asked for."""
    from .retrieval import clock_seconds, evaluate, rerank, tlift

    if options.rerank or options.tlift:
        gallery = gallery.subset((gallery.pids != -1).nonzero()[0])  # junk is nobody's neighbour
    seconds = (
        clock_seconds(options.tlift, *_timed(options.tlift, query, gallery, dataset))[:2] if options.tlift else None
    )
    matcher = hasattr(model, "distances") and (options.rerank or bool(seconds))
    distances = model.distances(query, gallery) if matcher else None
    ways = {}
    if seconds:
        ways["times"] = tlift(query, gallery, None if distances is None else 1 - distances, seconds=seconds)
    if options.rerank:
        all_pairs = None
        if distances is not None:
            all_pairs = model.distances(query, query), distances, model.distances(gallery, gallery)
        ways["re-ranking"] = rerank(query, gallery, distances=all_pairs)
        if seconds:
            ways["re-ranking and times"] = tlift(query, gallery, ways["re-ranking"], seconds=seconds)
    for name, scores in ways.items():
        result = evaluate(query, gallery, options.ap, scores=scores)
        print(f"after {name}:\n{result}")
        yield name, result


def _timed(clock: str, query: Any, gallery: Any, dataset: Any) -> tuple[Any, ...]:
    """What the clock of a data set is made of: Market-1501's sessions are as long as the train split says, too."""
    return (query, gallery, dataset.train) if clock.startswith("market") else (query, gallery)


def _figures(result: Any) -> dict[str, Any]:
    return {
        "rank1": result.cmc[0],
        "rank5": result.cmc[4],
        "rank10": result.cmc[9],
        "mAP": result.mAP,
        "mINP": result.mINP,
        "ap": result.ap,
        "chance_rank1": result.chance.rank1,
        "chance_mAP": result.chance.mAP,
        "num_valid": result.num_valid,
        "num_query": result.num_query,
        "num_gallery": result.num_gallery,
    }


def _feature_file(folder: Path, split: str) -> Path:
    return folder / f"{split}.safetensors"


def _search(options: argparse.Namespace) -> None:
    sides = {"query": options.query, "gallery": options.gallery}
    for side, path in sides.items():
        if not path.exists():
            raise FileNotFoundError(f"no such {side}: {path}")
        for folder in (path, path / "features"):  # as reid3d eval leaves them, also beside the weights of a run
            if _feature_file(folder, side).is_file():
                sides[side] = _feature_file(folder, side)
                break
    made = [path for path in sides.values() if path.suffix != ".safetensors"]
    if made and not options.weights:
        raise _UsageError(f"--weights is needed: {made[0]} is not a feature file (see reid3d search --help)")
    from tempfile import TemporaryDirectory

    from .models import create_model, resolve_device
    from .retrieval import search

    device, calibration = resolve_device(options.device), _calibration(options)
    if options.index and not options.index.is_file():
        raise FileNotFoundError(
            f"no such index: {options.index} (reid3d export-features GALLERY {options.index} makes it)"
        )
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
    model = create_model(weights=_weights(options.weights)) if made else None
    if model is not None and hasattr(model, "scores"):
        raise ValueError(f"search compares features, and {model.name} has its own matcher: see model.scores")
    with TemporaryDirectory() as folder:
        query, gallery = (_features(path, side, Path(folder), model, device) for side, path in sides.items())
        if options.cross_camera and len(gallery) and (gallery.pids == -1).all():
            raise ValueError(f"--cross-camera needs to know people: nothing in {options.gallery} says who is who")
        if options.save:  # the clouds of photos do not stay
            passing = Path(gallery.source).is_relative_to(folder)
            (replace(gallery, source="", split="") if passing else gallery).save(options.save)
        if options.out:
            for side, features in (("query", query), ("gallery", gallery)):
                if not (features.source and Path(features.source).is_dir()):
                    hint = f"were in {features.source}, which is not there" if features.source else "were not kept"
                    raise FileNotFoundError(f"--out shows clouds, and those of the {side} {hint}")
        threshold = _threshold(options, calibration, query, gallery)
        ranks = search(query, gallery, options.k, cross_camera=options.cross_camera, device=device, index=options.index)
        found = [
            {
                "query": query.names[row],
                "matches": [
                    {"rank": place, "similarity": round(float(sim), 4), "name": gallery.names[item]}
                    | ({"same_person": bool(sim >= threshold.similarity)} if threshold else {})
                    for place, (item, sim) in enumerate(zip(ranks.idx[row], ranks.sim[row], strict=True), 1)
                    if item >= 0
                ],
            }
            for row in range(len(query))
        ]
        _print_matches(found)
        if threshold:
            share = f"as {100 * threshold.false_match:.3g} % of the pairs of different people were"
            print(f"same person: from similarity {threshold.similarity:.4f} on, {share}")
        if options.json:
            about = {"made_by": gallery.made_by, "version": __version__}
            _write_json(
                options.json, {"matches": found, "threshold": asdict(threshold) if threshold else None, **about}
            )
        if options.out:
            from .viewer import view

            print(view(ranks, options.out))


def _calibration(options: argparse.Namespace) -> Any:
    """What reid3d eval --calibrate left beside the weights, with the rate that was asked for; None where it did not."""
    from .retrieval import Calibration

    file = _weights(options.weights).parent / CALIBRATION if options.weights else None
    if file is None or not file.is_file():
        if options.fmr:
            raise FileNotFoundError("--fmr needs --weights RUN with a calibration: reid3d eval RUN DATA --calibrate")
        return None
    calibration = Calibration.load(file)
    calibration.threshold(options.fmr)
    return calibration


def _threshold(options: argparse.Namespace, calibration: Any, query: Any, gallery: Any) -> Any:
    """From which similarity on pairs are said to be one person; None where that is not known."""
    if calibration is None:
        return None
    if {query.made_by, gallery.made_by} != {calibration.made_by}:
        message = "the calibration is of other weights or points than these features: "
        message += "run reid3d eval --calibrate again, with points as trained"
        if options.fmr:
            raise ValueError(message)
        print(f"reid3d: {message}", file=sys.stderr)
        return None
    return calibration.threshold(options.fmr)


def _features(path: Path, side: str, folder: Path, model: Any, device: Any) -> Any:
    """Features of a feature file, or of images or clouds by the model; the clouds of images go into the folder."""
    from .data import open_dataset
    from .retrieval import Features, extract

    if path.suffix == ".safetensors":
        features = Features.load(path, mmap=True)
    else:
        items, cloud = path, model.inputs == "cloud"
        shards = path.glob("*.safetensors") if path.is_dir() else ()
        if cloud and not any(shard.with_suffix(".jsonl").is_file() for shard in shards):
            items = folder / side
            _convert_images(path, items)
        dataset = open_dataset(items)
        split = getattr(dataset, side)
        if not len(split):
            split = dataset.all  # of a folder without splits
        if not len(split):
            raise ValueError(f"{path} has no {side} {model.inputs}s")
        features = extract(model, split, points=_points(model) if cloud else None, device=device)
    if len(set(features.names)) < len(features):
        twice = next(name for name, count in Counter(features.names).items() if count > 1)
        raise ValueError(f"names must differ, got {twice} more than once in {path}")
    return features


def _convert_images(src: Path, out: Path) -> None:
    """Images to clouds by the embedded fitter; says how many gave none."""
    from .io import FAILURES_FILE
    from .preprocess.batch import convert_folder

    def failures() -> list[str]:
        path = out / FAILURES_FILE
        lines = path.read_text().splitlines() if path.is_file() else []
        return ["{name}: {reason}".format(**json.loads(line)) for line in lines]

    try:
        report = convert_folder(src, out)
    except ValueError as error:
        if some := failures():
            raise ValueError(f"no image in {src} could be used: {some[0]}") from error
        raise
    if report.failed:
        print(f"reid3d: {report.failed} files of {src} gave no cloud, such as {failures()[0]}", file=sys.stderr)


def _points(model: Any) -> int:
    from .data.transforms import EvalTransform

    return getattr(model, "points", None) or EvalTransform().points


def _print_matches(found: list[dict[str, Any]]) -> None:
    for one in found:
        if len(found) > 1:
            print(f"query {_printable(one['query'])}")
        calibrated = any("same_person" in match for match in one["matches"])
        head = "rank  similarity  same person  name" if calibrated else "rank  similarity  name"
        print(head if one["matches"] else "no match")
        for match in one["matches"]:
            said = f"{'yes' if match['same_person'] else 'no':>11}  " if calibrated else ""
            print(f"{match['rank']:>4}  {match['similarity']:>10.4f}  {said}{_printable(match['name'])}")


def _printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)[1:-1]


def _export_features(options: argparse.Namespace) -> None:
    if options.out.suffix not in (".npy", ".parquet", ".faiss"):
        raise _UsageError(
            f"OUT must end in .npy, .parquet or .faiss, got {options.out} (see reid3d export-features --help)"
        )
    from .retrieval import Features, build_index

    if options.features.is_dir():
        raise ValueError(f"{options.features} is a folder: give a feature file, such as gallery.safetensors in it")
    features = Features.load(options.features, mmap=True)
    if options.out.suffix == ".faiss":
        build_index(features, options.out)
        print(options.out)
    else:
        for path in features.export(options.out):
            print(path)


def _view(options: argparse.Namespace) -> None:
    if options.explain is not None:
        return _view_explained(options)
    if _are_clouds(options.what):
        return _view_clouds(options)
    what: Path = options.what
    if not what.is_dir():
        raise FileNotFoundError(f"no such folder of a run or of features: {what}")
    folder = what / "features" if (what / "features").is_dir() else what
    run = next((one for one in (what, what.parent) if (one / "config.yaml").is_file()), None)
    logged = (what / "metrics.jsonl").is_file()  # left by a training that was stopped, where it is all there is
    if (run == what or logged) and not all(_feature_file(folder, split).is_file() for split in ("query", "gallery")):
        return _view_unfinished(options, what)
    from .data import open_dataset
    from .retrieval import Features, search
    from .viewer import view
    from .viewer.html import MATCHES, ranked

    query, gallery = (Features.load(_feature_file(folder, split)) for split in ("query", "gallery"))
    if (query.made_by, query.source) != (gallery.made_by, gallery.source):
        raise ValueError(f"query and gallery in {folder} do not belong together: run reid3d eval again")
    if not (options.data or Path(query.source).is_dir()):
        raise FileNotFoundError(
            f"the clouds were in {query.source}, which is not there: --data DIR says where they are"
        )
    dataset = open_dataset(options.data) if options.data else None
    scores = _own_scores(run, query, gallery)
    k = options.k if options.k is not None else 5 if options.open3d or options.png else MATCHES
    if scores is None:
        ranks = search(query, gallery, k, cross_camera=True)
    else:
        ranks = ranked(query, gallery, scores, k)
    if options.open3d or options.png:
        _view_open3d(options, ranks, dataset, k)
    else:
        print(view(ranks, options.out, dataset=dataset, queries=options.queries, k=k, scores=scores, run=run))


def _view_unfinished(options: argparse.Namespace, run: Path) -> None:
    from .viewer.html import report

    if options.open3d or options.png:
        raise FileNotFoundError(f"{run} has no features to show: reid3d eval {run} DATA makes them")
    if (run / "model.safetensors").is_file():
        message = f"This run has no features of queries and gallery yet: reid3d eval {run} DATA makes them."
    else:
        message = "This run has no weights (model.safetensors): the reid3d train command that began it goes on with it."
    print(report(run, options.out, message))


def _own_scores(run: Path | None, query: Any, gallery: Any) -> Any:
    """Of a run whose model has a matcher, if the features are known to be its; else None: cosines."""
    from .models import create_model
    from .retrieval import pair_scores
    from .viewer.html import has_matcher

    if run is None or not (run / "model.safetensors").is_file() or not has_matcher(run):
        return None
    return pair_scores(create_model(weights=run / "model.safetensors"), query, gallery)


def _view_open3d(options: argparse.Namespace, ranks: Any, dataset: Any, k: int) -> None:
    from .viewer.o3d import Scene, render, show

    scene = Scene(ranks, dataset, _row(ranks.query.names, options.query, options.what), k)
    if options.png:
        print(render(scene, options.png))
    if options.open3d:
        show(scene)


def _are_clouds(path: Path) -> bool:
    """Whether it is, or would be, a file, a folder or an item of clouds, and no folder of features."""
    if path.is_dir():
        from .io import DATASET_FILE

        manifests = (shard.with_suffix(".jsonl") for shard in path.glob("[!.]*.safetensors"))
        return (path / DATASET_FILE).exists() or any(manifest.is_file() for manifest in manifests)
    if path.suffix in CLOUD_FILES:
        return True
    if path.is_file():
        return path.suffix == ".safetensors" and path.with_suffix(".jsonl").is_file()
    return _item(path) is not None


def _item(path: Path) -> tuple[Path, str] | None:
    """PATH and what comes behind the last colon with which PATH is there."""
    text = str(path)
    for colon in reversed(list(re.finditer(":", text))):
        if colon.start() and Path(text[: colon.start()]).exists():
            return Path(text[: colon.start()]), text[colon.end() :]
    return None


def _view_clouds(options: argparse.Namespace) -> None:
    """A cloud from all sides, or a sheet of those of a folder that are trusted least."""
    out = _picture_file(options)
    from .data.clouds import open_clouds
    from .io import Shard
    from .viewer.pictures import Item, contact_sheet, inspection

    path, wanted = options.what, None
    if path.suffix in CLOUD_FILES and (path.exists() or not _item(path)):
        return _save_picture(inspection(Item(_read_cloud(path), None, path.name)), out)
    if not path.exists() and (found := _item(path)):
        path, wanted = found
    if path.is_dir():
        dataset = open_clouds(path)
        splits = dataset.train, dataset.query, dataset.gallery, dataset.all
        places = [split.shard(i) for split in splits for i in range(len(split))]
    elif path.suffix != ".safetensors":
        raise ValueError(f"{path} is no folder of clouds and no shard, and has no item {wanted}")
    else:
        shard = Shard(path)
        places = [(shard, i) for i in range(len(shard))]
    records = [shard.records[i] for shard, i in places]
    if wanted is not None:
        return _save_picture(inspection(_open_item(*places[_row([r.name for r in records], wanted, path)])), out)
    trust = [record.quality.get("confidence", 2.0) for record in records]  # those of which nothing is known at the end
    least = sorted(range(len(places)), key=lambda k: trust[k])[: options.count]
    if not least:
        raise ValueError(f"{path} holds no clouds")
    _save_picture(contact_sheet([_open_item(*places[k]) for k in least]), out)


def _read_cloud(path: Path) -> Any:
    """The points of a file, or the vertices of a mesh."""
    import numpy as np

    from .cloud import PointCloud
    from .formats import read_glb, read_obj, read_ply

    if path.suffix == ".glb":
        verts, _, rgb = read_glb(path)
        return PointCloud(verts, rgb, np.arange(len(verts), dtype=np.int32))
    cloud = (read_ply if path.suffix == ".ply" else read_obj)(path)
    if not len(cloud):
        raise ValueError(f"{path}: a cloud without points")
    return cloud


def _open_item(shard: Any, i: int) -> Any:
    """A cloud of a shard, with the body that was fitted, where it is one that is known here."""
    import torch

    from .preprocess.body import axis_angle_to_matrix, load_body
    from .viewer.pictures import Item

    record, fitted, mesh = shard.records[i], shard.body(i), None
    if fitted and shard.config.get("body") == "embedded-full":
        body = load_body("full")
        pose, betas = (torch.from_numpy(fitted[name])[None] for name in ("pose", "betas"))
        mesh = body(axis_angle_to_matrix(pose), body.all_betas(betas)).verts[0], body.faces
    return Item(shard[i], record, record.name, mesh)


def _view_explained(options: argparse.Namespace) -> None:
    """A query, its best matches, and by what a model finds them alike."""
    out = _picture_file(options)
    weights = _weights(options.what)
    from .data import open_clouds, open_dataset
    from .models import create_model
    from .retrieval import Features
    from .viewer.explained import explained

    folder = weights.parent / "features"
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder of features: {folder} (reid3d eval {options.what} DATA writes it)")
    query, gallery = (Features.load(_feature_file(folder, split), mmap=True) for split in ("query", "gallery"))
    data = options.data or Path(query.source)
    if not data.exists():
        raise FileNotFoundError(f"what the features were made from was in {data}, which is not there: --data DIR")
    row = _row(query.names, options.explain, folder)
    model, dataset = create_model(weights=weights), open_dataset(data)
    clouds = open_clouds(options.clouds) if options.clouds else None
    _save_picture(explained(model, query, gallery, row, dataset, clouds=clouds), out)


def _row(names: Sequence[str], wanted: str, where: Path) -> int:
    """Of the one that is wanted by its name or, where none has it, its number."""
    if wanted in names:
        return list(names).index(wanted)
    if wanted.isascii() and wanted.isdigit() and int(wanted) < len(names):
        return int(wanted)
    raise ValueError(f"{where} holds {len(names)} items, from 0 on, and none named {_printable(wanted)}")


def _picture_file(options: argparse.Namespace) -> Path:
    out: Path = options.out
    if out.suffix.lower() not in PICTURES:
        raise _UsageError(f"--out must end in {', '.join(PICTURES)} for a picture, got {out} (see reid3d view --help)")
    return out


def _save_picture(picture: Any, out: Path) -> None:
    from .io import atomic_write

    with atomic_write(out) as file:
        picture.save(file, PICTURES[out.suffix.lower()], quality=90, optimize=True)
    print(out)


def _study(options: argparse.Namespace) -> None:
    from .studies import study
    from .study import compare, markdown, run_study

    if (options.study == "compare") != bool(options.models):
        raise _UsageError("--models are those of compare, which needs them")
    shared = {
        "seeds": options.seeds,
        "epochs": options.epochs,
        "device": options.device,
        "say": partial(print, file=sys.stderr, flush=True),
    }
    if options.models:
        if len(options.data) > 1:
            raise _UsageError(f"--data of compare must be one folder, got {len(options.data)}")
        table = compare(options.models, options.data[0], options.out, **shared)
    else:
        wanted = study(options.study, options.budget)
        files: dict[Any, Path] = {name: file for name in ("osnet", "resnet50") if (file := getattr(options, name))}
        table = run_study(wanted, options.data, options.out, clock=options.clock, backbones=files, **shared)
    print(f"{markdown(table)}\n\n{options.out / table['suite']}.json")
    if options.json:
        _write_json(options.json, table)


def _doctor(options: argparse.Namespace) -> None:
    from .doctor import format_data, format_report, report, report_data

    if options.data:
        held = report_data(options.data)
        print(format_data(held))
        if options.json:
            _write_json(options.json, held)
        return
    found = report()
    print(format_report(found))
    if options.json:
        _write_json(options.json, found)
    failed = [f"{op} on {device}" for device, ops in found["ops"].items() for op, said in ops.items() if said != "ok"]
    if found["extension_error"]:
        raise RuntimeError(found["extension_error"])
    if failed:
        raise RuntimeError(f"not all ops work: {', '.join(failed)}")


def _bench(options: argparse.Namespace) -> None:
    from .bench import run

    def measure() -> dict[str, Any]:
        return run(options.suite, options.device, options.threads, options.seconds, say=partial(print, flush=True))

    if options.json:
        _write_json(options.json, measure)
    else:
        measure()


def _write_json(path: Path, figures: dict[str, Any] | Callable[[], dict[str, Any]]) -> None:
    """Figures that take long are called for, when it is clear that the file can be written."""
    from .io import atomic_write

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        found = figures() if callable(figures) else figures
        file.write(json.dumps(found, indent=2).encode() + b"\n")


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "synth": _synth,
    "convert": _convert,
    "train": _train,
    "eval": _eval,
    "search": _search,
    "export-features": _export_features,
    "view": _view,
    "study": _study,
    "doctor": _doctor,
    "bench": _bench,
}
