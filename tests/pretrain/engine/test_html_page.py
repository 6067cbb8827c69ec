"""The page needs nothing outside its file, runs nothing, and shows text of the data as text."""

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from pretrain.engine.html_page import Page, cards, chart, folded, note, number, percent, picture, table, tag

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> $x_{"
PNG = b"\x89PNG\r\n\x1a\n"


class _Reader(HTMLParser):
    """Elements with their attributes, and all text outside style."""

    def __init__(self, content: str):
        super().__init__()
        self.elements, self.text, self._inside = [], [], []
        self.feed(content)

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        self._inside.append(name)

    def handle_endtag(self, name):
        if name in self._inside:
            while self._inside.pop() != name:
                pass

    def handle_data(self, data):
        if "style" not in self._inside:
            self.text.append(data)


def _lines(figure):
    axes = figure.subplots()
    axes.plot([0, 1], [1, 0], label=HOSTILE)
    axes.set_title(HOSTILE)
    axes.legend()


@pytest.fixture(scope="module")
def page() -> str:
    made = Page(HOSTILE, HOSTILE)
    made.add(HOSTILE, table([HOSTILE], [[HOSTILE]], HOSTILE), cards([(HOSTILE, HOSTILE)]), note(HOSTILE), HOSTILE)
    made.add("charts", chart("one", (9, 6), _lines, HOSTILE), chart("two", (9, 6), _lines, HOSTILE))
    made.add("more", folded(HOSTILE, tag("pre", HOSTILE)), picture(PNG, HOSTILE, HOSTILE))
    made.leave_out(HOSTILE, HOSTILE)
    return made.render()


def test_text_of_the_data_never_becomes_markup(page):
    reader = _Reader(page)
    names = {name for name, _ in reader.elements}
    assert not names & {"script", "iframe", "object", "link", "base"}
    assert not any(key.startswith("on") for _, attributes in reader.elements for key in attributes)
    assert [a["src"][:22] for n, a in reader.elements if n == "img"] == ["data:image/png;base64,"]
    # Every place that took the text shows it whole: 2 x title, head, cell, caption, card x 2, note, part, subtitle,
    # heading, summary, pre, picture's caption, left out x 2, and in both charts title and legend.
    assert sum(text.count(HOSTILE) for text in reader.text) == 16 + 4


def test_nothing_outside_the_file_is_referred_to(page):
    for _, attributes in _Reader(page).elements:
        for key in ("src", "href", "xlink:href", "action", "srcset"):
            assert attributes.get(key, "#").startswith(("#", "data:"))
    assert not re.search(r"@import|url\((?!#)", page)
    assert "default-src 'none'" in page


def test_charts_of_one_page_share_no_ids_and_refer_to_their_own(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 10
    for target in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page):
        assert (target[0] or target[1]) in ids
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert ElementTree.fromstring(svg).get("role") == "img"


def test_the_same_content_gives_the_same_file():
    first, again = (chart("one", (9, 6), _lines, "x") for _ in range(2))
    assert first == again


@pytest.mark.parametrize(
    "value, shown", [(0.2523809523809524, "25.2"), (0.0, "0.0"), (None, "n/a"), (float("nan"), "n/a")]
)
def test_percent_keeps_the_value_of_the_file(value, shown):
    reader = _Reader(percent(value))
    assert "".join(reader.text) == shown
    kept = [float(a["value"]) for _, a in reader.elements]
    assert kept == ([value] if shown != "n/a" else [])


def test_whole_numbers_are_shown_whole():
    assert number(1234567) == '<data value="1234567">1,234,567</data>'
    assert number(0.02) == '<data value="0.02">0.02</data>'
