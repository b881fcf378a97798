"""Which images a folder holds, and who they show: every layout in fake trees with the published numbers of files."""

import itertools
import os
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
from PIL import Image

from reid3d.data import list_images
from reid3d.data.cuhk03 import extract_cuhk03, main
from reid3d.data.layouts import PUBLISHED, count
from reid3d.doctor import format_data, report_data


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.fixture
def market(tmp_path):
    names = [
        "bounding_box_train/0002_c1s1_000451_03.jpg",
        "bounding_box_train/0002_c3s2_000002_00.JPG",
        "bounding_box_train/Thumbs.db",
        "query/0001_c2_f0046182.jpg",
        "query/0003_c1_1.png",
        "bounding_box_test/-1_c1s1_000401_03.jpg",
        "bounding_box_test/0000_c6s4_002402_01.jpg.jpg",
        "bounding_box_test/.hidden.jpg",
        "gt_bbox/0002_c1s1_000451_00.jpg",
        "readme.txt",
    ]
    touch(*(tmp_path / name for name in names))
    return tmp_path


def test_market_layout(market):
    images, rejected = list_images(market)[:2]
    assert rejected == []
    assert [(i.name, i.split, i.pid, i.camid, i.time) for i in images] == [
        ("bounding_box_train/0002_c1s1_000451_03.jpg", "train", 2, 1, 451),
        ("bounding_box_train/0002_c3s2_000002_00.JPG", "train", 2, 3, 1_000_002),
        ("query/0001_c2_f0046182.jpg", "query", 1, 2, 46182),
        ("query/0003_c1_1.png", "query", 3, 1, -1),
        ("bounding_box_test/-1_c1s1_000401_03.jpg", "gallery", -1, 1, 401),
        ("bounding_box_test/0000_c6s4_002402_01.jpg.jpg", "gallery", 0, 6, 3_002_402),
    ]
    assert all(i.path == market / i.name for i in images)


@pytest.mark.parametrize(
    "name",
    [
        "photo.jpg",
        "2_1.jpg",
        "0002_s1_000451_03.jpg",
        "0002_c0s1_000451_03.jpg",
        "0002_c1s1.jpg",
        "-2_c1s1_000451_03.jpg",
        "1234567890_c1s1_000451_03.jpg",
        "0002_c1234567890s1_000451_03.jpg",
        "0002_c1s1234567890_000451_03.jpg",
        "0002_c1s1_1234567890_03.jpg",
        "٠٠٠٢_c1s1_000451_03.jpg",
    ],
)
def test_names_that_do_not_fit_are_listed_with_the_reason(market, name):
    touch(market / "query" / name)
    images, rejected = list_images(market)[:2]
    assert len(images) == 6
    assert rejected == [
        (f"query/{name}", "the name does not fit PID_cCAMERA..., such as 0002_c1s1_000451_03.jpg"),
    ]


def test_other_extensions_are_listed_with_the_reason(market):
    touch(market / "query" / "notes.txt", market / "query" / "a.json", market / "query" / "0001_c1s1_000001_00.gif")
    _, rejected = list_images(market)[:2]
    assert [name for name, _ in rejected] == ["query/0001_c1s1_000001_00.gif", "query/a.json", "query/notes.txt"]
    assert {reason for _, reason in rejected} == {
        "not an image name: the extension must be one of .jpg .jpeg .png .bmp .webp"
    }


def test_a_plain_folder_with_folders_is_one_split(tmp_path):
    touch(
        *(
            tmp_path / name
            for name in ("b.PNG", "a/c.webp", "a/0002_c1s1_000451_03.jpg", "z.bmp", "y.JPEG", "a/d/e.jpg")
        )
    )
    touch(tmp_path / ".git" / "x.jpg", tmp_path / "THUMBS.DB")
    images, rejected = list_images(tmp_path)[:2]
    assert [i.name for i in images] == [
        "a/0002_c1s1_000451_03.jpg",
        "a/c.webp",
        "a/d/e.jpg",
        "b.PNG",
        "y.JPEG",
        "z.bmp",
    ]
    assert {(i.split, i.pid, i.camid, i.time) for i in images} == {("all", -1, -1, -1)}
    assert rejected == []


def test_a_single_file_is_a_folder_of_one(tmp_path):
    touch(tmp_path / "a.jpg", tmp_path / "b.jpg")
    images, rejected = list_images(tmp_path / "a.jpg")[:2]
    assert [(i.path, i.name, i.split) for i in images] == [(tmp_path / "a.jpg", "a.jpg", "all")]
    assert rejected == []


def test_links(tmp_path):
    touch(tmp_path / "elsewhere" / "0001_c1s1_000001_00.jpg")
    root = tmp_path / "market"
    root.mkdir()
    (root / "query").symlink_to(tmp_path / "elsewhere")
    (root / "query" / "loop").symlink_to(root)
    images, rejected = list_images(root)[:2]
    assert [i.name for i in images] == ["query/0001_c1s1_000001_00.jpg"]
    assert rejected == [("query/loop", "a link to a folder: not followed")]


