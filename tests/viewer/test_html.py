"""The results page, read back with a parser: what it shows, that it needs nothing else, that nothing breaks out."""

import base64
import io
import json
import os
import re
import zlib
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from reid3d.cloud import PointCloud
from reid3d.data import open_dataset
from reid3d.io import Record, write_shard
from reid3d.preprocess.body import load_body
from reid3d.retrieval import Features, evaluate, search
from reid3d.viewer import view
from reid3d.viewer.html import MATCHES, MISSED, PARTS, _parts, has_matcher, ranked, report
from tests.capsules import capsule_person, write_capsules

VOID = {"meta", "input", "br", "link", "img"}
EMPTY_SVG = {"line", "polyline"}


class Page(HTMLParser):
    """What is in the page, and in the JSON of its script; fails on elements that are not closed in order."""

    def __init__(self, path) -> None:
        super().__init__()
        self.text, self.open, self.scripts, self.kinds = path.read_text(encoding="utf-8"), [], [], []
        self.words: list[str] = []
        self.feed(self.text)
        self.close()
        assert self.open == []
        report = json.loads(self.scripts[0])
        self.rows, self.tabs = report["rows"], report["groups"]
        chunks = [json.loads(text) for text, kind in zip(self.scripts, self.kinds, strict=True) if kind == "items"]
        assert all(len(chunk) == report["chunk"] for chunk in chunks[:-1])
        self.items = [item for chunk in chunks for item in chunk]
        for row in self.rows:
            for card in row["cards"]:
                card |= {"of": self.items[card["item"]], "title": self.items[card["item"]]["name"]}

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")
            self.kinds.append(dict(attributes).get("class"))

    def handle_startendtag(self, tag, attributes):
        assert tag in EMPTY_SVG

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts[-1] += data
        else:
            self.words.append(data)


