"""Data sets of crops: the same as those of clouds, but pixels; and what opens which."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from reid3d.data import ImageEvalTransform, ImageTrainTransform, open_crops, open_dataset, validate_protocol
from reid3d.data.images import read_picture

PEOPLE = [
    ("bounding_box_train", "0007_c1s1_000010_00.jpg"),
    ("bounding_box_train", "0003_c2s1_000020_00.jpg"),
    ("bounding_box_train", "0003_c1s2_000030_00.jpg"),
    ("query", "0005_c1s1_000040_00.jpg"),
    ("bounding_box_test", "0005_c2s1_000050_00.jpg"),
    ("bounding_box_test", "-1_c3s1_000060_00.jpg"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write(tmp_path_factory.mktemp("market"))


def write(root):
    for i, (folder, name) in enumerate(PEOPLE):
        (root / folder).mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (24, 12, 3), np.uint8)
        Image.fromarray(pixels).save(root / folder / name)
    return root


def test_splits_know_who_is_on_each_crop(root):
    dataset = open_dataset(root)
    train = dataset.train
    assert train.inputs == "image" and dataset.root == root
    assert train.names == [f"bounding_box_train/{name}" for name in sorted(name for _, name in PEOPLE[:3])]
    assert train.pids.tolist() == [3, 3, 7] and train.camids.tolist() == [1, 2, 1]
    assert train.times.tolist() == [1_000_030, 20, 10]
    assert train.labels.tolist() == [0, 0, 1] and train.num_pids == 2
    assert [len(split) for split in (train, dataset.query, dataset.gallery, dataset.all)] == [3, 1, 2, 0]
    assert repr(train) == "ImageSplit('train', 3 images, 2 pids, 2 cameras)"
    assert validate_protocol(dataset.query, dataset.gallery) == ""
    other = train.subset([2])
    assert other.names == train.names[2:] and other.labels.tolist() == [0] and other.num_pids == 1


def test_items_are_what_the_transform_makes_of_the_pixels(root):
    train = open_crops(root).train
    images, label, i = train[1]
    assert images.shape == (3, 256, 128) and images.dtype == torch.uint8 and (label, i) == (0, 1)
    train = train.with_transform(ImageEvalTransform(24, 12))
    expected = read_picture(root / train.names[2], 48).pixels
    assert np.array_equal(train[2][0].numpy(), expected.transpose(2, 0, 1))


def test_random_numbers_follow_from_seed_epoch_item_and_draw(root):
    train = open_crops(root).train.with_transform(ImageTrainTransform(24, 12, erasing=1.0), seed=3)
    one = train[0, 1][0]
    assert torch.equal(one, train[0, 1][0]) and not torch.equal(one, train[0, 2][0])
    in_workers = next(iter(DataLoader(train, batch_sampler=[[(0, 1), (2, 0)]], num_workers=2)))
    assert torch.equal(in_workers[0][0], one) and in_workers[1].tolist() == [0, 1]
    train.set_epoch(1)
    assert not torch.equal(one, train[0, 1][0])


def test_fingerprint_is_of_the_content_and_not_of_the_place(root, tmp_path):
    there = open_crops(write(tmp_path)).train
    assert there.fingerprint() == open_crops(root).train.fingerprint()
    Image.new("RGB", (12, 24)).save(tmp_path / there.names[0])
    assert there.fingerprint() != open_crops(root).train.fingerprint()


def test_a_crop_that_cannot_be_read_is_named(tmp_path):
    train = open_crops(write(tmp_path)).train
    (tmp_path / train.names[1]).write_bytes(b"\xff\xd8\xff no image")
    with pytest.raises(ValueError, match=f"^{train.names[1]}: broken image"):
        train[1]


def test_a_table_and_an_image_are_data_sets_too(root, tmp_path):
    path = root / PEOPLE[3][0] / PEOPLE[3][1]
    assert open_dataset(path).all.names == [path.name]
    Image.new("RGB", (12, 24)).save(tmp_path / "a.png")
    (tmp_path / "people.csv").write_text("path,pid,split\na.png,4,query\n")
    assert open_dataset(tmp_path / "people.csv").query.pids.tolist() == [4]


def test_what_holds_neither(tmp_path):
    (tmp_path / "notes.txt").write_text("no data set")
    with pytest.raises(FileNotFoundError, match="root: no such folder"):
        open_dataset(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match="root: no such folder"):
        open_dataset(tmp_path / "none")
    with pytest.raises(ValueError, match=f"root holds no cloud shards: {tmp_path} .*; root holds no crops"):
        open_dataset(tmp_path)
    with pytest.raises(ValueError, match="root holds no crops"):
        open_crops(tmp_path)