def test_an_empty_folder_has_no_images(tmp_path):
    listing = list_images(tmp_path)
    assert (listing.images, listing.rejected, listing.notes) == ([], [], [])


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"root: no such folder or image: {tmp_path / 'no'}"):
        list_images(tmp_path / "no")


def test_the_largest_numbers_of_a_name_fit_64_bits(market):
    touch(market / "query" / "999999999_c999999999s999999999_999999999_03.jpg")
    (image,) = (image for image in list_images(market)[0] if image.pid == 999_999_999)
    assert np.array([image.pid, image.camid, image.time], np.int64)[2] == 999_999_998_000_000 + 999_999_999


# The published data sets


def names_of(people, images, suffix, start=1):
    """`images` file names, as evenly over the people as can be; `suffix` makes the rest of each from its number."""
    return [f"{people[k % len(people)]:04d}_{suffix(k)}" for k in range(start, images + start)]


def market_name(k):
    return f"c{k % 6 + 1}s{k % 3 + 1}_{k:06d}_00.jpg"


def duke_name(k):
    return f"c{k % 8 + 1}_f{k:07d}.jpg"


def cuhk03_name(k):
    return f"c{k % 2 + 1}_{k}.png"


def fill(root, folders):
    for folder, names in folders.items():
        (root / folder).mkdir(parents=True)
        for name in names:
            os.close(os.open(root / folder / name, os.O_CREAT))
    return root


def market_tree(root):
    junk = [f"-1_{market_name(k)}" for k in range(3819)]
    distractors = [f"0000_{market_name(k)}" for k in range(2798)]
    test = range(1, 1501, 2)
    good = names_of(test, 13115, market_name)
    folders = {
        "bounding_box_train": names_of(range(2, 1503, 2), 12936, market_name),
        "query": names_of(test, 3368, market_name, start=20_000),
        "bounding_box_test": junk + distractors + good,
        "gt_bbox": ["0001_c1s1_000151_00.jpg"],
    }
    (root / "Market-1501-v15.09.15").mkdir(parents=True)
    fill(root / "Market-1501-v15.09.15", folders)
    (root / "Market-1501-v15.09.15" / "query" / "Thumbs.db").touch()
    return root / "Market-1501-v15.09.15"


@pytest.fixture(scope="module")
def market1501(tmp_path_factory):
    return market_tree(tmp_path_factory.mktemp("market1501") / "datasets" / "market1501")


def test_market1501(market1501):
    start = time.perf_counter()
    listing = list_images(market1501)
    print(f"Market-1501: {len(listing.images)} images listed in {time.perf_counter() - start:.2f} s")
    assert (listing.layout, listing.rejected, listing.notes) == ("Market-1501", [], [])
    assert count(listing.images) == {"train": (12936, 751), "query": (3368, 750), "gallery": (19732, 750)}
    gallery = [image.pid for image in listing.images if image.split == "gallery"]
    assert (gallery.count(-1), gallery.count(0)) == (3819, 2798)
    assert {image.camid for image in listing.images} == set(range(1, 7))


@pytest.mark.parametrize("up", [1, 2], ids=["torchreid", "fast-reid"])
def test_the_folder_above_a_data_set_stands_for_it(market1501, up):
    listing = list_images(market1501.parents[up - 1])
    assert listing.root == market1501 and listing.layout == "Market-1501"
    assert listing.images == list_images(market1501).images


def test_a_difference_from_the_published_numbers_is_a_note(market1501, tmp_path):
    root = tmp_path / "Market-1501-v15.09.15"
    root.mkdir()
    (root / "query").symlink_to(market1501 / "query")
    train = root / "bounding_box_train"
    train.mkdir()
    touch(train / "0002_c1s1_000451_03.jpg", train / "0007_c1s1_000451_03.jpg")
    listing = list_images(root)
    assert len(listing.images) == 3370 and listing.layout == "Market-1501"
    assert listing.notes == [
        "bounding_box_test is missing: no gallery images",
        "train: 2 images of 2 people; Market-1501 has 12,936 of 751",
        "gallery: 0 images of 0 people; Market-1501 has 19,732 of 750",
    ]


def test_a_data_set_in_a_folder_of_another_name_is_known_by_its_size(market1501, tmp_path):
    (tmp_path / "m").symlink_to(market1501.parent)
    fill(tmp_path / "other", {"query": ["0002_c1s1_000451_03.jpg"], "bounding_box_test": []})
    assert list_images(tmp_path / "other").layout == "Market-1501's layout"
    assert list_images(tmp_path / "other").notes == ["bounding_box_train is missing: no train images"]
    for folder in ("bounding_box_train", "bounding_box_test", "query"):
        (tmp_path / "renamed").mkdir(exist_ok=True)
        (tmp_path / "renamed" / folder).symlink_to(market1501 / folder)
    assert list_images(tmp_path / "renamed").layout == "Market-1501"


