"""A page that is one HTML file: no script, no address outside it, charts as inline SVG, pictures as PNG in base64.

Text is escaped unless it is `Html`, so names and captions of data sets cannot become markup. A number is written as
`<data value="0.2523809523809524">25.2</data>`: the file's value in full, what is read beside it. What a run's files
mean is not known here: see `html_report` and `ovd.report`.
"""

import base64
import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

from pretrain.config import ConfigError

# Nothing may be loaded and nothing may run, whatever should slip through the escaping.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2330; background: #fff; max-width: 1080px; margin: 2em auto;
  padding: 0 1.2em; overflow-wrap: break-word; }
h1 { font-size: 1.6em; margin-bottom: 0; } h2 { font-size: 1.2em; margin-top: 2.2em; border-bottom: 1px solid #d8dde6; }
.sub, figcaption, caption, .note { color: #566072; font-size: .9em; } .note { max-width: 75ch; }
.cards { display: flex; flex-wrap: wrap; gap: .7em; margin: 1em 0; }
.card { border: 1px solid #d8dde6; border-radius: 8px; padding: .5em .9em; }
.card b { display: block; font-size: 1.4em; }
table { border-collapse: collapse; margin: .8em 0; font-variant-numeric: tabular-nums; display: block;
  overflow-x: auto; }
caption { text-align: left; } td, th { padding: .15em .8em .15em 0; text-align: right; vertical-align: top; }
td:first-child, th:first-child, td.text, th.text { text-align: left; } thead th { border-bottom: 1px solid #aab3c2; }
tbody tr:nth-child(even) { background: #f5f7fa; }
figure { margin: 1em 0; } figure svg { max-width: 100%; height: auto; }
.gallery { display: flex; flex-wrap: wrap; gap: .9em; } .gallery figure { width: 168px; margin: 0; }
.gallery img { max-width: 168px; max-height: 168px; display: block; }
pre { background: #f5f7fa; padding: .8em; overflow-x: auto; font-size: .85em; } summary { cursor: pointer; }
.good { color: #14713b; } .bad { color: #b3261e; }
"""


class Html(str):
    """Markup made by this file; every other string is text and gets escaped."""


def to_html(value: Any) -> Html:
    """`Html` as it is, None as "n/a", anything else as escaped text."""
    if isinstance(value, Html):
        return value
    return Html(html.escape("n/a" if value is None else str(value)))


def tag(name: str, *parts: Any, **attributes: Any) -> Html:
    """An element around its parts; `class_` gives the attribute `class`."""
    given = "".join(f' {key.rstrip("_")}="{html.escape(str(value))}"' for key, value in attributes.items())
    return Html(f"<{name}{given}>{''.join(to_html(part) for part in parts)}</{name}>")


def number(value: float | int | None, shown: str = ",.4g") -> Html:
    """A number as the file has it, shown by a format specification; "n/a" for None and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return to_html(None)
    return tag("data", format(value, ",d" if isinstance(value, int) and shown == ",.4g" else shown), value=repr(value))


def percent(value: float | None, decimals: int = 1) -> Html:
    """A fraction in 0-1 shown in percent, without the sign; "n/a" for None and NaN."""
    if value is None or math.isnan(value):
        return to_html(None)
    return tag("data", f"{100 * value:.{decimals}f}", value=repr(value))


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], caption: Any = "", text_columns: int = 1) -> Html:
    """A table; the first `text_columns` columns stand to the left, numbers to the right; `head` may be empty."""

    def line(kind: str, cells: Sequence[Any]) -> Html:
        return tag(
            "tr", *(tag(kind, c, **({"class_": "text"} if i < text_columns else {})) for i, c in enumerate(cells))
        )

    body = tag("tbody", *(line("td", row) for row in rows))
    return tag(
        "table", tag("caption", caption) if caption else "", tag("thead", line("th", head)) if head else "", body
    )


def cards(values: Iterable[tuple[Any, Any]]) -> Html:
    """The few numbers to see first: (value, what it is)."""
    return tag("div", *(tag("div", tag("b", value), name, class_="card") for value, name in values), class_="cards")


def note(*parts: Any) -> Html:
    """A paragraph of explanation."""
    return tag("p", *parts, class_="note")


def folded(summary: Any, *parts: Any) -> Html:
    """Parts that open on a click."""
    return tag("details", tag("summary", summary), *parts)


def picture(png: bytes, caption: Any, alt: str) -> Html:
    """A PNG with its caption."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return tag("figure", Html(f'<img src="{source}" alt="{html.escape(alt)}">'), tag("figcaption", caption))


def chart(name: str, size: tuple[float, float], draw: Any, alt: str) -> Html:
    """An inline SVG that `draw(figure)` draws with matplotlib; its labels stay text.

    Args:
        name: letters, digits and -, another one for each chart of a page: it keeps their inner names apart.
        size: width and height in inches; the browser shrinks it where there is less room.
        draw: gets an empty `matplotlib.figure.Figure`.
        alt: what it shows, in a sentence.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure  # without pyplot: no display, nothing global
    except ImportError as error:
        raise ConfigError("the charts need matplotlib, which is not installed: pip install matplotlib") from error
    # A "$" in a name of the data is no formula; a fixed salt makes the same file of the same run.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        content = io.StringIO()
        figure.savefig(content, format="svg", metadata={"Date": None})
    return tag("figure", _inline_svg(content.getvalue(), name, alt))


def _inline_svg(text: str, name: str, alt: str) -> Html:
    """Only the drawing, without metadata and page-wide style, its ids unlike those of other charts."""
    space = "{http://www.w3.org/2000/svg}"
    ElementTree.register_namespace("", space[1:-1])
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(text)
    for parent in root.iter():
        for child in [c for c in parent if c.tag in (f"{space}metadata", f"{space}style")]:
            parent.remove(child)
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key.endswith("href") and value.startswith("#"):
                element.set(key, f"#{name}-{value[1:]}")
            else:
                element.set(key, re.sub(r"url\(#", f"url(#{name}-", value))
    root.set("role", "img")
    root.set("aria-label", alt)
    return Html(ElementTree.tostring(root, encoding="unicode"))


@dataclass
class Page:
    """A report that is being put together.

    Attributes:
        title: of the page.
        subtitle: one line below it.
        sections: (title, content).
        missing: sentences on what was left out and why.
    """

    title: str
    subtitle: str = ""
    sections: list[tuple[str, Html]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def add(self, title: str, *parts: Any) -> None:
        """Append a section."""
        self.sections.append((title, Html("".join(to_html(part) for part in parts))))

    def leave_out(self, part: str, reason: str) -> None:
        """Say that a part is not there, and why."""
        self.missing.append(f"{part}: {reason}")

    def render(self) -> str:
        """The whole file."""
        body = [tag("h1", self.title), tag("p", self.subtitle, class_="sub")]
        for title, content in self.sections:
            body.append(tag("section", *([tag("h2", title)] if title else []), content))
        if self.missing:
            body.append(tag("section", tag("h2", "Left out"), tag("ul", *(tag("li", m) for m in self.missing))))
        head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
        head += f"<title>{to_html(self.title)}</title><style>{_STYLE}</style>"
        return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"
