"""The page in a browser: headless Chromium, asked over the DevTools protocol. No time is asserted."""

import shutil
from itertools import count

import numpy as np
import pytest
from PIL import Image

from reid3d.cloud import PointCloud
from reid3d.data import open_clouds
from reid3d.io import Record, write_shard
from reid3d.retrieval import Features, search
from reid3d.viewer import view
from reid3d.viewer.html import report
from tests.capsules import capsule_person
from tests.conftest import needs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]
HOSTILE = "<script>alert(1)</script> 'a\" & é行人 ../b.jpg"


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        needs("playwright is not installed: pip install playwright")
    needs(None if CHROMIUM else "Chromium is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser):
    """Opens a page, and fails when it writes to the console, throws, or asks for anything but itself and its pieces."""
    said, contexts = [], []

    def go(path, **how):
        context = browser.new_context(viewport={"width": 1280, "height": 900}, **how)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        own = path.parent.as_uri()
        page.on("request", lambda request: request.url.startswith(own) or said.append(request.url))
        page.goto(path.as_uri())
        return page

    yield go
    for context in contexts:
        context.close()
    assert said == []


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """500 queries among 1,500 clouds of 128 x 64, by three cameras."""
    folder = tmp_path_factory.mktemp("clouds")
    people, number = [capsule_person(pid, 1, 0, size=(128, 64)) for pid in range(1, 9)], count()
    for split, many in (("query", 500), ("gallery", 1500)):
        clouds, records = [], []
        for i in range(many):
            cloud, record = people[i % len(people)]
            shift = np.random.default_rng(next(number)).normal(0, 6, (len(cloud), 3))
            rgb = np.clip(cloud.rgb + shift, 0, 255).astype(np.uint8)
            clouds.append(PointCloud(cloud.xyz, rgb, cloud.vertex))
            name = HOSTILE if split == "query" and i == 7 else f"{split}/{i:05d}.jpg"
            rest = record.size, record.cam
            records.append(Record(name, split, 1 + i % 250, 1 + (i // 250) % 3, 0, *rest, aspect=record.aspect))
        write_shard(folder / f"{split}-00000.safetensors", clouds, records, config={})
    directions = np.random.default_rng(0).standard_normal((251, 16))
    sides = []
    for seed, split in enumerate((open_clouds(folder).query, open_clouds(folder).gallery)):
        noise = np.random.default_rng(seed + 1).standard_normal((len(split), 16))
        feats = (directions[split.pids] + 1.3 * noise).astype(np.float32)
        names = [record.name for record in split.records]
        sides.append(Features(feats, split.pids, split.camids, names, None, str(folder), split.name))
    return search(*sides, k=10, cross_camera=True)


@pytest.fixture(scope="module")
def page_file(ranks, tmp_path_factory):
    return view(ranks, tmp_path_factory.mktemp("page") / "ranks.html", queries=500)


def pixels(page, selector=".cloud >> nth=0"):
    """What a canvas shows, (H, W, 4)."""
    shape = page.locator(selector).evaluate(
        "c => { const copy = Object.assign(document.createElement('canvas'), { width: c.width, height: c.height });"
        " const paper = copy.getContext('2d', { willReadFrequently: true }); paper.drawImage(c, 0, 0);"
        " return [c.height, c.width, ...paper.getImageData(0, 0, c.width, c.height).data]; }"
    )
    return np.array(shape[2:], np.uint8).reshape(shape[0], shape[1], 4)


def shown(page, selector=".cloud >> nth=0"):
    """The same, when it is drawn."""
    wait(
        page,
        "() => { const c = document.querySelector('.cloud');"
        " return c && views.get(c)?.cloud && c.width === Math.round(c.clientWidth * devicePixelRatio); }",
    )
    drawn(page)
    return pixels(page, selector)


def wait(page, expression):
    """Until it holds. Not by wait_for_function, which asks again by eval, and that the page's policy forbids."""
    for _ in range(600):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"it never held: {expression}")


def drawn(page):
    """When all that was asked for is drawn."""
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def test_a_page_of_500_queries(page_file, opened, tmp_path, capsys):
    assert page_file.stat().st_size < 30e6
    page = opened(page_file)
    first = shown(page)
    paints = page.evaluate("performance.getEntriesByType('paint').map(e => e.startTime)")
    with capsys.disabled():
        print(f" first paint {paints[0]:.0f} ms, {page_file.stat().st_size / 1e6:.1f} MB ", end="")
    assert page.evaluate("!!gl")  # drawn by WebGL
    assert (first[..., 3] > 0).mean() > 0.1 and len(np.unique(first.reshape(-1, 4), axis=0)) > 50
    assert page.evaluate("document.querySelectorAll('.row').length") < 60  # the others come when they are scrolled to
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    wait(page, "() => document.querySelectorAll('.row').length > 8")
    page.wait_for_timeout(500)
    rows = page.evaluate("document.querySelectorAll('.row').length")
    assert 16 <= rows < 500
    assert page.evaluate("views.size") < 250  # and give their clouds back
    page.screenshot(path=tmp_path / "page.png")
    assert np.asarray(Image.open(tmp_path / "page.png")).std() > 10


def test_a_cloud_is_turned_by_mouse_and_keys(page_file, opened):
    page = opened(page_file)
    before = shown(page)
    box = page.locator(".cloud").first.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 60, middle[1] + 10, steps=4)
    page.mouse.up()
    drawn(page)
    turned = pixels(page)
    assert (turned != before).any(2).mean() > 0.02
    other = pixels(page, ".cloud >> nth=1")
    page.keyboard.press("ArrowLeft")
    drawn(page)
    assert (pixels(page) != turned).any(2).mean() > 0.01
    assert (pixels(page, ".cloud >> nth=1") != other).any()  # the row turns together
    page.keyboard.press("Home")
    drawn(page)
    assert np.array_equal(pixels(page), before)
    page.keyboard.press("+")
    drawn(page)
    assert (pixels(page)[..., 3] > 0).sum() > (before[..., 3] > 0).sum()


def test_controls(page_file, opened):
    page = opened(page_file)
    before = shown(page)
    page.locator("#background").uncheck()
    drawn(page)
    bare = pixels(page)
    assert (bare[..., 3] > 0).sum() < 0.8 * (before[..., 3] > 0).sum()
    page.locator("#colours").select_option("parts")
    drawn(page)
    assert len(np.unique(pixels(page).reshape(-1, 4), axis=0)) < 10
    page.locator("#points").fill("2.5")
    drawn(page)
    assert (pixels(page)[..., 3] > 0).sum() > (bare[..., 3] > 0).sum()
    page.locator("[data-tab=worst]").click()
    names = page.evaluate("[...document.querySelectorAll('.row h2')].map(h => h.textContent)")
    expected = page.evaluate("report.rows.filter(r => r.groups.includes('worst')).slice(0, 3).map(r => r.name)")
    assert [name.startswith(of) for name, of in zip(names, expected, strict=False)] == [True] * 3
    page.locator("[data-tab=all]").click()
    page.locator("#pid").fill("17")
    assert page.evaluate("document.querySelectorAll('.row').length") == 2
    page.locator("#pid").fill("99999")
    assert "No query of id 99999 is shown here." in page.locator("#rows").inner_text()
    page.locator("#pid").fill("")
    page.keyboard.press("Tab")
    page.keyboard.press("n")
    wait(page, "() => scrollY > 100")


def test_a_name_appears_as_text(page_file, opened):
    page = opened(page_file)
    shown(page)
    page.locator("#pid").fill("8")
    wait(page, "document.querySelectorAll('.row').length === 2 && document.querySelector('.row .card').title")
    row = page.locator(".row", has_text="alert(1)")
    row.locator(".cloud").first.wait_for()
    assert row.locator("h2").inner_text().startswith(HOSTILE)
    assert row.locator(".card").first.get_attribute("title") == HOSTILE
    assert HOSTILE in row.locator(".cloud").first.get_attribute("aria-label")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen(page_file, opened, scheme):
    page = opened(page_file, color_scheme=scheme)
    page.set_viewport_size({"width": 375, "height": 700})
    shown(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        ".map(c => c.match(/\\d+/g).slice(0, 3).map(Number).reduce((a, b) => a + b))"
    )
    assert (ink > paper) == (scheme == "dark")


def test_a_folder_loads_what_is_scrolled_to(ranks, opened, tmp_path):
    path = view(ranks, tmp_path / "pages", queries=500)
    asked = []
    page = opened(path)
    page.on("request", lambda request: asked.append(request.url))
    assert (shown(page)[..., 3] > 0).mean() > 0.1
    some = page.evaluate("document.querySelectorAll('script[src]').length")
    assert 0 < some < len(list(path.parent.glob("items-*.js"))) / 2
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    wait(page, f"() => document.querySelectorAll('script[src]').length > {some}")
    assert asked


def test_two_fingers_zoom_and_one_turns(page_file, opened):
    page = opened(page_file, has_touch=True)
    page.set_viewport_size({"width": 375, "height": 900})
    before = shown(page)
    page.locator(".cloud").first.scroll_into_view_if_needed()
    box = page.locator(".cloud").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    touch = page.context.new_cdp_session(page)

    def fingers(kind, *at):
        points = [{"x": across, "y": y, "id": i} for i, across in enumerate(at)]
        touch.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points})

    look = "(({ yaw, zoom }) => [yaw, zoom])(views.get(document.querySelector('.cloud')))"
    yaw, zoom = page.evaluate(look)
    fingers("Start", x - 20, x + 20)
    fingers("Move", x - 40, x + 40)
    fingers("End")
    assert page.evaluate(look) == [yaw, pytest.approx(2 * zoom)]
    drawn(page)
    assert (pixels(page)[..., 3] > 0).sum() > (before[..., 3] > 0).sum()
    fingers("Start", x)
    fingers("Move", x + 30)
    fingers("End")
    turned, same = page.evaluate(look)
    assert turned == pytest.approx(yaw - 0.3, abs=0.16) and turned < yaw and same == pytest.approx(2 * zoom)


