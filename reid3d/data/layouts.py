"""The folders that data sets of crops lie in: the published ones, people's own, and what their names say.

A layout is known by its folders and lists, never by opening an image. How many images and people the published data
sets have is known too; a copy that differs is read all the same, and the listing says in which way it differs.
"""

from __future__ import annotations

import csv
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
SPLITS = ("train", "query", "gallery", "all")
MARKET_LAYOUT = "Market-1501's layout"
MARKET = {"bounding_box_train": "train", "query": "query", "bounding_box_test": "gallery"}
DISTRACTORS = "images"  # where Market-1501's 500k lie
MSMT17 = {"list_train.txt": "train", "list_val.txt": "train", "list_query.txt": "query", "list_gallery.txt": "gallery"}
MSMT17_FOLDERS = {"MSMT17 V1": ("train", "test"), "MSMT17 V2": ("mask_train_v2", "mask_test_v2")}
PAIRS = {"cam_a": "query", "cam_b": "gallery"}
BESIDE = ("multi-query", "gt_bbox", "gt_query", "pytorch")  # beside splits, and not part of them
CUHK03 = "cuhk-03.mat"
IDENTITIES = {"train_all": "train", "train": "train", "val": "train", "query": "query", "gallery": "gallery"}
COLUMNS = ("path", "pid", "camid", "split", "time")
NO_NAME = "the name does not fit PID_cCAMERA..., such as 0002_c1s1_000451_03.jpg"
NO_EXTENSION = f"not an image name: the extension must be one of {' '.join(EXTENSIONS)}"
TWICE = "listed twice"
ZERO = "whoever is called 0 is read as a distractor, who is nobody: count people from 1"
FRAMES_PER_SESSION = 1_000_000  # Market-1501 numbers frames with six digits
_NAME = re.compile(  # at most nine digits a number, so that all fit into 64 bits
    r"(?P<pid>-1|[0-9]{1,9})_c(?P<camid>[1-9][0-9]{0,8})"
    r"(?:s(?P<session>[1-9][0-9]{0,8})_(?P<frame>[0-9]{1,9})|_f(?P<f>[0-9]{1,9}))?[_.]"
)
_MSMT17_NAME = re.compile(r"[0-9]+_[0-9]+_(?P<camid>[0-9]{1,9})_")
_PAIR_NAME = re.compile(r"[^0-9]*(?P<pid>[0-9]{1,8})(?![0-9])")
_NUMBER = re.compile(r"|-1(?:\.0)?|[0-9]{1,15}(?:\.0)?")
_PID = re.compile(r"([0-9]{1,9})(?:\.0)?")  # pandas writes 7.0 where a column has gaps

