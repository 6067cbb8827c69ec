"""More drawings and photographs for the miniature, out of three Debian packages: stamps, furniture renders, landscapes.

A package is fetched with `apt-get download` (no root, nothing is installed), checked against its pinned SHA-256 and
unpacked into a scratch folder. Reading works on the unpacked folder. Rendering and indexing are done by
`pretrain.data.mini`; all of this material is for training only.
"""

import hashlib
import io
import os
import re
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pretrain.atomic import replacing
from pretrain.data.emoji import render_svg
from pretrain.data.npm_archives import FetchError

PHOTOGRAPHS = "photographs"  # folder below the miniature's root; ovd.data.backgrounds takes them from there
PHOTOGRAPH_SIDE = 1024  # pixels, the longer side: scenes are 320
_SVG_SIDE = 256  # pixels
_MIN_CUTOUT_SIDE = 100  # pixels: a smaller picture would be enlarged and blurred in a scene

# Not things one can point at, and people: the emoji half leaves the same groups out.
_LEFT_OUT_STAMPS = ("symbols", "people", "town/flags")
_LEFT_OUT_FURNITURE = ("Characters",)
# Called "Keyboard" and "Joystick", which are other things in LVIS: a piano's, and a gamepad.
_MISNAMED = ("katorlegaz-midi-keyboard", "scopia-ps4-joystick")
# A ladybird, and a flower that reads as a sunflower: both would be objects without a box in a scene.
_LEFT_OUT_PHOTOGRAPHS = ("LadyBird", "YellowFlower")


@dataclass(frozen=True)
class DebianPackage:
    """One pinned package of architecture "all", and whose work it holds."""

    name: str
    version: str
    sha256: str
    vendor: str
    author: str
    licence: str

    @property
    def file_name(self) -> str:
        """The file name that `apt-get download` gives the package."""
        return f"{self.name}_{self.version}_all.deb"


STAMPS = DebianPackage(
    "tuxpaint-stamps-default", "2022.06.04-1", "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    "tuxpaint", "Bill Kendrick and the Tux Paint contributors", "GPL-2",
)  # fmt: skip
FURNITURE = DebianPackage(
    "sweethome3d-furniture", "1.8-1", "3ccb90c63f9525e887a767b9cd5c8b6933b8b6b2973a615a5359ee68a2118668",
    "sweethome3d", "Kator Legaz, Scopia, Reallusion and Blend Swap contributors", "CC-BY-3.0, in part CC0-1.0",
)  # fmt: skip
LANDSCAPES = DebianPackage(
    "mate-backgrounds", "1.26.0-1", "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
    "mate", "C. Barbin, A. Cimitan, M. Cogoni, J. Ansorg, T. Schellhase, S. Nazarov, H. Bons, J.-F. Fortin Tam and "
    "others (package's copyright file)", "GPL-2+",
)  # fmt: skip
PACKAGES = (STAMPS, FURNITURE, LANDSCAPES)


@dataclass(frozen=True)
class Drawing:
    """A picture and what is known about it; `source` is the bytes of an image file."""

    source: bytes
    name: str  # file name without ending, unique within the vendor
    caption: str
    keywords: tuple[str, ...]
    vendor: str
    group: str
    subgroup: str
    large_enough: bool  # to be a cut-out; the alpha channel decides about the rest