def test_500k_distractors_join_the_gallery_when_asked_for(tmp_path):
    fill(tmp_path, {"query": ["0002_c1s1_000451_03.jpg"], "images": ["0000_c3s2_000012_00.jpg", "9_x.jpg", "a.txt"]})
    (tmp_path / "bounding_box_test").mkdir()
    listing = list_images(tmp_path)
    assert len(listing.images) == 1
    assert listing.notes[-1] == "images/ is there: its images join the gallery when distractors are asked for"
    listing = list_images(tmp_path, distractors=True)
    assert [(i.name, i.split, i.pid, i.camid, i.time) for i in listing.images[1:]] == [
        ("images/0000_c3s2_000012_00.jpg", "gallery", 0, 3, 1_000_012),
        ("images/9_x.jpg", "gallery", 0, -1, -1),
    ]
    assert [name for name, _ in listing.rejected] == ["images/a.txt"]
    assert listing.notes[-1] == "images/: 2 distractors join the gallery"
    with pytest.raises(ValueError, match="distractors must lie in images/ beside"):
        list_images(tmp_path / "query", distractors=True)


def test_duke(tmp_path):
    folders = {
        "bounding_box_train": names_of(range(1, 1405, 2), 16522, duke_name),
        "query": names_of(range(2, 1405, 2), 2228, duke_name, start=90_000),
        "bounding_box_test": names_of([*range(2, 1405, 2), *range(2000, 2408)], 17661, duke_name),
    }
    listing = list_images(fill(tmp_path / "dukemtmc-reid" / "DukeMTMC-reID", folders).parent)
    assert (listing.layout, listing.rejected, listing.notes) == ("DukeMTMC-reID", [], [])
    assert count(listing.images) == PUBLISHED["DukeMTMC-reID"][1]
    assert {image.camid for image in listing.images} == set(range(1, 9))
    assert all(image.time == int(image.name.split("_f")[1][:7]) for image in listing.images)


@pytest.mark.parametrize(
    "folder", ["CUHK03-NP/detected", "cuhk03/CUHK03_detected", "cuhk03_np_detected", "cuhk03/CUHK03_labeled"]
)
def test_cuhk03_np(tmp_path, folder):
    kind = folder[-8:].strip("_")
    numbers = PUBLISHED[f"CUHK03-NP {kind}"][1]
    folders = {
        "bounding_box_train": names_of(range(1, 768), numbers["train"][0], cuhk03_name),
        "query": names_of(range(768, 1468), 1400, cuhk03_name, start=90_000),
        "bounding_box_test": names_of(range(768, 1468), numbers["gallery"][0], cuhk03_name),
    }
    listing = list_images(fill(tmp_path / folder, folders))
    assert (listing.layout, listing.rejected, listing.notes) == (f"CUHK03-NP {kind}", [], [])
    assert count(listing.images) == numbers
    assert {image.camid for image in listing.images} == {1, 2} and {image.time for image in listing.images} == {-1}


def test_several_data_sets_in_one_folder_are_a_choice(tmp_path):
    for kind in ("detected", "labeled"):
        fill(tmp_path / "CUHK03-NP" / kind, {"query": ["0001_c1_1.png"], "bounding_box_train": []})
    (tmp_path / "CUHK03-NP" / "loop").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"root must be one data set, got .* with 2: .*detected, .*labeled$"):
        list_images(tmp_path)
    assert list_images(tmp_path / "CUHK03-NP" / "labeled").layout == "CUHK03-NP labeled"


def msmt17_tree(root, version):
    train, test = {"V1": ("train", "test"), "V2": ("mask_train_v2", "mask_test_v2")}[version]
    sizes = {"train": (30248, 1041), "val": (2373, 1041), "query": (11659, 3060), "gallery": (82161, 3060)}
    number = itertools.count()
    for listed, (images, people) in sizes.items():
        folder, lines = root / (train if listed in ("train", "val") else test), []
        for person in range(people):
            (folder / f"{person:04d}").mkdir(parents=True, exist_ok=True)
        for k in range(images):
            person, n = k % people, next(number)
            name = f"{person:04d}/{person:04d}_{n:06d}_{n % 15 + 1:02d}_0303morning_0008_0.jpg"
            os.close(os.open(folder / name, os.O_CREAT))
            lines.append(f"{name} {person}\n")
        (root / f"list_{listed}.txt").write_text("".join(lines))
    return root


@pytest.mark.parametrize("version", ["V1", "V2"])
def test_msmt17(tmp_path, version):
    root = msmt17_tree(tmp_path / "msmt17" / f"MSMT17_{version}", version)
    listing = list_images(tmp_path / "msmt17")
    assert (listing.layout, listing.root, listing.rejected) == (f"MSMT17 {version}", root, [])
    assert listing.notes == []
    assert count(listing.images) == PUBLISHED["MSMT17 V1"][1]
    assert {image.camid for image in listing.images} == set(range(1, 16))
    assert {image.time for image in listing.images} == {-1}
    assert all(image.pid == int(Path(image.name).parent.name) + 1 for image in listing.images)


def test_msmt17_is_held_against_its_numbers_wherever_it_lies(tmp_path):
    name = "0000/0000_000_01_0303morning_0008_0.jpg"
    touch(tmp_path / "mask_train_v2" / name)
    (tmp_path / "list_train.txt").write_text(f"{name} 0\n")
    assert "train: 1 images of 1 people; MSMT17 V2 has 32,621 of 1,041" in list_images(tmp_path).notes


