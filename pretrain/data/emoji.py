"""Emoji drawings of independent vendors as image-text material: which icon draws which concept, and its rendering.

A concept is a Unicode emoji without skin tone, known by its hexcode (upper case, variation selector FE0F removed).
Vendors that publish a hexcode table are matched by it; the others by normalised name, unique hits only.
"""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from pretrain.data.npm_archives import Archive, NpmPackage

# Unicode's groups whose members are things one can point at. Smileys, people, symbols and flags are left out.
OBJECT_GROUPS = ("animals-nature", "food-drink", "travel-places", "activities", "objects")

NAMES = NpmPackage(
    "emojibase-data",
    "17.0.0",
    "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)


@dataclass(frozen=True)
class Vendor:
    """One independent set of drawings and the part it plays in the miniature."""

    name: str
    package: NpmPackage
    split: str  # train, val or test: a whole vendor, so that validation and test drawings were never seen
    licence: str
    author: str


def _iconify(name: str, version: str, sha512: str, split: str, licence: str, author: str) -> Vendor:
    return Vendor(name, NpmPackage(f"@iconify-json/{name}", version, sha512), split, licence, author)


# Order matters: the first three publish hexcode tables, whose names help to match the vendors that do not.
VENDORS = (
    _iconify(
        "noto", "1.2.9", "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "train", "Apache-2.0", "Google, Noto Emoji",
    ),
    _iconify(
        "twemoji", "1.2.5", "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "train", "CC-BY-4.0", "Twitter and the jdecked/twemoji contributors",
    ),
    _iconify(
        "openmoji", "1.2.29",
        "vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
        "train", "CC-BY-SA-4.0", "OpenMoji, HfG Schwäbisch Gmünd",
    ),
    _iconify(
        "noto-v1", "1.2.5", "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        "train", "Apache-2.0", "Google, Noto Emoji (first series)",
    ),
    _iconify(
        "emojione-v1", "1.2.3",
        "UjI2VQEXVtGlPBvQuxEizro7QCgBcJDOYwKUupquvvZ8UV4xOlvm45IU82JYWegiAWLerY79gFLMZ26U6Ms+ww==",
        "train", "CC-BY-SA-4.0", "Emoji One (first series)",
    ),
    _iconify(
        "fxemoji", "1.2.2", "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
        "train", "Apache-2.0", "Mozilla, FxEmojis",
    ),
    _iconify(
        "emojione", "1.2.3", "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        "val", "CC-BY-4.0", "Emoji One (second series, EmojiTwo)",
    ),
    Vendor(
        "fluent-emoji-3d",
        NpmPackage(
            "@lobehub/fluent-emoji-3d", "1.1.0",
            "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        ),
        "test", "MIT", "Microsoft Fluent Emoji, packaged by LobeHub",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Concept:
    """What an emoji means: its short name, its keywords, and every name it goes by (normalised, for matching)."""

    hexcode: str
    label: str
    keywords: tuple[str, ...]
    group: str
    subgroup: str
    aliases: frozenset[str]


def normalise_name(name: str) -> str:
    """Letters and digits only, lower case: `Alarm-Clock` and `alarmclock` are one name."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def normalise_hexcode(code: str) -> str:
    """Upper case, without the variation selector FE0F."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F")


def read_concepts(archive: Archive, groups: tuple[str, ...] = OBJECT_GROUPS) -> list[Concept]:
    """The concepts of the given groups in Unicode's order, from emojibase's English data."""
    meta = archive.json("meta/groups.json")
    shortcodes: dict[str, set[str]] = {}
    for name in archive.names(".json"):
        if name.startswith("en/shortcodes/"):
            for code, names in archive.json(name).items():
                found = shortcodes.setdefault(normalise_hexcode(code), set())
                found.update([names] if isinstance(names, str) else names)
    concepts = []
    for entry in archive.json("en/data.json"):
        group = meta["groups"].get(str(entry.get("group")))
        if group not in groups:
            continue
        code = normalise_hexcode(entry["hexcode"])
        names = {entry["label"], *shortcodes.get(code, ())}
        concepts.append(
            Concept(
                code,
                entry["label"],
                tuple(entry.get("tags", ())),
                group,
                meta["subgroups"][str(entry["subgroup"])],
                frozenset(normalise_name(n) for n in names),
            )
        )
    return concepts


class IconSet:
    """The SVG icons of one iconify package."""

    def __init__(self, archive: Archive):
        data = archive.json("icons.json")
        self._icons: dict[str, dict] = data["icons"]
        self._size = (data.get("width", 16), data.get("height", 16))
        self._characters: dict[str, str] = archive.json("chars.json")

    def by_hexcode(self) -> dict[str, str]:
        """Hexcode to icon name, where the vendor publishes the table (empty otherwise)."""
        table: dict[str, str] = {}
        for code, name in self._characters.items():
            if name in self._icons:
                table.setdefault(normalise_hexcode(code), name)
        return table

    def by_name(self, concepts: list[Concept], extra: dict[str, set[str]]) -> dict[str, str]:
        """Hexcode to icon name by normalised name; a name that fits two concepts is not used.

        Args:
            concepts: what may be matched.
            extra: further names per hexcode (other vendors' names for it).
        """
        owners: dict[str, set[str]] = {}
        for concept in concepts:
            for name in concept.aliases | {normalise_name(n) for n in extra.get(concept.hexcode, ())}:
                owners.setdefault(name, set()).add(concept.hexcode)
        table: dict[str, str] = {}
        for icon in sorted(self._icons):
            hit = owners.get(normalise_name(icon), set())
            if len(hit) == 1:
                table.setdefault(next(iter(hit)), icon)
        return table

    def svg(self, name: str) -> str:
        """A complete SVG document for one icon."""
        icon = self._icons[name]
        width, height = icon.get("width", self._size[0]), icon.get("height", self._size[1])
        left, top = icon.get("left", 0), icon.get("top", 0)
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
        )


def pad_to_square(image: Image.Image, size: int) -> Image.Image:
    """Scale an RGBA image so that its long side is `size`, centred on a transparent square."""
    scale = size / max(image.size)
    fitted = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    square.paste(fitted, ((size - fitted.width) // 2, (size - fitted.height) // 2))
    return square


def render_svg(svg: str, size: int) -> Image.Image:
    """Rasterise an SVG document into a transparent square of `size` pixels (long side fitted)."""
    import resvg_py  # only needed to build the miniature

    return pad_to_square(
        Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size)))).convert("RGBA"), size
    )


def match_icons(
    archives: dict[str, Archive], concepts: list[Concept]
) -> Iterator[tuple[Vendor, dict[str, bytes | str]]]:
    """For each vendor in turn: hexcode to drawing source (an SVG document, or the bytes of an image file)."""
    known = {c.hexcode for c in concepts}
    extra: dict[str, set[str]] = {}
    for vendor in VENDORS:
        archive = archives[vendor.name]
        if "icons.json" not in archive.names("icons.json"):
            files = {normalise_hexcode(n.split("/")[-1].removesuffix(".webp")): n for n in archive.names(".webp")}
            yield vendor, {code: archive.read(files[code]) for code in sorted(known & files.keys())}
            continue
        icons = IconSet(archive)
        table = icons.by_hexcode()
        for code, name in table.items():
            extra.setdefault(code, set()).add(name)
        table = table or icons.by_name(concepts, extra)
        yield vendor, {code: icons.svg(table[code]) for code in sorted(known & table.keys())}