def fetch_deb(package: DebianPackage, folder: Path) -> Path:
    """Return the package's file in `folder`, downloading it if it is absent or damaged.

    Raises:
        FetchError: apt-get is absent or fails, or the file's SHA-256 is not the pinned one (nothing is kept then).
    """
    target = folder / package.file_name
    if target.exists() and _sha256(target) == package.sha256:
        return target
    by_hand = f"put {package.file_name} (every Debian mirror has it) into {folder} by hand"
    if shutil.which("apt-get") is None:
        raise FetchError(f"{package.name} is fetched with apt-get, which this system lacks: {by_hand}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = ["apt-get", "download", f"{package.name}={package.version}"]
        run = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
        arrived = Path(scratch) / package.file_name
        if run.returncode != 0 or not arrived.exists():
            reason = (run.stderr.strip() or run.stdout.strip() or "no message").splitlines()[-1]
            raise FetchError(
                f"apt-get could not download {package.name} {package.version} ({reason}): "
                f"run `apt-get update` and try again, or {by_hand}"
            )
        found = _sha256(arrived)
        if found != package.sha256:
            raise FetchError(
                f"{package.file_name} has SHA-256 {found[:16]}…, expected {package.sha256[:16]}…: the download is "
                f"damaged or was changed; run again, or {by_hand}"
            )
        os.replace(arrived, target)
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(deb: Path, folder: Path) -> None:
    """Extract a package's files below `folder`; none of its scripts runs.

    Raises:
        FetchError: dpkg-deb is absent or cannot read the file.
    """
    if shutil.which("dpkg-deb") is None:
        raise FetchError(f"{deb.name} is unpacked with dpkg-deb, which this system lacks: install the package dpkg")
    run = subprocess.run(["dpkg-deb", "-x", str(deb), str(folder)], capture_output=True, text=True)
    if run.returncode != 0:
        reason = (run.stderr.strip() or "no message").splitlines()[-1]
        raise FetchError(f"dpkg-deb could not unpack {deb} ({reason}): delete it and run again")


def short_caption(text: str) -> str | None:
    """The name in a stamp's description, or None for a slogan: "A koala." gives "koala", "Boom!!!" nothing.

    Only the first clause counts; a leading article and "pair of" go. A text that does not start with an article must be
    at most three plain words, since longer ones talk about the thing instead of naming it.
    """
    text = re.sub('[“”"]', "", text.replace("’", "'")).strip()
    clause, *rest = re.split(r"[.!?:;,(—–]| is | are | means | lets | stands for | for ", text, maxsplit=1)
    article = re.match(r"(an?|some|the) (pairs? of )?", clause, re.IGNORECASE)
    if article:
        clause = clause[article.end() :]
    elif not clause or len(clause.split()) > 3 or "!" in text or "?" in text:
        return None
    clause = " ".join(clause.split())
    # "Laser printer" loses the capital of its sentence; "TV stand" and "Ford Focus" have capitals of their own.
    if len(clause) < 2:
        return None
    return clause[0].lower() + clause[1:] if clause[1:].islower() else clause


def read_stamps(folder: Path) -> list[Drawing]:
    """Stamps of an unpacked tuxpaint-stamps-default: PNG (or SVG where there is no PNG) with a one-line description."""
    root = folder / "usr/share/tuxpaint/stamps"
    drawings = []
    for text in sorted(root.rglob("*.txt")):
        place = text.relative_to(root).parent.as_posix()
        if any(place == left or place.startswith(f"{left}/") for left in _LEFT_OUT_STAMPS):
            continue
        source = next((p for p in (text.with_suffix(".png"), text.with_suffix(".svg")) if p.is_file()), None)
        first_line = text.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
        caption = short_caption(first_line)
        if source is None or text.stem.endswith("_mirror") or caption is None:
            continue
        content = source.read_bytes() if source.suffix == ".png" else _rasterise(source)
        if content is None:
            continue
        words = tuple(place.split("/"))
        name = _slug(f"{place}-{text.stem}")
        large = _is_large_enough(content)
        drawings.append(Drawing(content, name, caption, words, STAMPS.vendor, "stamps", place, large))
    return drawings


def _rasterise(svg: Path) -> bytes | None:
    """PNG bytes of an SVG file; None for the few that give no size of their own or show nothing."""
    try:
        image = render_svg(svg.read_text(encoding="utf-8", errors="replace"), _SVG_SIDE)
    except ValueError:
        return None
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue() if image.getchannel("A").getextrema()[1] > 0 else None


def read_furniture(folder: Path) -> list[Drawing]:
    """Renders of an unpacked sweethome3d-furniture: the icons of its catalogues, which are zip files."""
    drawings = []
    for catalogue in sorted((folder / "usr/share/sweethome3d/furniture").glob("*.sh3f")):
        with zipfile.ZipFile(catalogue) as archive:
            fields = _properties(archive.read("PluginFurnitureCatalog.properties").decode("latin-1"))
            members, taken = set(archive.namelist()), set()
            for key in sorted((k for k in fields if k.startswith("name#")), key=lambda k: int(k[5:])):
                number = key[5:]
                icon = fields.get(f"icon#{number}", "").lstrip("/")
                category = fields.get(f"category#{number}", "")
                name = _slug(f"{catalogue.stem}-{Path(icon).stem}")
                if icon not in members or icon in taken or name in _MISNAMED or category in _LEFT_OUT_FURNITURE:
                    continue
                taken.add(icon)
                # Some tags name the collection, which says nothing about the thing.
                tags = (tag.strip() for tag in fields.get(f"tags#{number}", "").split(","))
                tags = tuple(t.lower() for t in tags if t and t not in ("Blend Swap", "scpts"))
                content = archive.read(icon)
                caption = short_caption(f"A {fields[key]}")
                if caption is None:
                    continue
                drawings.append(
                    Drawing(
                        content, name, caption, tags, FURNITURE.vendor, "furniture", category.lower(),
                        _is_large_enough(content),
                    )
                )  # fmt: skip
    return drawings


def write_photographs(folder: Path, root: Path) -> list[str]:
    """Write the landscapes of an unpacked mate-backgrounds, reduced, to `photographs/` below root; return the names."""
    names = []
    for path in sorted((folder / "usr/share/backgrounds/mate/nature").glob("*.jpg")):
        if path.stem in _LEFT_OUT_PHOTOGRAPHS:
            continue
        names.append(path.stem.lower())
        target = root / PHOTOGRAPHS / f"{names[-1]}.jpg"
        if target.exists():
            continue
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        picture.thumbnail((PHOTOGRAPH_SIDE, PHOTOGRAPH_SIDE), Image.Resampling.LANCZOS)
        with replacing(target) as temporary:
            picture.save(temporary, "JPEG", quality=95)
    return names


def gather(root: Path) -> tuple[list[Drawing], list[str]]:
    """Fetch and unpack all three packages, write the photographs, and return the drawings and the photographs' names.

    Raises:
        FetchError: a package cannot be fetched or unpacked, or holds nothing where its files were expected.
    """
    debs = [fetch_deb(package, root / "archives") for package in PACKAGES]
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        for deb in debs:
            unpack(deb, Path(scratch))
        stamps, furniture = read_stamps(Path(scratch)), read_furniture(Path(scratch))
        photographs = write_photographs(Path(scratch), root)
    for package, found in zip(PACKAGES, (stamps, furniture, photographs), strict=True):
        if not found:
            raise FetchError(f"{package.file_name} holds no picture where {package.name} keeps them; this is a fault")
    return [*stamps, *furniture], photographs


def licence_lines(drawings: Iterable[Drawing], photographs: list[str]) -> list[str]:
    """Markdown table rows (part, source, author, licence, count) that name the origin of all this."""
    vendors = [d.vendor for d in drawings]
    rows = [(p, "train drawings", vendors.count(p.vendor)) for p in (STAMPS, FURNITURE)]
    rows.append((LANDSCAPES, "train backgrounds, reduced", len(photographs)))
    return [f"| {part} | Debian {p.name} {p.version} | {p.author} | {p.licence} | {n} |" for p, part, n in rows]


def _properties(text: str) -> dict[str, str]:
    """Keys and values of a Java properties file; no continued lines, which these files do not have."""
    lines = (line.strip() for line in text.splitlines())
    pairs = (line.partition("=") for line in lines if line and line[0] not in "#!")
    return {k.strip(): re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), v.strip()) for k, _, v in pairs}


def _is_large_enough(content: bytes) -> bool:
    with Image.open(io.BytesIO(content)) as image:
        return max(image.size) >= _MIN_CUTOUT_SIDE


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