def test_lists_of_msmt17_with_faults(tmp_path):
    good, other = "0000/0000_000_01_0303morning_0008_0.jpg", "0000/0000_001_02_0303morning_0008_0.jpg"
    touch(tmp_path / "train" / good, tmp_path / "train" / other, tmp_path / "test" / good)
    touch(tmp_path / "train" / "0000" / "odd.jpg", tmp_path / "train" / "0000" / "0000_1_1_.txt")
    lines = [f"{good} 0", f"{good} 0", "", "no_person.jpg", "gone.jpg 3", "0000/odd.jpg 0", "../list_train.txt 0"]
    (tmp_path / "list_train.txt").write_text("\n".join([*lines, f"{good} -1", "0000/0000_1_1_.txt 0"]))
    (tmp_path / "list_query.txt").write_bytes(f"{good} 5\n\xff\n".encode("latin-1"))
    listing = list_images(tmp_path)
    assert [(i.name, i.split, i.pid, i.camid) for i in listing.images] == [
        (f"train/{good}", "train", 1, 1),
        (f"test/{good}", "query", 6, 1),
    ]
    nowhere = "in list_train.txt, but there is no such file"
    no_line = "not a line of a path and a person's number"
    assert listing.rejected[:2] == [(f"train/{good}", "listed twice"), ("list_train.txt:4", no_line)]
    assert listing.rejected[2] == ("train/gone.jpg", nowhere)
    assert (
        listing.rejected[3][0] == "train/0000/odd.jpg"
        and "does not fit PERSON_NUMBER_CAMERA_" in listing.rejected[3][1]
    )
    assert listing.rejected[4] == ("train/../list_train.txt", nowhere)
    assert listing.rejected[5] == ("list_train.txt:8", no_line)
    assert listing.rejected[6][1].startswith("not an image name")
    assert listing.rejected[7:] == [("list_query.txt:2", no_line)]
    assert listing.notes[:3] == ["list_val.txt is missing", "list_gallery.txt is missing", "1 images are in no list"]


def test_viper(tmp_path):
    pairs = range(0, 632)
    folders = {
        "cam_a": [f"{k:03d}_{45 * (k % 5)}.bmp" for k in pairs],
        "cam_b": [f"{k:03d}_{90 + 45 * (k % 3)}.bmp" for k in pairs],
    }
    listing = list_images(fill(tmp_path / "VIPeR", folders))
    assert (listing.layout, listing.rejected) == ("VIPeR", [])
    assert count(listing.images) == {"query": (632, 632), "gallery": (632, 632)}
    assert [note[:15] for note in listing.notes] == ["no train images"]
    first, last = listing.images[0], listing.images[-1]
    assert (first.name, first.pid, first.camid, first.time) == ("cam_a/000_0.bmp", 1, 1, -1)
    assert (last.name, last.pid, last.camid) == ("cam_b/631_135.bmp", 632, 2)


def test_pairs_of_several_images(tmp_path):
    names = [f"cam_{c}/person_000{p}/000{k}.png" for c in "ab" for p in (1, 2, 3) for k in (1, 2)]
    touch(*(tmp_path / name for name in names))
    listing = list_images(tmp_path)
    assert [(i.name, i.pid) for i in listing.images] == [(name, int(name.split("/")[1][-1]) + 1) for name in names]


def test_other_pairs(tmp_path):
    fill(tmp_path, {"cam_a": ["person_0001.png", "nobody.png"], "cam_b": ["person_0001.png", "1234567890.png"]})
    listing = list_images(tmp_path)
    assert [(i.pid, i.camid, i.split) for i in listing.images] == [(2, 1, "query"), (2, 2, "gallery")]
    assert {reason for _, reason in listing.rejected} == {"the name has no number of a person"}


def test_one_image_in_query_and_gallery_is_a_note(tmp_path):
    names = ["0002_c1s1_000451_03.jpg"]
    fill(tmp_path, {"query": names, "bounding_box_test": names, "bounding_box_train": []})
    assert list_images(tmp_path).notes == ["1 images have the same name in query and gallery"]


# People's own


@pytest.mark.parametrize("whole", [True, False])
def test_splits_of_identities(tmp_path, whole):
    files = ["train/0002/0002_c1s1_000451_03.jpg", "val/0007/0007_c2s1_000451_03.jpg"]
    files += ["train_all/0002/0002_c1s1_000451_03.jpg", "train_all/0007/0007_c2s1_000451_03.jpg"] if whole else []
    files += ["query/0001/any name.png", "query/stray.jpg", "query/0005_c6_f0000012.jpg", "query/0001/a.txt"]
    files += ["gallery/0001/0001_c3s1_000451_03.jpg", "gallery/-1/x.jpg", "gallery/0000/deep/x.jpg"]
    touch(*(tmp_path / name for name in files))
    listing = list_images(tmp_path)
    train = ("train_all", "train_all") if whole else ("train", "val")
    assert [(i.name, i.split, i.pid, i.camid, i.time) for i in listing.images] == [
        (f"{train[0]}/0002/0002_c1s1_000451_03.jpg", "train", 2, 1, 451),
        (f"{train[1]}/0007/0007_c2s1_000451_03.jpg", "train", 7, 2, 451),
        ("query/0001/any name.png", "query", 1, -1, -1),
        ("query/0005_c6_f0000012.jpg", "query", 5, 6, 12),
        ("gallery/-1/x.jpg", "gallery", -1, -1, -1),
        ("gallery/0000/deep/x.jpg", "gallery", 0, -1, -1),
        ("gallery/0001/0001_c3s1_000451_03.jpg", "gallery", 1, 3, 451),
    ]
    assert [name for name, _ in listing.rejected] == ["query/0001/a.txt", "query/stray.jpg"]
    assert listing.layout == "splits of identities" and listing.notes == []


