"""Concepts and icons, matched on hand-made archives."""

import json

import numpy as np
import pytest
from PIL import Image

from pretrain.data.emoji import (
    VENDORS,
    Concept,
    IconSet,
    normalise_hexcode,
    normalise_name,
    pad_to_square,
    read_concepts,
    render_svg,
)


class MemoryArchive:
    """What the functions need of an archive, from a dictionary of path to content."""

    def __init__(self, members: dict):
        self._members = members

    def names(self, suffix=""):
        return sorted(name for name in self._members if name.endswith(suffix))

    def json(self, name):
        return json.loads(json.dumps(self._members[name]))


def concept(code: str, *aliases: str) -> Concept:
    return Concept(code, aliases[0], (), "objects", "tool", frozenset(normalise_name(a) for a in aliases))


def icon_set(names, characters=None) -> IconSet:
    icons = {name: {"body": f'<path id="{name}"/>'} for name in names}
    return IconSet(MemoryArchive({"icons.json": {"icons": icons, "height": 32}, "chars.json": characters or {}}))


@pytest.mark.parametrize(
    ("name", "expected"), [("Alarm-Clock", "alarmclock"), ("t_shirt 2", "tshirt2"), ("piñata", "piata"), ("–", "")]
)
def test_normalise_name(name, expected):
    assert normalise_name(name) == expected


@pytest.mark.parametrize(
    ("code", "expected"), [("2708-fe0f", "2708"), ("1f3f4-200d-2620-fe0f", "1F3F4-200D-2620"), ("1F34E", "1F34E")]
)
def test_normalise_hexcode(code, expected):
    assert normalise_hexcode(code) == expected


def test_concepts_are_read_from_their_groups_with_every_name():
    archive = MemoryArchive(
        {
            "meta/groups.json": {
                "groups": {"0": "smileys-emotion", "7": "objects"},
                "subgroups": {"1": "face", "80": "tool"},
            },
            "en/shortcodes/a.json": {"1FA93": "hatchet", "2702-FE0F": ["scissors", "snip"]},
            "en/shortcodes/b.json": {"1FA93": ["axe_tool"]},
            "de/shortcodes/a.json": {"1FA93": "axt"},
            "en/data.json": [
                {"hexcode": "1F600", "label": "grinning face", "group": 0, "subgroup": 1, "tags": ["smile"]},
                {"hexcode": "2702-FE0F", "label": "scissors", "group": 7, "subgroup": 80},
                {"hexcode": "1FA93", "label": "axe", "group": 7, "subgroup": 80, "tags": ["chop", "wood"]},
                {"hexcode": "1F1E6", "label": "regional indicator A"},  # belongs to no group
            ],
        }
    )
    assert read_concepts(archive) == [
        Concept("2702", "scissors", (), "objects", "tool", frozenset({"scissors", "snip"})),
        Concept("1FA93", "axe", ("chop", "wood"), "objects", "tool", frozenset({"axe", "hatchet", "axetool"})),
    ]


def test_hexcodes_match_where_the_vendor_publishes_them():
    icons = icon_set(["axe", "cut"], {"1fa93": "axe", "2702-fe0f": "cut", "1f600": "removed"})
    assert icons.by_hexcode() == {"1FA93": "axe", "2702": "cut"}
    assert icon_set(["axe"]).by_hexcode() == {}


def test_names_match_only_when_they_fit_one_concept():
    concepts = [concept("A", "axe", "hatchet"), concept("B", "boat", "ship"), concept("C", "liner", "ship")]
    icons = icon_set(["Hatchet", "ship", "boat", "unknown"])
    assert icons.by_name(concepts, {}) == {"A": "Hatchet", "B": "boat"}


def test_other_vendors_names_help_to_match():
    icons = icon_set(["tomahawk"])
    assert icons.by_name([concept("A", "axe")], {}) == {}
    assert icons.by_name([concept("A", "axe")], {"A": {"toma-hawk"}}) == {"A": "tomahawk"}
    assert icons.by_name([concept("A", "axe"), concept("B", "tomahawk")], {"A": {"tomahawk"}}) == {}


def test_svg_is_a_document_of_the_icons_size():
    text = icon_set(["axe"]).svg("axe")
    assert 'viewBox="0 0 16 32" width="16" height="32"' in text and '<path id="axe"/>' in text


def test_a_rendered_icon_fits_its_transparent_square():
    pytest.importorskip("resvg_py")
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 20 10"><rect width="20" height="10" fill="#f00"/></svg>'
    image = render_svg(svg, 40)
    pixels = np.asarray(image)
    assert image.mode == "RGBA" and image.size == (40, 40)
    assert (
        (pixels[10:30] == (255, 0, 0, 255)).all() and (pixels[:10, :, 3] == 0).all() and (pixels[30:, :, 3] == 0).all()
    )


@pytest.mark.parametrize("size", [(10, 10), (100, 3), (1, 400), (1, 1)])
def test_pad_to_square_centres_any_image(size):
    image = pad_to_square(Image.new("RGBA", size, (9, 9, 9, 255)), 32)
    alpha = np.asarray(image)[..., 3] > 0
    assert image.size == (32, 32) and alpha.any(0).sum() == 32 * size[0] // max(size) or min(size) * 32 < max(size) * 2
    rows = np.flatnonzero(alpha.any(1))
    assert abs(rows[0] - (31 - rows[-1])) <= 1


def test_every_vendor_plays_one_part_and_names_its_licence():
    assert len({v.name for v in VENDORS}) == len(VENDORS)
    assert {v.split for v in VENDORS} == {"train", "val", "test"}
    assert all(v.licence and v.author for v in VENDORS)
