"""CUHK03 as published, one cuhk-03.mat, to the folders of the new protocol: python -m reid3d.data.cuhk03 ROOT OUT."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..io import atomic_write
from ..progress import Progress
from .layouts import CUHK03

KINDS = ("detected", "labeled")
RELEASE = "cuhk03_release"
PROTOCOL = "cuhk03_new_protocol_config_{}.mat"
FOLDERS = {"train_idx": "bounding_box_train", "query_idx": "query", "gallery_idx": "bounding_box_test"}


def extract_cuhk03(root: str | Path, out: str | Path, *, progress: bool = True) -> dict[str, int]:
    """Write the crops of CUHK03 into OUT/detected and OUT/labeled, in the layout of CUHK03-NP; {kind: images}.

    `root` holds cuhk-03.mat, or its folder cuhk03_release does. There or in the folder above lie
    cuhk03_new_protocol_config_detected.mat or _labeled.mat, or both, which say who is in which split; a kind without
    one is left out. Files are named 0001_c1_1.png by label, camera and number of the image (1 to 10) of its person.
    Files that are there stay, so that a stopped extraction is finished by the same call.

    Raises: FileNotFoundError when a .mat is not there; ValueError when one is not as published or the configuration
        names an image that cuhk-03.mat lacks; ModuleNotFoundError without h5py and scipy.

    Source: CUHK03, Li et al., CVPR 2014; the new protocol, Zhong et al., CVPR 2017.
    """
    try:
        import h5py
        from scipy.io import loadmat
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name} reads CUHK03's .mat files: pip install h5py scipy") from error
    root, out = Path(root), Path(out)
    matrix = next((path for path in (root / CUHK03, root / RELEASE / CUHK03) if path.is_file()), None)
    if matrix is None:
        raise FileNotFoundError(f"root: no {CUHK03} in {root}")
    configs = {
        kind: folder / PROTOCOL.format(kind)
        for kind in KINDS
        for folder in (matrix.absolute().parent.parent, matrix.parent)
        if (folder / PROTOCOL.format(kind)).is_file()
    }
    if not configs:
        names = " nor ".join(map(PROTOCOL.format, KINDS))
        raise FileNotFoundError(f"root: neither {names} in {matrix.parent} or the folder above")
    wanted = {}
    for kind, path in configs.items():
        try:
            wanted[kind] = _places(loadmat(path))
        except Exception as error:  # scipy's reader raises almost anything on broken bytes
            raise ValueError(f"{path} is no configuration of the new protocol: {error}") from error
    with Progress(sum(map(len, wanted.values())), "extract", "crop", progress) as bar:
        try:
            file = h5py.File(matrix, "r")
        except OSError as error:
            raise ValueError(f"{matrix} is no HDF5 file: {error}") from error
        with file:
            for kind, places in wanted.items():
                for image, place in places.items():
                    path = out / kind / place
                    if not path.exists():
                        pixels = _pixels(file, kind, image)
                        path.parent.mkdir(parents=True, exist_ok=True)
                        with atomic_write(path) as target:
                            Image.fromarray(pixels).save(target, "PNG")
                    bar.add(1)
    return {kind: len(places) for kind, places in wanted.items()}


def _places(config: dict[str, Any]) -> dict[tuple[int, int, int], str]:
    """{(pair of cameras, person, image): file in the layout of CUHK03-NP}, all counted from 1."""
    labels, cameras = (config[key].ravel().astype(int).tolist() for key in ("labels", "camId"))
    names = [str(np.ravel(cell)[0]) for cell in config["filelist"].ravel()]
    places = {}
    for key, folder in FOLDERS.items():
        for i in (config[key].ravel().astype(int) - 1).tolist():
            if i < 0:
                raise ValueError(f"{key} must count from 1, got 0")
            pair, person, _, image = map(int, names[i].removesuffix(".png").split("_"))
            places[pair, person, image] = f"{folder}/{labels[i]:04d}_c{cameras[i]}_{image}.png"
    return places


def _pixels(file: Any, kind: str, image: tuple[int, int, int]) -> np.ndarray:
    pair, person, number = image
    try:
        people = file[file[kind][0, pair - 1]]  # (10, people): MATLAB's columns come first in HDF5
        pixels = file[people[number - 1, person - 1]][()].T
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise ValueError(f"{CUHK03} has no {kind} image {number} of person {person}, pair {pair}: {error}") from error
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"{CUHK03}: {kind} image {number} of person {person}, pair {pair} is empty")
    return np.ascontiguousarray(pixels)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m reid3d.data.cuhk03", description=__doc__)
    parser.add_argument("root", metavar="ROOT", type=Path, help="folder with cuhk-03.mat and the new protocol's .mat")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write detected/ and labeled/ into")
    options = parser.parse_args(argv)
    try:
        counts = extract_cuhk03(options.root, options.out)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"reid3d.data.cuhk03: error: {error}", file=sys.stderr)
        return 1
    for kind, images in counts.items():
        print(f"{options.out / kind}: {images:,} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
