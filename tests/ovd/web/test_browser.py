"""The page in a real headless Chromium: it loads, a picture and words go in, the right boxes come out.

The README's picture of the page is taken here: set OVD_WEB_SCREENSHOT=assets/web_page.png.
"""

import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api", reason="drives the browser: pip install playwright")
ROOT = Path(__file__).resolve().parents[3]
SCENE = ROOT / "ovd/web/examples/coat_bell.jpg"
# x1, y1, x2, y2 in the scene's annotation.
BELL, COAT = (31, 126, 106, 207), (172, 156, 315, 288)


def _chromium() -> Path:
    """The browser of requirements/install_chromium.py; the test is skipped only where there is none for the machine."""
    spec = importlib.util.spec_from_file_location("install_chromium", ROOT / "requirements/install_chromium.py")
    install = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(install)
    if not install.is_supported():
        pytest.skip("headless Chromium is to be had for Linux on x86-64 only")
    if not install.PROGRAM.exists():
        message = "headless Chromium is not installed: python requirements/install_chromium.py (make test does it)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return install.PROGRAM


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    program = _chromium()
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--disable-gpu"])
        yield started
        started.close()


@pytest.fixture
def page(browser: "sync_api.Browser", page_address: str) -> Iterator["sync_api.Page"]:
    """The page, opened; whatever it asked of another machine or complained of fails the test."""
    opened = browser.new_page(viewport={"width": 1280, "height": 1080})
    opened.set_default_timeout(60_000)
    asked, errors = [], []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(page_address)
    opened.wait_for_selector("#find")
    yield opened
    opened.close()
    elsewhere = [url for url in asked if not url.startswith((page_address, "data:", "blob:"))]
    assert not elsewhere and not errors


def _ask(page: "sync_api.Page", words: str) -> None:
    """Type the words and press the button."""
    page.fill("#words textarea", words)
    with page.expect_response(lambda response: "/queue/join" in response.url):
        page.click("#find")


def _find(page: "sync_api.Page", words: str) -> dict[str, list[float]]:
    """Ask; score and box (x1, y1, x2, y2) of the best detection of each word, as the table shows them."""
    _ask(page, words)
    page.wait_for_selector("#summary :text-matches('Found:|Nothing found')")
    counts = [int(number) for number in re.findall(r"\((\d+)\)", page.inner_text("#summary"))]
    # The table arrives with the summary and is laid out a moment later.
    page.wait_for_selector(f"#table [role=grid][aria-rowcount='{1 + sum(counts)}']")
    best: dict[str, list[float]] = {}
    if counts:
        page.wait_for_selector("#table [data-index='0'] [role=gridcell]")
    for row in page.query_selector_all("#table [data-index]"):
        word, *numbers = [cell.inner_text().strip() for cell in row.query_selector_all("[role=gridcell]")]
        best.setdefault(word, [float(number) for number in numbers])
    return best


def _overlap(a: list[float], b: tuple[float, ...]) -> float:
    """Intersection over union of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(0, width) * max(0, height)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def test_a_picture_and_words_go_in_and_boxes_of_the_right_words_come_out(page, tmp_path: Path) -> None:
    page.set_input_files("#picture input[type=file]", SCENE)
    page.wait_for_selector("#picture img")
    found = _find(page, "bell, coat\nshark")
    assert _overlap(found["bell"][1:], BELL) > 0.5 and _overlap(found["coat"][1:], COAT) > 0.5
    assert found["bell"][0] >= 0.3
    drawn = tmp_path / "drawn.png"
    drawn.write_bytes(page.request.get(page.get_attribute("#drawn img", "src")).body())
    before = np.asarray(Image.open(SCENE).convert("RGB").resize(Image.open(drawn).size)).astype(int)
    changed = np.abs(np.asarray(Image.open(drawn).convert("RGB")) - before).max(axis=-1) > 60
    assert changed.any() and changed.mean() < 0.5
    screenshot = tmp_path / "page.png"
    page.screenshot(path=screenshot, animations="disabled")
    assert Image.open(screenshot).size == (1280, 1080)
    if target := os.environ.get("OVD_WEB_SCREENSHOT"):
        shutil.copyfile(screenshot, target)


def test_an_example_fills_the_fields_and_other_words_find_other_things(page) -> None:
    page.click("#examples tbody tr >> nth=0")
    page.wait_for_selector("#picture img")
    assert page.input_value("#words textarea") == "coat, bell, shark"
    found = _find(page, "coat")
    assert set(found) == {"coat"} and _overlap(found["coat"][1:], COAT) > 0.5


def test_a_bad_file_gets_one_clear_error(page, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"this is not a picture")
    page.set_input_files("#picture input[type=file]", bad)
    page.wait_for_selector("#picture img", state="attached")
    page.fill("#words textarea", "bell")
    page.click("#find")
    page.wait_for_selector("text=This file cannot be read as a picture")
    assert page.locator("text=This file cannot be read as a picture").count() == 1


def test_words_are_text_and_never_markup(page) -> None:
    page.set_input_files("#picture input[type=file]", SCENE)
    page.wait_for_selector("#picture img")
    page.evaluate("() => { document.querySelector('#threshold input[type=number]').focus() }")
    page.fill("#threshold input[type=number]", "0")
    page.keyboard.press("Tab")
    _ask(page, "<img src=x onerror=document.title='owned'>, [link](javascript:alert(1))")
    page.wait_for_selector("#table [role=gridcell] :text('<img src=x')")
    assert page.title() == "Open-vocabulary detection"
    assert page.query_selector("img[src=x]") is None and page.query_selector("a[href^=javascript]") is None