def decode(item: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The body's points from top to bottom, their parts, where the background is, and the crop."""
    raw, n, (height, width) = zlib.decompress(base64.b64decode(item["data"])), item["body"], item["size"]
    planes = np.frombuffer(raw, np.uint8, 6 * n).reshape(3, 2, n).astype(np.int64)
    moves = planes[:, 0] + 256 * planes[:, 1]
    steps = np.where(moves % 2, -(moves + 1) // 2, moves // 2).cumsum(1) % 65536
    mask = np.unpackbits(np.frombuffer(raw, np.uint8, offset=7 * n))[: height * width].astype(bool)
    crop = np.asarray(Image.open(io.BytesIO(base64.b64decode(item["crop"]))).convert("RGB"))
    part = np.frombuffer(raw, np.uint8, n, 6 * n)
    return item["origin"] + item["step"] * steps.T, part, mask.reshape(height, width), crop


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
        assert query["kind"] == "query" and (row["name"], row["pid"]) == (q.names[i], q.pids[i])
        first = [card for card in matches if "missed" not in card]
        assert [card["title"] for card in first] == [g.names[j] for j in ranks.idx[i, :MATCHES]]
        for place, (card, j) in enumerate(zip(first, ranks.idx[i], strict=False), 1):
            assert card["kind"] == ("right" if g.pids[j] == q.pids[i] else "wrong")
            kinds.add(card["kind"])
            assert card["place"] == place and card["distance"] == pytest.approx(1 - ranks.sim[i, place - 1], abs=1e-4)
            assert card.get("same", False) == (g.camids[j] == q.camids[i])
            assert (card["of"]["pid"], card["of"]["cam"]) == (g.pids[j], g.camids[j])
    assert kinds == {"right", "wrong"}


def test_matches_that_come_later_are_shown_with_their_places(page, ranks):
    """By sorting all of the gallery for each query."""
    q, g, missed = ranks.query, ranks.gallery, 0
    unit = [part.feats / np.linalg.norm(part.feats, axis=1, keepdims=True) for part in (q, g)]
    for row in page.rows:
        i = q.names.index(row["name"])
        counted = np.flatnonzero((g.pids != -1) & ~((g.pids == q.pids[i]) & (g.camids == q.camids[i])))
        order = counted[np.argsort(-(unit[0][i] @ unit[1][counted].T), kind="stable")]
        places = [p for p in range(len(order)) if g.pids[order[p]] == q.pids[i] and p >= MATCHES][:MISSED]
        late = [card for card in row["cards"] if card.get("missed")]
        assert [(card["title"], card["place"]) for card in late] == [(g.names[order[p]], p + 1) for p in places]
        assert all(card["kind"] == "right" for card in late)
        missed += len(late)
    assert missed > 0


def test_k_matches(ranks, tmp_path):
    """With what comes later right behind them; as many as the ranks have where that is less."""
    for k, many in ((2, 2), (8, 8), (30, 10)):
        page = Page(view(ranks, tmp_path / "page.html", k=k))
        for row in page.rows:
            matches = row["cards"][1:]
            assert [card["place"] for card in matches if "missed" not in card] == list(range(1, many + 1))
            assert all(card["place"] > many for card in matches if "missed" in card)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        view(ranks, tmp_path / "page.html", k=0)


def test_each_item_is_kept_once(page):
    names = [item["name"] for item in page.items]
    assert len(names) == len(set(names))


def test_clouds_of_one_name_in_two_folders_are_two(tmp_path):
    """As a photo a.jpg among photos that another a.jpg is searched for in."""
    roots = [write_capsules(tmp_path / name, ids=2, size=size) for name, size in (("a", (32, 16)), ("b", (24, 16)))]
    splits = [open_dataset(root).gallery for root in roots]
    query, gallery = (features_of(split, 0.0, 1) for split in splits)
    shown = Page(view(search(query, gallery, k=2), tmp_path / "ranks.html"))
    assert {tuple(item["size"]) for item in shown.items} == {(32, 16), (24, 16)}
    for row in shown.rows:
        sizes = [tuple(card["of"]["size"]) for card in row["cards"]]
        assert sizes == [(32, 16)] + [(24, 16)] * (len(sizes) - 1)


def test_clouds_come_back_within_half_a_step(page, dataset):
    splits = {"query": dataset.query, "gallery": dataset.gallery}
    for shown in page.items:
        split = splits[shown["name"].split("/")[0]]
        row = [record.name for record in split.records].index(shown["name"])
        cloud, record = split.cloud(row), split.records[row]
        xyz, part, mask, crop = decode(shown)
        body = cloud.vertex >= 0
        assert shown["body"] == body.sum() and tuple(shown["size"]) == record.size == crop.shape[:2]
        assert shown["step"] == 0.002 and (part == 255).all()  # the capsules are no embedded body
        mine = cloud.xyz[body].astype(np.float64)
        assert np.abs(np.sort(xyz, 0) - np.sort(mine, 0)).max() <= shown["step"] / 2 * 1.0001
        (s, tx, ty), (height, width) = record.cam, record.size
        pixel = np.stack(
            (
                ((s * (cloud.xyz[:, 0] + tx)) * height / width + 1) * width / 2,
                (s * (cloud.xyz[:, 1] + ty) + 1) * height / 2,
            ),
            1,
        )
        place = np.floor(pixel + 1e-4).astype(int)
        inside = ((place >= 0) & (place < [width, height])).all(1)
        expected = np.zeros((height, width), bool)
        expected[tuple(place[~body & inside].T[::-1])] = True
        assert np.array_equal(mask, expected)
        assert shown["depth"] == pytest.approx(cloud.xyz[~body, 2].mean(), abs=1e-5)
        near = crop[tuple(place[inside].T[::-1])].astype(int) - cloud.rgb[inside]
        assert np.abs(near).mean() < 20  # WebP of 512 pixels of noise


def test_parts_of_an_embedded_body():
    """The crown is of the head, the toes are of the feet, left and right hand of the arms."""
    body = load_body("full")
    verts = body.v_template.numpy()
    found = _parts(np.arange(len(verts), dtype=np.int32), "embedded-full")
    names = list(PARTS)
    top, low = verts[:, 1].argmax(), verts[:, 1].argmin()
    if names[found[low]] == "head":
        top, low = low, top
    assert (names[found[top]], names[found[low]]) == ("head", "feet")
    assert {names[found[verts[:, 0].argmax()]], names[found[verts[:, 0].argmin()]]} == {"arms"}
    assert set(found.tolist()) == set(range(len(PARTS)))
    assert (_parts(np.array([-1, len(verts), 0]), "embedded-full")[:2] == 255).all()
    assert (_parts(np.arange(5), "mine.pkl") == 255).all()


def test_groups_are_the_worst_the_best_and_random_ones(page, ranks):
    ap = evaluate(ranks.query, ranks.gallery).per_query.ap
    shown = {group: [] for group in ("random", "worst", "best")}
    for row in page.rows:
        for group in row["groups"]:
            shown[group].append(ap[ranks.query.names.index(row["name"])])
    assert len(shown["random"]) >= 4 and len(shown["worst"]) == len(shown["best"]) == 4
    assert sorted(shown["worst"]) == np.sort(ap)[:4].tolist() and sorted(shown["best"]) == np.sort(ap)[-4:].tolist()
    assert page.tabs == ["random", "worst", "best"]


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
    """12 queries and 72 matches of 128 x 64, all different and noisy: 5,000 such are 30 MB."""
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
    assert path.stat().st_size < 84 * 6e3 + 5e4


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
    assert len(page.scripts) == 3
    assert sorted(item["name"] for item in page.items) == sorted(NAMES)
    assert {row["name"] for row in page.rows} == set(NAMES)


def test_unknown_people_are_neither_right_nor_wrong(tmp_path):
    cloud, record = capsule_person(-1, -1, 0, size=(32, 16))
    write_shard(tmp_path / "all-00000.safetensors", [cloud], [record], config={})
    unknown, here = np.array([-1]), str(tmp_path)
    one = Features(np.ones((1, 2), np.float32), unknown, unknown, [record.name], None, here, "all")
    page = Page(view(search(one, one), tmp_path / "page.html"))
    assert [card["kind"] for card in page.rows[0]["cards"]] == ["query", "unknown"]
    assert page.items[0]["pid"] == page.items[0]["cam"] == -1
    assert "Rank-1" not in " ".join(page.words) and page.tabs == [] and "<svg" not in page.text


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


def test_a_folder_holds_the_same_in_pieces(ranks, tmp_path):
    one, folder = Page(view(ranks, tmp_path / "one.html")), tmp_path / "pages"
    folder.mkdir()
    (folder / "items-999.js").write_text("of an older page")
    assert view(ranks, folder) == folder / "index.html"
    pieces = sorted(path.name for path in folder.glob("items-*.js"))
    assert pieces == [f"items-{i:03d}.js" for i in range(len(pieces))] and len(pieces) > 1
    found = []
    for i, name in enumerate(pieces):
        text = (folder / name).read_text()
        assert text.startswith(f"chunk({i},") and text.endswith(")\n")
        found += json.loads(text[len(f"chunk({i},") : -2])
    assert found == one.items
    index = (folder / "index.html").read_text()
    assert "class='items'" not in index and len(index) < len(one.text) / 2
    assert "script-src 'unsafe-inline' 'self' file:" in index


def test_curves_by_hand(tmp_path):
    """One query whose matches come first and third: precision 1 up to half the recall, 2/3 beyond."""
    split = open_dataset(write_capsules(tmp_path / "shards", ids=2, cams=2, images=3)).gallery
    pids, camids = np.array([1, 2, 1]), np.array([2, 2, 2])
    names = [split.records[i].name for i in range(4)]
    gallery = Features(np.eye(3, dtype=np.float32), pids, camids, names[:3], None, str(split.root), "gallery")
    query = replace(gallery.subset([0]), pids=np.array([1]), camids=np.array([1]), names=names[3:])
    scores = np.array([[0.9, 0.5, 0.1]], np.float32)
    found = ranked(query, gallery, scores)
    assert found.idx.tolist() == [[0, 1, 2, -1, -1, -1]] and found.sim[0, :3].tolist() == scores[0].tolist()
    text = view(found, tmp_path / "page.html", scores=scores).read_text()
    assert "distance, 1 - cosine" not in text and text.count("<svg") == 3
    curve = re.findall(r"points='([^']*)'", text)[1].split()
    heights = [float(point.split(",")[1]) for point in curve]
    assert heights[:26] == [10.0] * 26 and heights[26:] == [pytest.approx(10 + 170 / 3, abs=0.1)] * 25
    same, different = (re.findall(r"points='([^']*)'", text)[i].split() for i in (2, 3))
    peaks = [[float(p.split(",")[0]) for p in line if float(p.split(",")[1]) < 170] for line in (same, different)]
    assert len(peaks[0]) == 2 and len(peaks[1]) == 1 and peaks[0][0] < peaks[1][0] < peaks[0][1]


def test_the_table_of_cameras(ranks, tmp_path):
    text = view(ranks, tmp_path / "page.html").read_text()
    cells = re.findall(r"title='(\d+) queries'>(\d+) <small>(\d+) · (\d+)<", text)
    q, g = ranks.query, ranks.gallery
    for found, (start, end) in zip(cells, [(1, 2), (2, 1)], strict=True):
        one, other = q.subset(np.flatnonzero(q.camids == start)), g.subset(np.flatnonzero(g.camids == end))
        result = evaluate(one, other, "mean")
        assert found == (str(len(one)), f"{100 * result.cmc[0]:.0f}", f"{100 * result.mAP:.0f}", str(len(one)))


def test_crops_of_2d_methods(tmp_path):
    rng = np.random.default_rng(0)
    for folder in ("query", "bounding_box_test"):
        (tmp_path / "world" / folder).mkdir(parents=True)
        for pid in (1, 2):
            pixels = rng.integers(0, 255, (400, 200, 3)).astype(np.uint8)
            camid = 1 + (folder == "query")
            Image.fromarray(pixels).save(tmp_path / "world" / folder / f"{pid:04d}_c{camid}s1_000001_00.jpg")
    crops = open_dataset(tmp_path / "world")
    query, gallery = (features_of(split, 0.1, 1) for split in (crops.query, crops.gallery))
    page = Page(view(search(query, gallery), tmp_path / "page.html"))
    assert len(page.items) == 4 and not any("data" in item for item in page.items)
    for item in page.items:
        picture = Image.open(io.BytesIO(base64.b64decode(item["crop"])))
        assert picture.format == "WEBP" and picture.size == (80, 160)


@pytest.mark.parametrize(("model", "said"), [("qaconv50", True), ("ognet_small", False)])
def test_cosines_in_place_of_a_matcher_are_said(ranks, tmp_path, model, said):
    (tmp_path / "config.yaml").write_text(f"data: d\nout: o\nmodel: {{name: {model}}}\n")
    assert has_matcher(tmp_path) == said
    words = " ".join(Page(view(ranks, tmp_path / "page.html", run=tmp_path)).words)
    assert ("ranks are by cosines of its features, not by its own matcher" in words) == said
    scores = np.random.default_rng(0).standard_normal((len(ranks.query), len(ranks.gallery))).astype(np.float32)
    own = ranked(ranks.query, ranks.gallery, scores)
    words = " ".join(Page(view(own, tmp_path / "page.html", run=tmp_path, scores=scores)).words)
    assert "not by its own matcher" not in words


def test_pages_of_runs_that_did_not_end(tmp_path):
    run = tmp_path / "run & <b>"
    run.mkdir()
    lines = [{"epoch": i, "loss": 5.0 - i, "accuracy": 0.1 * i, "lr": 1e-3} for i in (1, 2, 3)]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"epoch": 4, "lo'
    (run / "metrics.jsonl").write_text(text)
    page = Page(report(run, tmp_path / "failed.html", "It has no features <yet>."))
    words = " ".join(page.words)
    assert "It has no features <yet>." in words and str(run) in words and page.rows == [] == page.items
    assert page.text.count("<svg") == 3 and all(name in words for name in ("loss", "accuracy", "lr"))
    (run / "metrics.jsonl").unlink()
    empty = Page(report(run, tmp_path / "empty.html", "Nothing here."))
    assert "Nothing here." in " ".join(empty.words) and "<svg" not in empty.text
