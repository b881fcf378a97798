"""Ten thousand broken files: nothing but the failures that a run reports."""

import io
import warnings
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from reid3d.cloud import PointCloud
from reid3d.data.images import read_picture, resize
from reid3d.io import Record, Shard, write_shard

IMAGES, SHARDS = 6000, 4000


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """The bytes after one to eight accidents: changed, lost, doubled, zeroed, cut off."""
    for _ in range(rng.integers(1, 9)):
        start = int(
            rng.integers(min(96, len(data) + 1) if rng.random() < 0.5 else len(data) + 1)
        )  # often in the header
        piece = data[start : start + int(rng.integers(1, 64))]
        rest = data[start + len(piece) :]
        flipped = bytes([piece[0] ^ (1 << int(rng.integers(8)))]) + piece[1:] if piece else b""
        accidents = [rng.bytes(len(piece)), b"", 2 * piece, bytes(len(piece)), b"\xff" * len(piece), flipped, None]
        accident = accidents[rng.integers(len(accidents))]
        data = data[:start] if accident is None else data[:start] + accident + rest
    return data


def pictures() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 24, 3)).astype(np.uint8)
    picture = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = []
    for image, kind, options in (
        (picture, "JPEG", {"quality": 80}),
        (picture, "JPEG", {"progressive": True, "exif": exif}),
        (picture.convert("L"), "JPEG", {}),
        (picture.convert("CMYK"), "JPEG", {}),
        (picture, "PNG", {"exif": exif}),
        (picture.convert("P"), "PNG", {"transparency": 3}),
        (Image.fromarray(np.full((48, 24), 30000, np.uint16)), "PNG", {}),
        (picture.convert("RGBA"), "PNG", {}),
        (picture, "BMP", {}),
        (picture.convert("P"), "BMP", {}),
        (picture, "WEBP", {"lossless": True}),
        (picture, "WEBP", {"exif": exif}),
    ):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files.append(buffer.getvalue())
    return files


def test_broken_images_are_listed_failures(tmp_path):
    rng, files, path, outcomes = np.random.default_rng(0), pictures(), tmp_path / "a.jpg", Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow has its say on broken metadata
        for k in range(IMAGES):
            path.write_bytes(mutated(files[k % len(files)], rng))
            try:
                pixels, size = read_picture(path, 256)
            except (OSError, ValueError) as error:  # what a run catches and lists (preprocess/engines.py)
                assert str(error) and "\n" not in str(error)
                outcomes[type(error).__name__] += 1
            else:
                assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and min(size) >= 8
                assert resize(pixels, (16, 8)).shape == (16, 8, 3)
                outcomes["read"] += 1
    assert outcomes["ValueError"] > IMAGES // 4 and outcomes["read"] > IMAGES // 20


@pytest.fixture
def shard(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "all-00000.safetensors"
    clouds = [
        PointCloud(rng.random((6, 3), np.float32), rng.integers(0, 256, (6, 3), np.uint8), np.arange(6, dtype=np.int32))
        for _ in range(3)
    ]
    records = [Record(f"{i}.jpg", "all", 1, 2, 3, (3, 2), (1.0, 0.0, 0.0), {"confidence": 0.5}, 0.5) for i in range(3)]
    bodies = {"pose": rng.random((3, 24, 3), np.float32), "betas": rng.random((3, 10), np.float32)}
    write_shard(path, clouds, records, config={"a": [1]}, bodies=bodies, failures={"b.jpg": "empty file"})
    return path


def test_broken_shards_are_named(shard):
    rng, outcomes = np.random.default_rng(1), Counter()
    manifest = shard.with_suffix(".jsonl")
    whole = {path: path.read_bytes() for path in (shard, manifest)}
    for k in range(SHARDS):
        path = manifest if k % 3 == 0 else shard
        path.write_bytes(mutated(whole[path], rng))
        try:
            found = Shard(shard)
            for i in range(len(found)):
                assert len(found[i]) == found.records[i].num_points
                found.body(i)
            outcomes["read"] += 1
            found.verify()
            assert path.read_bytes() == whole[path] or found.metadata["sha256"]  # a note in the header may have changed
            outcomes["verified"] += 1
        except ValueError as error:
            assert str(shard.parent) in str(error) and "\n" not in str(error)
            outcomes["ValueError"] += 1
        path.write_bytes(whole[path])
    assert outcomes["ValueError"] > SHARDS * 0.9 and outcomes["read"] > 10 and outcomes["verified"] < SHARDS // 50
