import json
import os
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from reid3d.cloud import PointCloud
from reid3d.data import BalancedSampler, open_dataset, validate_protocol
from reid3d.io import DATASET_FILE, Record, write_shard

POINTS = 12
PEOPLE = [  # split, pid, camid, time
    *[("train", pid, camid, 10 * pid) for pid in (7, 3, 12) for camid in (1, 2)],
    ("query", 5, 1, 100),
    ("gallery", 5, 2, 200),
    ("gallery", 0, 2, -1),
    ("gallery", -1, -1, 300),
]


def cloud(i):
    rng = np.random.default_rng(i)
    xyz = rng.uniform(-1, 1, (POINTS, 3)).astype(np.float16).astype(np.float32)
    return PointCloud(xyz, rng.integers(0, 256, (POINTS, 3), np.uint8), np.arange(POINTS, dtype=np.int32))


def write(root, people, per_shard=4, config=None, size=(3, 4), name="{}.jpg"):
    """Shards of at most `per_shard` clouds of one split, as a conversion would write them."""
    root.mkdir(exist_ok=True)
    shards = {}
    for split in dict.fromkeys(person[0] for person in people):
        mine = [(i, person) for i, person in enumerate(people) if person[0] == split]
        for k, start in enumerate(range(0, len(mine), per_shard)):
            chunk = mine[start : start + per_shard]
            records = [Record(name.format(i), *person, size, (1.0, 0.0, 0.0)) for i, person in chunk]
            write_shard(
                root / f"{split}-{k:05d}.safetensors", [cloud(i) for i, _ in chunk], records, config=config or {}
            )
            shards[split] = k + 1
    (root / DATASET_FILE).write_text(json.dumps({"shards": shards}))
    return root


@pytest.fixture
def root(tmp_path):
    return write(tmp_path / "clouds", PEOPLE)


@dataclass
class Draw:
    """All points as they are, the first moved by a random number."""

    def __call__(self, cloud, rng):
        xyz = torch.from_numpy(cloud.xyz)
        xyz[0] = float(rng.random())
        return xyz, torch.from_numpy(cloud.rgb / np.float32(255) - np.float32(0.5))


def test_splits_hold_their_records_in_order(root):
    data = open_dataset(root)
    assert [len(split) for split in (data.train, data.query, data.gallery, data.all)] == [6, 1, 3, 0]
    assert data.train.names == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg"]  # over two shards
    assert data.train.pids.tolist() == [7, 7, 3, 3, 12, 12]
    assert data.gallery.pids.tolist() == [5, 0, -1]
    assert data.gallery.camids.tolist() == [2, 2, -1]
    assert data.gallery.times.tolist() == [200, -1, 300]
    assert {str(a.dtype) for a in (data.train.pids, data.train.camids, data.train.times)} == {"int64"}
    assert data.root == data.query.root == root
    assert data.query.name == "query"


def test_labels_are_positions_in_the_sorted_pids(root):
    train = open_dataset(root).train
    assert train.labels.tolist() == [1, 1, 0, 0, 2, 2]
    assert train.num_pids == 3
    assert open_dataset(root).all.num_pids == 0


def test_clouds_are_the_ones_written(root):
    split = open_dataset(root).gallery
    for i, number in enumerate((7, 8, 9)):
        for name in ("xyz", "rgb", "vertex"):
            assert np.array_equal(getattr(split.cloud(i), name), getattr(cloud(number), name))


def test_the_default_items_are_centred_points(root):
    xyz, rgb, label, i = open_dataset(root).train[2]
    assert (xyz.shape, xyz.dtype, rgb.shape, rgb.dtype) == ((4096, 3), torch.float32, (4096, 3), torch.float32)
    assert rgb.min() >= -0.5 and rgb.max() <= 0.5
    assert (label, i) == (0, 2)
    centred = cloud(2).xyz - cloud(2).xyz.mean(0)
    assert torch.allclose(xyz[0], torch.from_numpy(centred[0]), atol=1e-6)


def test_items_index_like_a_sequence(root):
    train = open_dataset(root).train
    assert train[-1][3] == 5
    with pytest.raises(IndexError):
        train[6]


def drawn(split, *items):
    return [float(split[item][0][0, 0]) for item in items]


def number(*seeds):
    return np.float32(np.random.default_rng(seeds).random())