def test_cards_that_come_and_go_while_they_load(page_file, opened):
    """Shown, hidden and shown again before the first has come: one cloud. Hidden before it has come: none."""
    page = opened(page_file)
    shown(page)
    counts = page.evaluate(
        """async () => {
          const pause = time => new Promise(done => setTimeout(done, time));
          const [first, second, third] = document.querySelector('.row').cards;
          for (const card of [first, second, third]) card.hide();
          first.show(); first.hide(); first.show();
          second.show(); second.hide();
          while (!first.querySelector('.cloud')) await pause(20);
          third.show();  // after which all that was asked for before has come
          while (!third.querySelector('.cloud')) await pause(20);
          return [first, second, third].map(card => card.querySelectorAll('.cloud').length);
        }"""
    )
    assert counts == [1, 0, 1]


def test_a_row_turns_while_one_of_its_clouds_is_still_coming(page_file, opened):
    page = opened(page_file)
    shown(page)
    yaws = page.evaluate(
        """async () => {
          const pause = time => new Promise(done => setTimeout(done, time));
          const [first, second] = document.querySelector('.row').cards, read = Response.prototype.arrayBuffer;
          let go; const wait = new Promise(done => go = done);
          Response.prototype.arrayBuffer = async function () { await wait; return read.call(this); };
          second.hide(); second.show();
          await pause(100);
          const cloud = first.querySelector('.cloud'), before = views.get(cloud).yaw;
          cloud.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowLeft' }));
          go(); Response.prototype.arrayBuffer = read;
          while (!second.querySelector('.cloud')) await pause(20);
          return [before, views.get(cloud).yaw];
        }"""
    )
    assert yaws[1] == pytest.approx(yaws[0] + 0.1)