# Which path tells of which data set, and its images and people in each split. Images of no person (0000, -1)
# count as images. MSMT17's lists tell enough, and its training set is that of the papers: list_train and list_val.
PUBLISHED: dict[str, tuple[str, dict[str, tuple[int, int]]]] = {
    "Market-1501": (r"market[-_]?1501|(^|/)market$", dict(train=(12936, 751), query=(3368, 750), gallery=(19732, 750))),
    "DukeMTMC-reID": (r"dukemtmc", dict(train=(16522, 702), query=(2228, 702), gallery=(17661, 1110))),
    "CUHK03-NP detected": (
        r"cuhk[-_]?03.*(?<![a-z])detected",
        dict(train=(7365, 767), query=(1400, 700), gallery=(5332, 700)),
    ),
    "CUHK03-NP labeled": (
        r"cuhk[-_]?03.*(?<![a-z])labeled",
        dict(train=(7368, 767), query=(1400, 700), gallery=(5328, 700)),
    ),
    "MSMT17 V1": (r"", dict(train=(32621, 1041), query=(11659, 3060), gallery=(82161, 3060))),
    "MSMT17 V2": (r"", dict(train=(32621, 1041), query=(11659, 3060), gallery=(82161, 3060))),
    "VIPeR": (r"viper", dict(query=(632, 632), gallery=(632, 632))),
}
_OF_LAYOUT = {
    MARKET_LAYOUT: ("Market-1501", "DukeMTMC-reID", "CUHK03-NP detected", "CUHK03-NP labeled"),
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

    `root` is one of these, or holds one of the first three at most two folders down, as torchreid and fast-reid do, and
    no other images in those:

    - Market-1501, DukeMTMC-reID, CUHK03-NP (detected or labeled), or a data set of their layout: bounding_box_train
      ("train"), bounding_box_test ("gallery") or both, and query ("query"); what lies beside them is not looked at. pid
      and camid come from names such as 0002_c1s1_000451_03.jpg, 0001_c2_f0046182.jpg or 0001_c1_1.png: pid -1 is junk
      and kept in the list, 0 a distractor. time is the frame number; in Market names session s adds
      (s - 1) * 1,000,000, so that times of one camera are in order, and both numbers can be had back.
    - MSMT17 V1 or V2, by its list_*.txt. list_val is part of "train", as in most papers (torchreid and fast-reid leave
      it out). The lists count people from 0; pids here are one more.
    - CUHK03 as published, cuhk-03.mat: refused with what to do.
    - Splits: train, val, query, gallery, or train_all instead of train and val, with a folder for each identity. Its
      name is the pid; unless all are numbers, people are counted from 1 in the order of the names. -1 is junk and 0 a
      distractor even then. Camera and time are those of names that fit Market's, else -1. Images without such a folder
      need such a name.
    - Pairs as VIPeR and PRID have them, cam_a ("query", camera 1) and cam_b ("gallery", camera 2): pid is one more than
      the first number in the name of the person's folder, or of the file.
    - Folders of identities, and no image beside or below those: one split, "all".
    - A table, FILE.csv: its first line names the columns, path and any of pid, camid, split (train, val, query,
      gallery, all) and time. Paths are relative to the table's folder and lie in it. People are called as folders of
      identities are. Empty is -1, and "all" for the split.
    - Any other folder, with the folders in it, or an image: one split, "all", with pid, camid and time -1. So are
      splits and pairs with other images beside them, or with none that fits.

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
    elif found.layout == MARKET_LAYOUT and (root / DISTRACTORS).is_dir():
        found.notes.append(f"{DISTRACTORS}/ is there: its images join the gallery when distractors are asked for")
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
    """What reads a folder that is a published data set beyond doubt; None for any other."""
    there = {entry.name for entry in os.scandir(root) if entry.is_dir()}
    if (root / CUHK03).is_file():
        return _raw_cuhk03
    if there & (MARKET.keys() - IDENTITIES.keys()):
        return _market
    return _msmt17 if any((root / name).is_file() for name in MSMT17) else None


def _data_set_in(root: Path) -> Path:
    """`root`, or the one data set at most two folders down, if there is one.

    Raises: ValueError when there are several, or images beside the one.
    """
    if _reader(root) or _holds_images(root):
        return root
    level, beside, found = [root], [], {}
    for _ in range(2):
        level = [folder for parent in level for folder in _folders(parent)]
        for folder in level:
            if _reader(folder):
                found[folder.resolve()] = folder
            elif _holds_images(folder):
                beside.append(folder)
        if found:
            break
    if len(found) > 1:
        some = ", ".join(map(str, list(found.values())[:5])) + (", ..." if len(found) > 5 else "")
        raise ValueError(f"root must be one data set, got {root} with {len(found)}: {some}")
    for folder in found.values():
        if beside:
            raise ValueError(f"root must be one data set, got {root} with {folder} and images in {beside[0]} besides")
        return folder
    return root


def _folders(folder: Path) -> list[Path]:
    """Folders in a folder that can be read, without hidden ones."""
    found = (Path(entry) for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    return sorted(path for path in found if os.access(path, os.R_OK | os.X_OK))


def _holds_images(folder: Path) -> bool:
    return any(_is_image(entry.name) for entry in os.scandir(folder))


def _any_folder(root: Path) -> Listing:
    """What only the common names of its folders tell of, if they do: splits, pairs, identities, or any crops."""
    names = _walk(root)
    images = [name for name in names if _is_image(name)]
    folders = {folder.name for folder in _folders(root)}
    for known, least, read in ((IDENTITIES, 1, _splits), (PAIRS, 2, _pairs)):
        if len(folders & known.keys()) >= least:
            others = [name for name in images if name.split("/")[0] not in (*known, *BESIDE)]
            if not others and (found := read(root)).images:
                return found
            why = f"there are other images, such as {others[0]}" if others else "no image in them tells of a person"
            note = f"not read as {', '.join(sorted(folders & known.keys()))}: {why}"
            return _plain(root, names)._replace(notes=[note])
    if len({name.split("/")[0] for name in images}) > 1 and all(name.count("/") == 1 for name in images):
        return _of_identities(root, [(name, "all") for name in names], depth=0)
    return _plain(root, names)


# Readers of one layout each


def _market(root: Path) -> Listing:
    folders = {folder: split for folder, split in MARKET.items() if (root / folder).is_dir()}
    files = [(name, split) for folder, split in folders.items() for name in _walk(root, folder)]
    found = _collect(root, files, lambda name: parse_name(_last(name)) or NO_NAME)
    missing = [f"{folder} is missing: no {split} images" for folder, split in MARKET.items() if folder not in folders]
    return found._replace(layout=MARKET_LAYOUT, notes=missing)


def _with_distractors(found: Listing) -> Listing:
    if found.layout != MARKET_LAYOUT or not (found.root / DISTRACTORS).is_dir():
        raise ValueError(f"distractors must lie in {DISTRACTORS}/ beside {', '.join(MARKET)}: not so in {found.root}")
    files = [(name, "gallery") for name in _walk(found.root, DISTRACTORS)]
    more = _collect(found.root, files, lambda name: (0, *(parse_name(_last(name)) or (0, -1, -1))[1:]))
    note = f"{DISTRACTORS}/: {len(more.images):,} distractors join the gallery"
    images, rejected = found.images + more.images, found.rejected + more.rejected
    return found._replace(images=images, rejected=rejected, notes=[*found.notes, note])


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
        camera, person, *_ = name.split("/")
        fit = _PAIR_NAME.match(person)
        camid = list(PAIRS).index(camera) + 1
        return (int(fit["pid"]) + 1, camid, -1) if fit else "the name has no number of a person"

    files = [(name, split) for folder, split in PAIRS.items() for name in _walk(root, folder)]
    notes = ["no train images: the published protocols train on a random half; a table (.csv) can say which"]
    return _collect(root, files, who)._replace(layout="pairs", notes=notes)


def _splits(root: Path) -> Listing:
    folders = split_folders(root)
    files = [(name, split) for folder, split in folders.items() for name in _walk(root, folder)]
    found = _of_identities(root, files, depth=1)
    missing = sorted({"train", "query", "gallery"} - set(folders.values()))
    notes = found.notes + [f"{split} is missing: no {split} images" for split in missing]
    return found._replace(layout="splits of identities", notes=notes)


def split_folders(root: Path) -> dict[str, str]:
    """{folder: split} of the folders of splits in `root`, without train and val beside train_all, which holds both."""
    folders = {folder: split for folder, split in IDENTITIES.items() if (root / folder).is_dir()}
    return {f: s for f, s in folders.items() if not ("train_all" in folders and f in ("train", "val"))}


def _of_identities(root: Path, files: list[tuple[str, str]], depth: int) -> Listing:
    people = {name: name.split("/")[depth] for name, _ in files if name.count("/") > depth and _is_image(name)}
    pids = _numbered(people.values())

    def who(name: str) -> tuple[int, int, int] | str:
        named = parse_name(_last(name))
        if name not in people:
            return named or f"in no folder of an identity, and {NO_NAME}"
        return pids[people[name]], *(named or (-1, -1, -1))[1:]

    notes = [ZERO] if "0" in people.values() else []
    return _collect(root, files, who)._replace(layout="folders of identities", notes=notes)


def _plain(root: Path, names: Iterable[str]) -> Listing:
    return _collect(root, [(name, "all") for name in names], lambda name: (-1, -1, -1))


def _raw_cuhk03(root: Path) -> Listing:
    raise ValueError(
        f"root holds CUHK03 as published, {CUHK03}, which is one file: write its crops as folders first, "
        f"python -m reid3d.data.cuhk03 {shlex.quote(str(root))} OUT"
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
            f"root: the first line of {path} must name columns, separated by commas, of {', '.join(COLUMNS)}, "
            f"path among them and each once, got {', '.join(head) or 'nothing'}"
        )
    root, rejected = path.parent.absolute(), []
    kept: dict[str, dict[str, str]] = {}
    for number, row in enumerate(rows[1:], 2):
        where, values = f"{path.name}:{number}", [value.strip() for value in row]
        line = dict(zip(head, values, strict=False))
        if not any(values):
            continue
        if len(values) != len(head):
            rejected.append((where, "not as many values as there are columns"))
            continue
        file = Path(os.path.normpath(root / line["path"]))
        base = next((base for base in (root, root.resolve()) if file.is_relative_to(base)), None)
        name = file.relative_to(base).as_posix() if base else "."
        line["split"] = IDENTITIES.get(line.get("split", "").lower(), line.get("split", "").lower()) or "all"
        if line["split"] not in SPLITS:
            rejected.append((where, f"split must be one of {', '.join(SPLITS)}, got {line['split']!r}"))
        elif not all(_NUMBER.fullmatch(line.get(column, "")) for column in ("camid", "time")):
            rejected.append((where, "camid and time must be whole numbers from 0"))
        elif name == ".":
            rejected.append((where, f"path must lead to a file in the table's folder, got {line['path']!r}"))
        elif name in kept:
            rejected.append((name, TWICE))
        elif not _is_image(name):
            rejected.append((name, NO_EXTENSION))
        elif not os.path.isfile(root / name):
            rejected.append((name, "in the table, but there is no such file"))
        else:
            kept[name] = line
    pids = _numbered(line["pid"] for line in kept.values() if line.get("pid"))
    images = [
        ImageRecord(
            root / name,
            name,
            line["split"],
            pids.get(line.get("pid", ""), -1),
            *(int(float(line.get(column) or -1)) for column in ("camid", "time")),
        )
        for name, line in kept.items()
    ]
    return Listing(images, rejected, f"the table {path.name}", root, [])


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
    nobody = {called: -1 for called in distinct if called in ("-1", "-1.0")}
    nobody |= {called: 0 for called in distinct if (fit := _PID.fullmatch(called)) and int(fit[1]) == 0}
    somebody = [called for called in distinct if called not in nobody]
    fits = [_PID.fullmatch(called) for called in somebody]
    numbers = [int(fit[1]) for fit in fits if fit]
    if len(numbers) < len(somebody):
        numbers = list(range(1, len(somebody) + 1))
    return nobody | dict(zip(somebody, numbers, strict=True))


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
    if found.layout == MARKET_LAYOUT:
        names = {split: {_last(i.name) for i in found.images if i.split == split} for split in ("query", "gallery")}
        if both := len(names["query"] & names["gallery"]):
            notes.append(f"{both:,} images have the same name in query and gallery")
    candidates = _OF_LAYOUT.get(found.layout, ())
    place = "/".join(part.lower() for part in found.root.resolve().parts[-3:])
    sized = [name for name in candidates if PUBLISHED[name][1] == counts]
    called = [name for name in candidates if re.search(PUBLISHED[name][0], place)]
    if not sized and not called:
        return found.layout, notes
    name = (sized or called)[0]
    for split, (images, people) in PUBLISHED[name][1].items():
        here = counts.get(split, (0, 0))
        if here != (images, people):
            notes.append(f"{split}: {here[0]:,} images of {here[1]:,} people; {name} has {images:,} of {people:,}")
    return name, notes
