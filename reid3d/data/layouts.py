"""The folders that data sets of crops lie in: the published ones, people's own, and what their names say.

A layout is known by its folders and lists, never by opening an image. How many images and people the published data
sets have is known too; a copy that differs is read all the same, and the listing says in which way it differs.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
SPLITS = ("train", "query", "gallery", "all")
MARKET = {"bounding_box_train": "train", "query": "query", "bounding_box_test": "gallery"}
DISTRACTORS = "images"  # where Market-1501's 500k lie
MSMT17 = {"list_train.txt": "train", "list_val.txt": "train", "list_query.txt": "query", "list_gallery.txt": "gallery"}
MSMT17_FOLDERS = {"MSMT17 V1": ("train", "test"), "MSMT17 V2": ("mask_train_v2", "mask_test_v2")}
PAIRS = {"cam_a": "query", "cam_b": "gallery"}
CUHK03 = "cuhk-03.mat"
IDENTITIES = {"train_all": "train", "train": "train", "val": "train", "query": "query", "gallery": "gallery"}
COLUMNS = ("path", "pid", "camid", "split", "time")
NO_NAME = "the name does not fit PID_cCAMERA..., such as 0002_c1s1_000451_03.jpg"
NO_EXTENSION = f"not an image name: the extension must be one of {' '.join(EXTENSIONS)}"
TWICE = "listed twice"
FRAMES_PER_SESSION = 1_000_000  # Market-1501 numbers frames with six digits
_NAME = re.compile(  # at most nine digits a number, so that all fit into 64 bits
    r"(?P<pid>-1|[0-9]{1,9})_c(?P<camid>[1-9][0-9]{0,8})"
    r"(?:s(?P<session>[1-9][0-9]{0,8})_(?P<frame>[0-9]{1,9})|_f(?P<f>[0-9]{1,9}))?[_.]"
)
_MSMT17_NAME = re.compile(r"[0-9]+_[0-9]+_(?P<camid>[0-9]{1,9})_")
_PAIR_NAME = re.compile(r"[^0-9]*(?P<pid>[0-9]{1,8})(?![0-9])")
_PID = re.compile(r"-1|[0-9]{1,9}")

# Which folder name tells of which data set, and its images and people in each split. Images of no person (0000, -1)
# count as images. MSMT17's training set is that of the papers: list_train and list_val.
PUBLISHED: dict[str, tuple[str, dict[str, tuple[int, int]]]] = {
    "Market-1501": (r"market[-_]?1501|market$", dict(train=(12936, 751), query=(3368, 750), gallery=(19732, 750))),
    "DukeMTMC-reID": (r"duke", dict(train=(16522, 702), query=(2228, 702), gallery=(17661, 1110))),
    "CUHK03-NP detected": (r"detected", dict(train=(7365, 767), query=(1400, 700), gallery=(5332, 700))),
    "CUHK03-NP labeled": (r"labeled", dict(train=(7368, 767), query=(1400, 700), gallery=(5328, 700))),
    "MSMT17 V1": (r"msmt17", dict(train=(32621, 1041), query=(11659, 3060), gallery=(82161, 3060))),
    "MSMT17 V2": (r"msmt17", dict(train=(32621, 1041), query=(11659, 3060), gallery=(82161, 3060))),
    "VIPeR": (r"viper", dict(query=(632, 632), gallery=(632, 632))),
}
_OF_LAYOUT = {
    "Market-1501's layout": ("Market-1501", "DukeMTMC-reID", "CUHK03-NP detected", "CUHK03-NP labeled"),
    "MSMT17 V1": ("MSMT17 V1",),
    "MSMT17 V2": ("MSMT17 V2",),
    "pairs": ("VIPeR",),
}

Rejected = list[tuple[str, str]]


@dataclass(frozen=True)
class ImageRecord:
    """One crop: its file, its name relative to the listed folder, and what folder and file name say of it."""

    path: Path
    name: str
    split: str
    pid: int
    camid: int
    time: int


class Listing(NamedTuple):
    """What `list_images` found.

    images: sorted by split (train, query, gallery, all) and name. rejected: (name, reason) of every file that is no
    crop. layout: in words, a published data set's name where it is one. root: the folder that names are relative to.
    notes: what is missing, or differs from the published data set, a line each.
    """

    images: list[ImageRecord]
    rejected: Rejected
    layout: str
    root: Path
    notes: list[str]


def list_images(root: str | Path, *, distractors: bool = False) -> Listing:
    """The crops of a data set. Files are known by extension (jpg, jpeg, png, bmp, webp, in either case), not opened.

    `root` is one of these, or holds one of the first five at most two folders down, as torchreid and fast-reid do:

    - Market-1501, DukeMTMC-reID, CUHK03-NP (detected or labeled), or a data set of their layout: any of
      bounding_box_train ("train"), query ("query") and bounding_box_test ("gallery"), what lies beside them is not
      looked at. pid and camid come from names such as 0002_c1s1_000451_03.jpg, 0001_c2_f0046182.jpg or 0001_c1_1.png:
      pid -1 is junk and kept in the list, 0 a distractor. time is the frame number; in Market names session s adds
      (s - 1) * 1,000,000, so that times of one camera are in order, and both numbers can be had back.
    - MSMT17 V1 or V2, by its list_*.txt. list_val is part of "train", as in most papers (torchreid and fast-reid leave
      it out). The lists count people from 0; pids here are one more.
    - Pairs as VIPeR has them, cam_a ("query", camera 1) and cam_b ("gallery", camera 2): pid is one more than the first
      number of the name.
    - Splits: train, val, query, gallery, or train_all instead of train and val, with a folder for each identity. Its
      name is the pid; unless all are numbers, people are counted from 1 in the order of the names. Camera and time are
      those of names that fit Market's, else -1. Images without such a folder need such a name.
    - CUHK03 as published, cuhk-03.mat: refused with what to do.
    - Folders of identities, and no image beside or below those: one split, "all".
    - A table, FILE.csv: its first line names the columns, path and any of pid, camid, split and time. Paths are
      relative to the table's folder and stay in it. A pid is a number (0 a distractor, -1 junk) or, unless all are,
      a name. Empty is -1, and "all" for the split.
    - Any other folder, with the folders in it, or an image: one split, "all", with pid, camid and time -1.

    A time that is not known is -1. Hidden files and Thumbs.db are passed over, and links to folders not followed.

    Args:
        distractors: whether Market-1501's 500k distractors, the folder images/ beside the others, join the gallery,
            with pid 0.

    Raises: FileNotFoundError when `root` is not there; ValueError when it holds several data sets, a table is none, or
        there are no distractors; OSError when a folder cannot be read.
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"root: no such folder or image: {root}")
    if root.is_file() and root.suffix.lower() == ".csv":
        found = _table(root)
    elif root.is_file():
        found = _plain(root.parent, [root.name])
    else:
        root = _data_set_in(root)
        found = (_reader(root) or _any_folder)(root)
    if distractors:
        found = _with_distractors(found)
    name, differences = _compare(found)
    images = sorted(found.images, key=lambda image: (SPLITS.index(image.split), image.name))
    return found._replace(images=images, layout=name, notes=found.notes + differences)