def test_identities_with_names(tmp_path):
    touch(*(tmp_path / name for name in ("query/zoe/1.jpg", "gallery/zoe/2.jpg", "gallery/adam/3.jpg")))
    listing = list_images(tmp_path)
    assert [(i.split, i.pid) for i in listing.images] == [("query", 2), ("gallery", 1), ("gallery", 2)]
    assert listing.notes == ["train is missing: no train images"]


def test_folders_of_identities_without_splits(tmp_path):
    touch(*(tmp_path / name for name in ("anna/1.jpg", "anna/0009_c2_1.jpg", "bo/1.jpg", "Thumbs.db", "readme.txt")))
    listing = list_images(tmp_path)
    assert listing.layout == "folders of identities"
    assert [(i.name, i.split, i.pid, i.camid) for i in listing.images] == [
        ("anna/0009_c2_1.jpg", "all", 1, 2),
        ("anna/1.jpg", "all", 1, -1),
        ("bo/1.jpg", "all", 2, -1),
    ]
    assert [name for name, _ in listing.rejected] == ["readme.txt"]


def table(folder, *lines, name="people.csv"):
    path = folder / name
    path.write_text("\n".join(lines) + "\n", "utf-8-sig")
    return path


def test_a_table(tmp_path):
    touch(tmp_path / "a" / "1.jpg", tmp_path / "b.png", tmp_path / "c, d.jpg", tmp_path / "unlisted.jpg")
    lines = [f"{tmp_path}/a/1.jpg,12,3,train,77", "./b.png, 0 ,,query,", '"c, d.jpg",-1,1,gallery,5', "", ",,,,"]
    listing = list_images(table(tmp_path, "path,PID,camid, split,time", *lines))
    assert (listing.layout, listing.root, listing.rejected, listing.notes) == ("the table people.csv", tmp_path, [], [])
    assert [(i.path, i.name, i.split, i.pid, i.camid, i.time) for i in listing.images] == [
        (tmp_path / "a" / "1.jpg", "a/1.jpg", "train", 12, 3, 77),
        (tmp_path / "b.png", "b.png", "query", 0, -1, -1),
        (tmp_path / "c, d.jpg", "c, d.jpg", "gallery", -1, 1, 5),
    ]


def test_a_table_of_paths_alone_and_one_of_names(tmp_path):
    touch(tmp_path / "1.jpg", tmp_path / "2.jpg")
    listing = list_images(table(tmp_path, "path", "2.jpg", "1.jpg"))
    assert [(i.name, i.split, i.pid, i.camid, i.time) for i in listing.images] == [
        ("1.jpg", "all", -1, -1, -1),
        ("2.jpg", "all", -1, -1, -1),
    ]
    listing = list_images(table(tmp_path, "pid,path", "zoe,1.jpg", "7,2.jpg"))
    assert [i.pid for i in listing.images] == [2, 1]


def test_lines_of_a_table_with_faults(tmp_path):
    touch(tmp_path / "t" / "1.jpg", tmp_path / "t" / "notes.txt", tmp_path / "outside.jpg")
    (tmp_path / "t" / "folder.jpg").mkdir()
    faults = {
        "1.jpg,1,1,test": ("people.csv:3", "split must be one of train, query, gallery, all"),
        "1.jpg,1,1": ("people.csv:4", "not as many values as there are columns"),
        "1.jpg,1,one,query": ("people.csv:5", "camid and time must be whole numbers"),
        "1.jpg,1,-2,query": ("people.csv:6", "camid and time must be whole numbers"),
        "../outside.jpg,1,1,query": ("people.csv:7", "path must lead to a file in the table's folder"),
        ".,1,1,query": ("people.csv:8", "path must lead to a file in the table's folder"),
        "1.jpg,2,1,query": ("1.jpg", "listed twice"),
        "notes.txt,1,1,query": ("notes.txt", "not an image name"),
        "gone.jpg,1,1,query": ("gone.jpg", "in the table, but there is no such file"),
        "folder.jpg,1,1,query": ("folder.jpg", "in the table, but there is no such file"),
    }
    listing = list_images(table(tmp_path / "t", "path,pid,camid,split", "1.jpg,1,1,query", *faults))
    assert [i.name for i in listing.images] == ["1.jpg"]
    assert len(listing.rejected) == len(faults)
    for (name, reason), (at, words) in zip(listing.rejected, faults.values(), strict=True):
        assert name == at and reason.startswith(words)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "commas, of path, pid, camid, split, time, path among them and each once, got nothing"),
        (b"1.jpg,1\n", "path among them and each once, got 1.jpg, 1"),
        (b"path,path\n", "path among them and each once, got path, path"),
        (b"path,age\n", "path among them and each once, got path, age"),
        (b"path;pid\n", "separated by commas, .* got path;pid"),
        (b'path\n"1.jpg', "no table of comma-separated values"),
        (b"path\n\xff\xfe.jpg\n", "no table of comma-separated values"),
        (b"\xff\xd8\xff\xe0", "no table of comma-separated values"),
    ],
)
def test_what_is_no_table(tmp_path, data, words):
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(ValueError, match=words) as caught:
        list_images(tmp_path / "a.csv")
    assert "\n" not in str(caught.value)


