"""The results page, read back with a parser: what it shows, that it needs nothing else, that nothing breaks out."""

import base64
import json
import os
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

from reid3d.cloud import PointCloud
from reid3d.data import open_dataset
from reid3d.io import Record, write_shard
from reid3d.retrieval import Features, evaluate, search
from reid3d.viewer import view
from reid3d.viewer.html import MATCHES
from tests.capsules import capsule_person, write_capsules

VOID = {"meta", "input", "br", "link", "img"}


class Page(HTMLParser):
    """Rows of cards; fails on elements that are not closed in order."""

    def __init__(self, path) -> None:
        super().__init__()
        self.text, self.open, self.rows, self.scripts, self.tabs = path.read_text(encoding="utf-8"), [], [], [], []
        self.words: list[str] = []
        self.feed(self.text)
        self.close()
        assert self.open == []
        self.clouds = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.rows.append({"groups": values["data-groups"].split(), "cards": []})
        elif tag == "figure":
            self.rows[-1]["cards"].append({"kind": values["class"].split()[1], "title": values["title"], "text": []})
        elif tag == "canvas":
            card = self.rows[-1]["cards"][-1]
            card[values["class"]], card["label"] = int(values["data-cloud"]), values["aria-label"]
        elif tag == "script":
            self.scripts.append("")
        elif tag == "button":
            self.tabs.append(values["data-tab"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts[-1] += data
        elif "figcaption" in self.open:
            self.rows[-1]["cards"][-1]["text"].append(data)
        else:
            self.words.append(data)


def decode(cloud: dict) -> tuple[np.ndarray, np.ndarray]:
    raw, n = zlib.decompress(base64.b64decode(cloud["data"])), cloud["points"]
    values = np.frombuffer(raw, "<i2", 3 * n).reshape(3, n).T
    return cloud["origin"] + cloud["step"] * values, np.frombuffer(raw, np.uint8, offset=6 * n).reshape(3, n).T


def features_of(split, noise: float, seed: int) -> Features:
    """A direction for each pid, blurred: some matches are right and some wrong."""
    directions = np.random.default_rng(0).standard_normal((200, 16))
    blur = np.random.default_rng(seed).standard_normal((len(split), 16)) * noise
    feats = (directions[split.pids] + blur).astype(np.float32)
    names = [record.name for record in split.records]
    return Features(feats, split.pids, split.camids, names, split.times, str(split.root), split.name)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return open_dataset(write_capsules(tmp_path_factory.mktemp("view") / "shards", ids=24, cams=2, images=3))


@pytest.fixture(scope="module")
def ranks(dataset):
    return search(features_of(dataset.query, 1.2, 1), features_of(dataset.gallery, 1.2, 2), k=10, cross_camera=True)


@pytest.fixture(scope="module")
def page(ranks, tmp_path_factory):
    return Page(view(ranks, tmp_path_factory.mktemp("page") / "ranks.html"))


def test_rows_show_the_ranks(page, ranks):
    q, g = ranks.query, ranks.gallery
    assert len(page.rows) == 12
    kinds = set()
    for row in page.rows:
        query, *matches = row["cards"]
        i = q.names.index(query["title"])
        assert query["kind"] == "query"
        assert [card["title"] for card in matches] == [g.names[j] for j in ranks.idx[i, :MATCHES]]
        for place, (card, j) in enumerate(zip(matches, ranks.idx[i], strict=False), 1):
            assert card["kind"] == ("right" if g.pids[j] == q.pids[i] else "wrong")
            kinds.add(card["kind"])
            caption = " ".join(card["text"])
            assert caption.startswith(f"{place}") and f"{ranks.sim[i, place - 1]:.3f}" in caption
            assert ("✓" in caption) == (card["kind"] == "right") and ("✗" in caption) == (card["kind"] == "wrong")
            assert f"cam {g.camids[j]}" in caption
            assert card["kind"] in card["label"] and g.names[j] in card["label"]
    assert kinds == {"right", "wrong"}


def test_each_canvas_has_its_own_cloud_and_each_cloud_is_kept_once(page, dataset):
    for row in page.rows:
        for card in row["cards"]:
            assert page.clouds[card["cloud"]]["name"] == page.clouds[card["crop"]]["name"] == card["title"]
    names = [cloud["name"] for cloud in page.clouds]
    assert len(names) == len(set(names))


def test_clouds_of_one_name_in_two_folders_are_two(tmp_path):
    """As a photo a.jpg among photos that another a.jpg is searched for in."""
    roots = [write_capsules(tmp_path / name, ids=2, size=size) for name, size in (("a", (32, 16)), ("b", (24, 16)))]
    splits = [open_dataset(root).gallery for root in roots]
    query, gallery = (features_of(split, 0.0, 1) for split in splits)
    shown = Page(view(search(query, gallery, k=2), tmp_path / "ranks.html"))
    assert {tuple(cloud["size"]) for cloud in shown.clouds} == {(32, 16), (24, 16)}
    for row in shown.rows:
        sizes = [tuple(shown.clouds[card["cloud"]]["size"]) for card in row["cards"]]
        assert sizes == [(32, 16)] + [(24, 16)] * (len(sizes) - 1)


def test_clouds_come_back_within_half_a_step(page, dataset):
    splits = {"query": dataset.query, "gallery": dataset.gallery}
    for shown in page.clouds:
        split = splits[shown["name"].split("/")[0]]
        row = [record.name for record in split.records].index(shown["name"])
        cloud, record = split.cloud(row), split.records[row]
        xyz, rgb = decode(shown)
        body = cloud.vertex >= 0
        order = np.concatenate([np.flatnonzero(body), np.flatnonzero(~body)])
        assert shown["points"] == len(cloud) and shown["body"] == body.sum()
        assert np.abs(xyz - cloud.xyz[order]).max() <= shown["step"] / 2 * 1.0001
        assert shown["step"] < 1e-4
        np.testing.assert_array_equal(rgb, cloud.rgb[order])
        assert (tuple(shown["size"]), tuple(shown["cam"])) == (record.size, record.cam)


def test_groups_are_the_worst_the_best_and_random_ones(page, ranks):
    ap = evaluate(ranks.query, ranks.gallery).per_query.ap
    shown = {group: [] for group in ("random", "worst", "best")}
    for row in page.rows:
        for group in row["groups"]:
            shown[group].append(ap[ranks.query.names.index(row["cards"][0]["title"])])
    assert len(shown["random"]) >= 4 and len(shown["worst"]) == len(shown["best"]) == 4
    assert sorted(shown["worst"]) == np.sort(ap)[:4].tolist() and sorted(shown["best"]) == np.sort(ap)[-4:].tolist()
    assert page.tabs == ["all", "random", "worst", "best"]


def test_the_header_has_the_scores(page, ranks):
    result, words = evaluate(ranks.query, ranks.gallery), " ".join(page.words)
    assert f"{result.cmc[0]:.1%}" in words and f"{result.mAP:.1%}" in words and f"{result.chance.mAP:.1%}" in words
    assert f"{len(ranks.query)} queries of 12 people" in words


def test_the_page_needs_nothing_from_outside(page):
    for reference in ("http:", "https:", "src=", "href=", "url(", "@import", "fetch(", "XMLHttpRequest", "import("):
        assert reference not in page.text
    assert "Content-Security-Policy" in page.text


def test_the_same_ranks_give_the_same_page_and_no_other_file(ranks, tmp_path):
    first, second = view(ranks, tmp_path / "a.html"), view(ranks, str(tmp_path / "b.html"))
    assert first.read_bytes() == second.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.html", "b.html"]


def test_size_of_a_full_page(tmp_path):
    """12 queries and 72 matches of 128 x 64, all different and noisy: under 8 MB."""
    clouds, records = [], []
    for i in range(84):
        cloud, record = capsule_person(i + 1, 1, i)
        noise = np.random.default_rng(i).integers(0, 256, cloud.rgb.shape).astype(np.uint8)  # does not compress
        clouds.append(PointCloud(cloud.xyz, noise, cloud.vertex))
        records.append(record)
    write_shard(tmp_path / "all-00000.safetensors", clouds, records, config={})
    split = open_dataset(tmp_path).all
    feats = np.random.default_rng(0).standard_normal((84, 4)).astype(np.float32)
    names = [record.name for record in records]
    everything = Features(feats, split.pids, split.camids, names, None, str(tmp_path), "all")
    path = view(search(everything, everything), tmp_path / "page.html")
    assert path.stat().st_size < 8e6


NAMES = ["<script>alert(1)</script>.jpg", "'onmouseover=alert(1) x='.jpg", "</script><b>&amp;.jpg", "<!--clouds-->.jpg"]


def test_names_cannot_break_out(tmp_path):
    clouds, records = [], []
    for i, name in enumerate(NAMES):
        cloud, record = capsule_person(1, i + 1, i, size=(32, 16))
        clouds.append(cloud)
        records.append(Record(name, "all", *list(vars(record).values())[2:]))
    write_shard(tmp_path / "all-00000.safetensors", clouds, records, config={})
    split = open_dataset(tmp_path).all
    everything = Features(np.eye(4, dtype=np.float32), split.pids, split.camids, NAMES, None, str(tmp_path), "all")
    page = Page(view(search(everything, everything), tmp_path / "page.html"))
    assert len(page.scripts) == 2
    assert sorted(cloud["name"] for cloud in page.clouds) == sorted(NAMES)
    assert {row["cards"][0]["title"] for row in page.rows} == set(NAMES)


def test_unknown_people_are_neither_right_nor_wrong(tmp_path):
    cloud, record = capsule_person(-1, -1, 0, size=(32, 16))
    write_shard(tmp_path / "all-00000.safetensors", [cloud], [record], config={})
    unknown, here = np.array([-1]), str(tmp_path)
    one = Features(np.ones((1, 2), np.float32), unknown, unknown, [record.name], None, here, "all")
    page = Page(view(search(one, one), tmp_path / "page.html"))
    assert [card["kind"] for card in page.rows[0]["cards"]] == ["query", "unknown"]
    assert "id unknown" in page.text and "cam unknown" in page.text and "Rank-1" not in page.text and page.tabs == []


def test_errors(ranks, dataset, tmp_path):
    with pytest.raises(ValueError, match="queries must be at least 1, got 0"):
        view(ranks, tmp_path / "page.html", queries=0)
    none = Features(np.zeros((0, 16), np.float32), *np.zeros((2, 0), np.int64), [], None, "", "query")
    with pytest.raises(ValueError, match="ranks must have queries, got none"):
        view(search(none, ranks.gallery), tmp_path / "page.html")
    other = open_dataset(write_capsules(tmp_path / "other", ids=2))
    with pytest.raises(ValueError, match="dataset must hold the cloud of query/00"):
        view(ranks, tmp_path / "page.html", dataset=other)
    with pytest.raises(OSError, match="no-folder"):
        view(ranks, tmp_path / "no-folder" / "page.html")
    gone = Features(
        np.ones((1, 2), np.float32), np.ones(1, np.int64), np.ones(1, np.int64), ["a"], None, "/gone", "all"
    )
    with pytest.raises(FileNotFoundError, match="/gone"):
        view(search(gone, gone), tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