def test_a_piece_of_a_folder_that_is_gone_is_said_on_its_cards(ranks, browser, tmp_path):
    path = view(ranks, tmp_path / "pages", queries=500)
    (path.parent / "items-000.js").unlink()
    page = browser.new_page()
    thrown = []
    page.on("pageerror", lambda error: thrown.append(str(error)))
    page.goto(path.as_uri())
    page.locator(".lost").first.wait_for()
    assert "items-000.js is not there" in page.locator(".lost").first.inner_text()
    page.close()
    assert thrown == []


def test_without_webgl_points_are_drawn_all_the_same(page_file, browser, tmp_path):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.add_init_script(
        "const get = HTMLCanvasElement.prototype.getContext;"
        "HTMLCanvasElement.prototype.getContext = function (kind, ...how) {"
        " return kind === 'webgl' ? null : get.call(this, kind, ...how); }"
    )
    page = context.new_page()
    page.goto(page_file.as_uri())
    picture = shown(page)
    assert page.evaluate("gl === null") and (picture[..., 3] > 0).mean() > 0.1
    context.close()


def test_a_run_without_features_has_a_page(opened, tmp_path):
    page = opened(report(tmp_path / HOSTILE.replace("/", "_"), tmp_path / "page.html", "It has no <features>."))
    assert page.locator(".notice").inner_text() == "It has no <features>."
    assert not page.locator("nav").is_visible() and page.locator(".row").count() == 0