def test_what_is_no_number_leaves_junk_and_distractors_what_they_are(tmp_path):
    touch(*(tmp_path / f"{k}.jpg" for k in range(5)))
    short = "9.jpg,total"
    for called, pids in (
        (["7", "-1", "0", "0000", "12"], [7, -1, 0, 0, 12]),
        (["7.0", "-1.0", "0.0", "", "12.0"], [7, -1, 0, -1, 12]),
        (["zoe", "-1", "0", "anna", "7"], [3, -1, 0, 2, 1]),
        (["2024000001", "-1", "0", "2024000001", "7"], [1, -1, 0, 1, 2]),
    ):
        rows = [f"{k}.jpg,{name},1.0,Train" for k, name in enumerate(called)]
        listing = list_images(table(tmp_path, "path,pid,camid,split", *rows, short))
        assert [i.pid for i in listing.images] == pids and len(listing.rejected) == 1
        assert {(i.camid, i.split) for i in listing.images} == {(1, "train")}


def test_odd_paths_of_a_table(tmp_path):
    touch(tmp_path / "real" / "1.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    rows = [f"{tmp_path}/real/1.jpg", "x" * 300 + ".jpg", "sub\\1.jpg"]
    table(tmp_path / "real", "path", *rows)
    listing = list_images(tmp_path / "link" / "people.csv")
    assert [i.path for i in listing.images] == [tmp_path / "link" / "1.jpg"]
    assert {reason for _, reason in listing.rejected} == {"in the table, but there is no such file"}


# Crops that only look like a data set


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (
            ["train/1/a.jpg", "train/2/a.jpg", "test/1/b.jpg"],
            "not read as train: there are other images, such as test/1/b.jpg",
        ),
        (
            ["train/day1/a.jpg", "other/b.jpg", "top.jpg"],
            "not read as train: there are other images, such as other/b.jpg",
        ),
        (["query/a.jpg", "gallery/b.jpg"], "not read as gallery, query: no image in them tells of a person"),
        (["cam_a/x.jpg", "cam_b/y.jpg"], "not read as cam_a, cam_b: no image in them tells of a person"),
        (["cam_a/1.jpg", "cam_b/1.jpg", "c.jpg"], "not read as cam_a, cam_b: there are other images, such as c.jpg"),
        (["station/query/1.jpg", "station2/2.jpg"], None),
        (["s1/cam_a/1.jpg", "s1/cam_b/1.jpg", "s2/cam_a/1.jpg", "s2/cam_b/1.jpg"], None),
        (["cam_a/1.jpg"], None),
    ],
)
def test_crops_in_folders_of_common_names_are_all_read(tmp_path, names, note):
    touch(*(tmp_path / name for name in names))
    listing = list_images(tmp_path)
    assert [i.name for i in listing.images] == sorted(names) and not listing.rejected
    assert {(i.split, i.pid) for i in listing.images} == {("all", -1)}
    assert listing.layout == "a plain folder" and listing.notes == ([note] if note else [])


def test_a_data_set_beside_other_crops_is_a_choice(tmp_path):
    fill(tmp_path / "sets" / "market", {"query": ["0002_c1_1.jpg"], "bounding_box_test": []})
    touch(tmp_path / "crops" / "mine" / "x.jpg")
    (tmp_path / "crops" / "link").symlink_to(tmp_path / "sets")
    with pytest.raises(ValueError, match=r"one data set, got .* with .*link/market and images in .*mine besides"):
        list_images(tmp_path / "crops")


def test_what_cannot_be_read_beside_a_data_set_is_passed_over(tmp_path, monkeypatch):
    fill(tmp_path / "market", {"query": ["0002_c1_1.jpg"], "bounding_box_test": []})
    touch(tmp_path / "lost+found" / "x.jpg")
    monkeypatch.setattr(os, "access", lambda path, mode: "lost" not in str(path))
    assert list_images(tmp_path).root == tmp_path / "market"


def test_people_counted_from_zero_are_told_of(tmp_path):
    touch(*(tmp_path / f"{k}" / "a.jpg" for k in range(3)))
    listing = list_images(tmp_path)
    assert [i.pid for i in listing.images] == [0, 1, 2]
    assert listing.notes == ["whoever is called 0 is read as a distractor, who is nobody: count people from 1"]
    assert (
        format_data(report_data(tmp_path))
        .splitlines()[1]
        .endswith("2 people, 0 cameras, 1 distractors, no cameras, no times")
    )