def test_randomness_depends_on_seed_epoch_index_and_draw_alone(root):
    train = open_dataset(root).train
    split = train.with_transform(Draw(), seed=4)
    split.set_epoch(2)
    expected = {item: number(2, 4, 2, *item) for item in [(5, 0), (0, 0), (3, 0), (3, 1)]}
    assert drawn(split, 5, 0, 3, *expected) == [expected[i, 0] for i in (5, 0, 3)] + list(expected.values())
    other = split.with_transform(Draw(), seed=4)
    assert drawn(other, 0) == [number(2, 4, 0, 0, 0)]
    assert drawn(split, 0) == [expected[0, 0]]
    assert train[0][0].shape == (4096, 3)  # its own transform still


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_give_the_same_items_and_see_the_epoch(root, context):
    split = open_dataset(root).train.with_transform(Draw(), seed=1)
    alone = DataLoader(split, batch_size=2)
    workers = DataLoader(split, batch_size=2, num_workers=2, persistent_workers=True, multiprocessing_context=context)
    seen = []
    for epoch in (0, 1):
        split.set_epoch(epoch)
        for ours, theirs in zip(alone, workers, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
            seen.append(ours[0])
    assert not torch.equal(seen[0], seen[3])
    workers._iterator._shutdown_workers()


def test_each_draw_of_a_cloud_is_another_in_workers_too(root):
    split = open_dataset(root).train.with_transform(Draw(), seed=1)
    sampler = BalancedSampler(np.zeros(6, np.int64), seed=3)
    alone = [item for batch in DataLoader(split, batch_size=2, sampler=sampler) for item in zip(*batch, strict=True)]
    loader = DataLoader(split, batch_size=2, sampler=sampler, num_workers=2)
    workers = [item for batch in loader for item in zip(*batch, strict=True)]
    clouds = [int(item[3]) for item in alone]
    assert len(set(clouds)) < 6
    assert len({float(item[0][0, 0]) for item in alone}) == 6
    assert all(torch.equal(a[0], b[0]) and int(a[3]) == int(b[3]) for a, b in zip(alone, workers, strict=True))


def test_the_fingerfirstis_of_the_content(tmp_path):
    ones = write(tmp_path / "a", PEOPLE)
    first = open_dataset(ones).train.fingerprint()
    assert open_dataset(write(tmp_path / "b", PEOPLE)).train.fingerprint() == first
    assert open_dataset(ones.rename(tmp_path / "c")).train.fingerprint() == first
    assert open_dataset(write(tmp_path / "d", PEOPLE, config={"fitter": "another"})).train.fingerprint() != first
    assert open_dataset(write(tmp_path / "e", PEOPLE, size=(4, 3))).train.fingerprint() != first
    assert open_dataset(write(tmp_path / "f", PEOPLE[1:])).train.fingerprint() != first
    assert open_dataset(write(tmp_path / "g", PEOPLE, name="\udcff{}.jpg")).train.fingerprint() != first


def test_a_split_is_pickled(root):
    split = open_dataset(root).train.with_transform(Draw(), seed=1)
    split.set_epoch(3)
    copy = pickle.loads(pickle.dumps(split))
    assert torch.equal(copy[4][0], split[4][0])
    assert copy.names == split.names


def test_set_epoch_refuses_negative_numbers(root):
    with pytest.raises(ValueError, match="epoch must be >= 0, got -1"):
        open_dataset(root).train.set_epoch(-1)


def test_repr_counts(root):
    assert repr(open_dataset(root).train) == "CloudSplit('train', 6 clouds, 3 pids, 2 cameras)"


def test_shards_written_by_hand_need_no_description(root):
    (root / DATASET_FILE).unlink()
    assert len(open_dataset(str(root)).train) == 6


def test_hidden_files_are_passed_over(root):
    (root / ".half.safetensors").write_bytes(b"half")
    assert len(open_dataset(root).train) == 6


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"root: no such folder: {tmp_path / 'no'}"):
        open_dataset(tmp_path / "no")
    with pytest.raises(ValueError, match=f"root holds no cloud shards: {tmp_path}"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("lost", ["train-00001.jsonl", "train-00001.safetensors"])
def test_an_unfinished_conversion_is_refused(root, lost):
    (root / lost).unlink()
    with pytest.raises(ValueError, match=r"is not finished \(train: 1 of 2 shards\); run the same reid3d convert"):
        open_dataset(root)


def test_a_truncated_shard_is_refused_by_name(root):
    path = root / "gallery-00000.safetensors"
    os.truncate(path, 200)
    with pytest.raises(ValueError, match=f"{path}: not a whole safetensors file"):
        open_dataset(root)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"shards": 3}', '{"shards": {"train": "x"}}'])
def test_a_foreign_description_is_refused_by_name(root, text):
    (root / DATASET_FILE).write_text(text)
    with pytest.raises(ValueError, match=f"{root / DATASET_FILE}: not the description of a converted folder"):
        open_dataset(root)


def test_an_unknown_split_is_refused(tmp_path):
    root = write(tmp_path / "clouds", [("val", 1, 1, 1)])
    with pytest.raises(ValueError, match="split must be one of train, query, gallery, all, got .'val'."):
        open_dataset(root)


# Is there anything to find?


class People:
    def __init__(self, *pairs):
        self.pids, self.camids = (np.array(column, np.int64) for column in zip(*pairs, strict=True))
        self.names = [f"{pid}_c{camid}_{i}.jpg" for i, (pid, camid) in enumerate(pairs)]


def test_every_query_has_a_match(root):
    data = open_dataset(root)
    assert validate_protocol(data.query, data.gallery) == ""


def test_queries_without_a_match_from_another_camera_are_counted_and_three_named():
    query = People((1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (-1, 1), (6, -1))
    gallery = People((1, 2), (2, 1), (4, 1), (4, 1), (-1, 2), (6, -1), (9, 1))
    assert validate_protocol(query, gallery) == (
        "5 of 7 queries have no match from another camera in the gallery: 2_c1_1.jpg, 3_c1_2.jpg, 4_c1_3.jpg, ..."
    )


def test_a_gallery_without_cameras_matches():
    assert validate_protocol(People((1, 1)), People((1, -1))) == ""


def test_an_evaluation_of_nothing_is_refused(root):
    data = open_dataset(root)
    with pytest.raises(ValueError, match="gallery must not be empty"):
        validate_protocol(data.query, data.all)
    with pytest.raises(ValueError, match="query must not be empty"):
        validate_protocol(data.all, data.gallery)
    with pytest.raises(ValueError, match=r"1 of 1 queries have no match .* in the gallery: 1_c1_0.jpg$"):
        validate_protocol(People((1, 1)), People((1, 1), (2, 2)))