def parse_name(name: str) -> tuple[int, int, int] | None:
    """pid, camid and time by the name of a file, see `list_images`; None where it does not fit."""
    fit = _NAME.match(name)
    if not fit:
        return None
    time = int(fit["frame"] or fit["f"] or -1) + FRAMES_PER_SESSION * (int(fit["session"] or 1) - 1)
    return int(fit["pid"]), int(fit["camid"]), time


# Which layout


def _reader(root: Path) -> Callable[[Path], Listing] | None:
    """What reads a folder that is a data set with splits; None for any other."""
    there = {entry.name for entry in os.scandir(root) if entry.is_dir()}
    if (root / CUHK03).is_file():
        return _raw_cuhk03
    if there & (MARKET.keys() - IDENTITIES.keys()):
        return _market
    if any((root / name).is_file() for name in MSMT17):
        return _msmt17
    if PAIRS.keys() <= there:
        return _pairs
    if {"query", "gallery"} <= there or any(_holds_folders(root / name) for name in IDENTITIES.keys() & there):
        return _splits
    return _market if "query" in there else None


def _folders(folder: Path) -> list[Path]:
    return sorted(Path(entry) for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _holds_folders(folder: Path) -> bool:
    """Whether a folder holds folders, links aside, and no image."""
    entries = list(os.scandir(folder))
    return any(e.is_dir(follow_symlinks=False) for e in entries) and not any(_is_image(e.name) for e in entries)


def _data_set_in(root: Path) -> Path:
    """`root`, or the one data set at most two folders down in a folder without images of its own."""
    if _reader(root) or any(_is_image(entry.name) for entry in os.scandir(root)):
        return root
    level = [root]
    for _ in range(2):
        level = [folder for parent in level for folder in _folders(parent)]
        found = {folder.resolve(): folder for folder in level if _reader(folder)}
        if len(found) > 1:
            some = ", ".join(map(str, list(found.values())[:5])) + (", ..." if len(found) > 5 else "")
            raise ValueError(f"root must be one data set, got {root} with {len(found)}: {some}")
        if found:
            return next(iter(found.values()))
    return root


# Readers of one layout each


def _market(root: Path) -> Listing:
    folders = {folder: split for folder, split in MARKET.items() if (root / folder).is_dir()}
    files = [(name, split) for folder, split in folders.items() for name in _walk(root, folder)]
    found = _collect(root, files, lambda name: parse_name(_last(name)) or NO_NAME)
    missing = [f"{folder} is missing: no {split} images" for folder, split in MARKET.items() if folder not in folders]
    if (root / DISTRACTORS).is_dir():
        missing.append(f"{DISTRACTORS}/ is there: its images join the gallery when distractors are asked for")
    return found._replace(layout="Market-1501's layout", notes=missing)


def _with_distractors(found: Listing) -> Listing:
    if found.layout != "Market-1501's layout" or not (found.root / DISTRACTORS).is_dir():
        raise ValueError(f"distractors must lie in {DISTRACTORS}/ beside {', '.join(MARKET)}: not so in {found.root}")
    files = [(name, "gallery") for name in _walk(found.root, DISTRACTORS)]
    more = _collect(found.root, files, lambda name: (0, *(parse_name(_last(name)) or (0, -1, -1))[1:]))
    notes = [note for note in found.notes if not note.startswith(f"{DISTRACTORS}/")]
    notes.append(f"{DISTRACTORS}/: {len(more.images):,} distractors join the gallery")
    images, rejected = found.images + more.images, found.rejected + more.rejected
    return found._replace(images=images, rejected=rejected, notes=notes)


def _msmt17(root: Path) -> Listing:
    is_v2 = any((root / folder).is_dir() for folder in MSMT17_FOLDERS["MSMT17 V2"])
    layout = "MSMT17 V2" if is_v2 else "MSMT17 V1"
    train, test = MSMT17_FOLDERS[layout]
    folders = {"train": train, "query": test, "gallery": test}
    there = {name for folder in (train, test) if (root / folder).is_dir() for name in _walk(root, folder)}
    images, rejected, notes, seen = [], [], [], set()
    for listed, split in MSMT17.items():
        if not (root / listed).is_file():
            notes.append(f"{listed} is missing")
            continue
        for number, line in enumerate((root / listed).read_text("utf-8", "replace").splitlines(), 1):
            words = line.rsplit(maxsplit=1)
            if not words:
                continue
            name = f"{folders[split]}/{words[0]}"
            fit = _MSMT17_NAME.match(_last(name))
            if len(words) != 2 or not re.fullmatch("[0-9]{1,8}", words[1]):
                rejected.append((f"{listed}:{number}", "not a line of a path and a person's number"))
            elif name in seen:
                rejected.append((name, TWICE))
            elif name not in there:
                rejected.append((name, f"in {listed}, but there is no such file"))
            elif not _is_image(name):
                rejected.append((name, NO_EXTENSION))
            elif not fit:
                rejected.append(
                    (name, "the name does not fit PERSON_NUMBER_CAMERA_..., such as 0000_000_01_0303morning")
                )
            else:
                seen.add(name)
                images.append(ImageRecord(root / name, name, split, int(words[1]) + 1, int(fit["camid"]), -1))
    if unlisted := sum(_is_image(name) for name in there - seen - dict(rejected).keys()):
        notes.append(f"{unlisted:,} images are in no list")
    return Listing(images, rejected, layout, root, notes)


def _pairs(root: Path) -> Listing:
    def who(name: str) -> tuple[int, int, int] | str:
        fit = _PAIR_NAME.match(_last(name))
        camid = list(PAIRS).index(name.split("/")[0]) + 1
        return (int(fit["pid"]) + 1, camid, -1) if fit else "the name has no number of a person"

    files = [(name, split) for folder, split in PAIRS.items() for name in _walk(root, folder)]
    notes = ["no train images: the published protocols train on a random half; a table (.csv) can say which"]
    return _collect(root, files, who)._replace(layout="pairs", notes=notes)


def _splits(root: Path) -> Listing:
    folders = [folder for folder in IDENTITIES if (root / folder).is_dir()]
    if "train_all" in folders:
        folders = [folder for folder in folders if folder not in ("train", "val")]
    files = [(name, IDENTITIES[folder]) for folder in folders for name in _walk(root, folder)]
    found = _of_identities(root, files, depth=1)
    missing = sorted({"train", "query", "gallery"} - {IDENTITIES[folder] for folder in folders})
    notes = [f"{split} is missing: no {split} images" for split in missing]
    return found._replace(layout="splits of identities", notes=notes)


def _any_folder(root: Path) -> Listing:
    names = _walk(root)
    places = [name.split("/") for name in names if _is_image(name)]
    if len({place[0] for place in places}) > 1 and all(len(place) == 2 for place in places):
        return _of_identities(root, [(name, "all") for name in names], depth=0)
    return _plain(root, names)


def _of_identities(root: Path, files: list[tuple[str, str]], depth: int) -> Listing:
    people = {name: name.split("/")[depth] for name, _ in files if name.count("/") > depth and _is_image(name)}
    pids = _numbered(people.values())

    def who(name: str) -> tuple[int, int, int] | str:
        named = parse_name(_last(name))
        if name not in people:
            return named or f"in no folder of an identity, and {NO_NAME}"
        return pids[people[name]], *(named or (-1, -1, -1))[1:]

    return _collect(root, files, who)._replace(layout="folders of identities")


def _plain(root: Path, names: Iterable[str]) -> Listing:
    return _collect(root, [(name, "all") for name in names], lambda name: (-1, -1, -1))


def _raw_cuhk03(root: Path) -> Listing:
    raise ValueError(
        f"root holds CUHK03 as published, {CUHK03}, which is one file: write its crops as folders first, "
        f"python -m reid3d.data.cuhk03 {root} OUT"
    )


def _table(path: Path) -> Listing:
    try:
        with open(path, encoding="utf-8-sig", newline="") as text:
            rows = list(csv.reader(text, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"root is no table of comma-separated values: {path} ({error})") from error
    head = [name.strip().lower() for name in rows[0]] if rows else []
    if "path" not in head or len(set(head)) < len(head) or not set(head) <= set(COLUMNS):
        raise ValueError(
            f"root: the first line of {path} must name columns of {', '.join(COLUMNS)}, path among them, got {head}"
        )
    lines = [
        (f"{path.name}:{number}", dict(zip(head, (value.strip() for value in row), strict=False)), len(row))
        for number, row in enumerate(rows[1:], 2)
        if any(value.strip() for value in row)
    ]
    pids = _numbered(line["pid"] for _, line, _ in lines if line.get("pid"))
    root, images, rejected, seen = path.parent.absolute(), [], [], set()
    for where, line, length in lines:
        file, split = Path(os.path.normpath(root / line.get("path", ""))), line.get("split") or "all"
        numbers = [line.get(column) or "-1" for column in ("camid", "time")]
        name = file.relative_to(root).as_posix() if file.is_relative_to(root) else ""
        if length != len(head):
            rejected.append((where, "not as many values as there are columns"))
        elif split not in SPLITS:
            rejected.append((where, f"split must be one of {', '.join(SPLITS)}, got {split!r}"))
        elif not all(re.fullmatch("-1|[0-9]{1,15}", number) for number in numbers):
            rejected.append((where, f"camid and time must be whole numbers from 0, got {', '.join(numbers)}"))
        elif name in ("", "."):
            rejected.append((where, f"path must lead to a file in the table's folder, got {line['path']!r}"))
        elif name in seen:
            rejected.append((name, TWICE))
        elif not _is_image(name):
            rejected.append((name, NO_EXTENSION))
        elif not file.is_file():
            rejected.append((name, "in the table, but there is no such file"))
        else:
            seen.add(name)
            pid = pids[line["pid"]] if line.get("pid") else -1
            images.append(ImageRecord(file, name, split, pid, int(numbers[0]), int(numbers[1])))
    return Listing(images, rejected, "a table", root, [])


# What they share


def _walk(root: Path, folder: str = "") -> list[str]:
    """Names, relative to `root`, of the files below a folder in it, and with a "/" at the end of links to folders."""

    def refuse(error: OSError) -> None:
        raise error  # os.walk passes over what it cannot read

    names: list[str] = []
    for parent, folders, files in os.walk(root / folder, onerror=refuse):
        place = Path(parent).relative_to(root).as_posix()
        prefix = "" if place == "." else f"{place}/"
        names += [f"{prefix}{name}" for name in files]
        names += [f"{prefix}{name}/" for name in folders if os.path.islink(os.path.join(parent, name))]
        folders[:] = [name for name in folders if not name.startswith(".")]
    return sorted(names)


def _collect(root: Path, files: Iterable[tuple[str, str]], who: Callable[[str], tuple[int, int, int] | str]) -> Listing:
    """Every file becomes an image, with what `who` says of it, or is rejected, with the reason that `who` gives."""
    images, rejected = [], []
    for name, split in files:
        last = _last(name)
        if last.startswith(".") or last.lower() == "thumbs.db":
            continue
        if name.endswith("/"):
            rejected.append((name[:-1], "a link to a folder: not followed"))
        elif not _is_image(name):
            rejected.append((name, NO_EXTENSION))
        elif isinstance(known := who(name), str):
            rejected.append((name, known))
        else:
            images.append(ImageRecord(root / name, name, split, *known))
    return Listing(images, rejected, "a plain folder", root, [])


def _last(name: str) -> str:
    return name.removesuffix("/").rsplit("/", 1)[-1]


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not _last(name).startswith(".")


def _numbered(people: Iterable[str]) -> dict[str, int]:
    """pids by what people are called: the numbers themselves, or 1, 2, ... in order where one of them is none."""
    distinct = sorted(set(people))
    if all(_PID.fullmatch(person) for person in distinct):
        return {person: int(person) for person in distinct}
    return {person: k for k, person in enumerate(distinct, 1)}


# Against what was published


def count(images: Iterable[ImageRecord]) -> dict[str, tuple[int, int]]:
    """{split: (images, people)} of the splits that are there, junk and distractors among the images only."""
    people: dict[str, set[int]] = {}
    number: Counter[str] = Counter()
    for image in images:
        number[image.split] += 1
        people.setdefault(image.split, set()).add(image.pid)
    return {split: (number[split], len(people[split] - {0, -1})) for split in SPLITS if split in number}


def _compare(found: Listing) -> tuple[str, list[str]]:
    """The published data set that a listing is of, by the names of its folders or by its size, and how it differs."""
    counts, notes = count(image for image in found.images if not image.name.startswith(f"{DISTRACTORS}/")), []
    if found.layout == "Market-1501's layout":
        names = {split: {_last(i.name) for i in found.images if i.split == split} for split in ("query", "gallery")}
        if both := len(names["query"] & names["gallery"]):
            notes.append(f"{both:,} images have the same name in query and gallery")
    candidates = _OF_LAYOUT.get(found.layout, ())
    parts = [part.lower() for part in found.root.resolve().parts[-3:]]
    called = [name for name in candidates if any(re.search(PUBLISHED[name][0], part) for part in parts)]
    sized = [name for name in candidates if PUBLISHED[name][1].items() & counts.items()]
    if not called and not sized:
        return found.layout, notes
    name = (called or sized)[0]
    for split, (images, people) in PUBLISHED[name][1].items():
        have = counts.get(split, (0, 0))
        if have != (images, people):
            is_ = f"{split}: {have[0]:,} images of {have[1]:,} people"
            notes.append(f"{is_}; {name} has {images:,} of {people:,}")
    return name, notes