@pytest.mark.parametrize(
    ("place", "layout"),
    [
        ("unlabeled/mine", "Market-1501's layout"),
        ("labeled/mine", "Market-1501's layout"),
        ("duke/mine", "Market-1501's layout"),
        ("supermarket", "Market-1501's layout"),
        ("cuhk03/CUHK03_labeled", "CUHK03-NP labeled"),
        ("x/market", "Market-1501"),
    ],
)
def test_a_path_says_which_data_set_it_is_or_does_not(tmp_path, place, layout):
    fill(tmp_path / place, {"query": ["0002_c1_1.jpg"], "bounding_box_test": []})
    listing = list_images(tmp_path / place)
    assert listing.layout == layout and any(layout in note for note in listing.notes) == ("layout" not in layout)


def test_the_size_of_a_data_set_counts_more_than_its_path(market1501, tmp_path):
    (tmp_path / "CUHK03_labeled").symlink_to(market1501)
    (tmp_path / "cuhk03" / "labeled").mkdir(parents=True)
    for folder in ("bounding_box_train", "bounding_box_test", "query"):
        (tmp_path / "cuhk03" / "labeled" / folder).symlink_to(market1501 / folder)
    assert list_images(tmp_path / "cuhk03" / "labeled").layout == "Market-1501"


# CUHK03 as published


def cuhk03_mats(root, people=(3, 2), kinds=("detected", "labeled")):
    """Ten images of each person of each pair of cameras, the last of them empty; their colours tell them apart."""
    root.mkdir(parents=True)
    with h5py.File(root / "cuhk-03.mat", "w") as file:
        for k, kind in enumerate(kinds):
            pairs = file.create_dataset(kind, (1, len(people)), h5py.ref_dtype)
            for pair, number in enumerate(people):
                cells = file.create_dataset(f"#refs#/{kind}{pair}", (10, number), h5py.ref_dtype)
                pairs[0, pair] = cells.ref
                for image, person in itertools.product(range(10), range(number)):
                    pixels = np.full((12, 9, 3), (100 * k + pair, person, image), np.uint8)
                    pixels[0, 0] = 255  # upper left, to see that it is the right way round
                    data = pixels.T if image < 9 else np.zeros(2, np.uint64)
                    cells[image, person] = file.create_dataset(f"#refs#/{kind}{pair}-{person}-{image}", data=data).ref
    files = [
        (pair, person, image) for pair, number in enumerate(people) for person in range(number) for image in range(9)
    ]
    labels = {place: k for k, place in enumerate(dict.fromkeys((pair, person) for pair, person, _ in files), 1)}
    config = {
        "labels": np.array([[labels[pair, person]] for pair, person, _ in files], np.uint16),
        "camId": np.array([[1 + (image >= 5)] for *_, image in files], np.uint8),
        "filelist": np.array(
            [[f"{a + 1}_{b + 1:03d}_{1 + (c >= 5)}_{c + 1:02d}.png"] for a, b, c in files], dtype=object
        ),
        "train_idx": np.array([[k] for k, (pair, _, _) in enumerate(files, 1) if pair == 0]),
        "query_idx": np.array([[k] for k, (pair, _, c) in enumerate(files, 1) if pair == 1 and c in (0, 5)]),
        "gallery_idx": np.array([[k] for k, (pair, _, c) in enumerate(files, 1) if pair == 1 and c not in (0, 5)]),
    }
    for kind in kinds:
        scipy.io.savemat(root / f"cuhk03_new_protocol_config_{kind}.mat", config)
    return root


def test_cuhk03_as_published(tmp_path, capsys):
    root = cuhk03_mats(tmp_path / "cuhk03" / "cuhk03_release")
    with pytest.raises(ValueError, match=rf"one file: write .* python -m reid3d.data.cuhk03 {root} OUT"):
        list_images(tmp_path / "cuhk03")
    assert main([str(root), str(tmp_path / "np")]) == 0
    assert capsys.readouterr().out == "".join(
        f"{tmp_path / 'np' / kind}: 45 images\n" for kind in ("detected", "labeled")
    )
    listing = list_images(tmp_path / "np" / "labeled")
    assert count(listing.images) == {"train": (27, 3), "query": (4, 2), "gallery": (14, 2)} and not listing.rejected
    for image in listing.images:
        pair, person = (0, image.pid - 1) if image.pid <= 3 else (1, image.pid - 4)
        number = int(image.name.split("_")[-1].removesuffix(".png")) - 1
        pixels = np.asarray(Image.open(image.path))
        assert pixels.shape == (12, 9, 3)
        assert pixels[0, 0].tolist() == [255] * 3 and pixels[5, 5].tolist() == [100 + pair, person, number]
        assert image.camid == 1 + (number >= 5)


@pytest.mark.parametrize("root", ["cuhk03", "cuhk03/cuhk03_release"])
def test_the_protocol_of_cuhk03_may_lie_above_its_images(tmp_path, root):
    release = cuhk03_mats(tmp_path / "cuhk03" / "cuhk03_release", kinds=("labeled",))
    name = "cuhk03_new_protocol_config_labeled.mat"
    (release / name).rename(release.parent / name)
    assert extract_cuhk03(tmp_path / root, tmp_path / "np", progress=False) == {"labeled": 45}


def test_an_extraction_goes_on_where_it_stopped(tmp_path):
    root = cuhk03_mats(tmp_path / "raw", kinds=("detected",))
    extract_cuhk03(root, tmp_path / "np", progress=False)
    kept = tmp_path / "np" / "detected" / "query" / "0004_c1_1.png"
    (tmp_path / "np" / "detected" / "query" / "0004_c2_6.png").unlink()
    kept.write_bytes(b"mine")
    assert extract_cuhk03(root, tmp_path / "np", progress=False) == {"detected": 45}
    assert kept.read_bytes() == b"mine" and (kept.parent / "0004_c2_6.png").is_file()


def test_what_is_not_cuhk03(tmp_path, capsys):
    root = cuhk03_mats(tmp_path / "raw", people=(3, 2), kinds=("detected",))
    with pytest.raises(FileNotFoundError, match="root: no cuhk-03.mat in"):
        extract_cuhk03(tmp_path, tmp_path / "np", progress=False)
    config = root / "cuhk03_new_protocol_config_detected.mat"
    good = scipy.io.loadmat(config)
    for key, value in (("train_idx", 0), ("train_idx", 999), ("filelist", np.array([["a.png"]], dtype=object))):
        wrong = {name: values for name, values in good.items() if not name.startswith("__")}
        wrong[key] = np.array([[value]]) if isinstance(value, int) else value
        scipy.io.savemat(config, wrong)
        with pytest.raises(ValueError, match="is no configuration of the new protocol"):
            extract_cuhk03(root, tmp_path / "np", progress=False)
    for name in ("1_001_2_10.png", "1_009_1_01.png", "7_001_1_01.png"):
        wrong = {key: values for key, values in good.items() if not key.startswith("__")}
        wrong["filelist"] = np.array([[name]] * 45, dtype=object)
        scipy.io.savemat(config, wrong)
        with pytest.raises(ValueError, match=r"cuhk-03.mat(: detected| has no detected) image"):
            extract_cuhk03(root, tmp_path / "np", progress=False)
    (root / "cuhk-03.mat").write_bytes(b"no")
    with pytest.raises(ValueError, match="is no HDF5 file"):
        extract_cuhk03(root, tmp_path / "np", progress=False)
    config.unlink()
    assert main([str(root), str(tmp_path / "np")]) == 1
    assert "neither cuhk03_new_protocol_config_detected.mat nor" in capsys.readouterr().err
    assert not list((tmp_path / "np").rglob("*.png"))


# What reid3d doctor says of them


def test_the_doctor_explains_a_data_set(tmp_path):
    names = ["0002_c1s1_000451_03.jpg", "a.jpg", "b.jpg"]
    fill(tmp_path, {"query": names, "bounding_box_test": ["-1_c1s1_000451_03.jpg", "0000_c1_1.jpg"]})
    report = report_data(tmp_path)
    assert report["layout"] == "Market-1501's layout" and list(report["splits"]) == ["query", "gallery"]
    assert format_data(report).splitlines() == [
        f"Market-1501's layout in {tmp_path}",
        "query             1 images, 1 people, 1 cameras",
        "gallery           2 images, 0 people, 1 cameras, 1 junk, 1 distractors, 1 without a time",
        "not used          2 files, such as query/a.jpg: the name does not fit PID_cCAMERA..., such as "
        "0002_c1s1_000451_03.jpg",
        "note      bounding_box_train is missing: no train images",
    ]


def test_the_doctor_explains_a_plain_folder_and_refuses_an_empty_one(tmp_path):
    touch(tmp_path / "crops" / "a.jpg")
    assert format_data(report_data(tmp_path / "crops")).splitlines() == [
        f"a plain folder in {tmp_path / 'crops'}",
        "all               1 images, 0 people, 0 cameras, no cameras, no times",
    ]
    (tmp_path / "crops" / "a.jpg").rename(tmp_path / "crops" / "a.txt")
    with pytest.raises(ValueError, match=r"data: nothing to use in .* \(a.txt: not an image name"):
        report_data(tmp_path / "crops")


def test_the_doctor_prints_any_name_on_one_line(tmp_path):
    fill(tmp_path, {"query": ["a\nb.jpg", "0001_c1_1.jpg"], "bounding_box_test": []})
    os.close(os.open(os.fsencode(tmp_path) + b"/bounding_box_test/\xfe.jpg", os.O_CREAT))
    text = format_data(report_data(tmp_path))
    text.encode()
    assert r"query/a\nb.jpg" in text or r"\udcfe.jpg" in text
    assert len(text.splitlines()) == 4


def test_the_doctor_and_files_that_are_not_what_they_seem(tmp_path):
    touch(tmp_path / "crops" / "a.jpg", tmp_path / "crops" / "model.safetensors")
    assert report_data(tmp_path / "crops")["splits"]["all"]["images"] == 1
    (tmp_path / "people.csv").write_text("path\n")
    with pytest.raises(ValueError, match=r"data: nothing to use in .*people.csv \(it is empty\)"):
        report_data(tmp_path / "people.csv")
