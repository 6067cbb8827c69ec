"""Build the miniature's image-text half: 861 object concepts drawn by independent emoji vendors, with their names.

Result (below the root): `drawings/<vendor>/<hexcode>.png` (RGBA, transparent), `pairs.csv`, `LICENSES.md`,
`contact_sheet.png`, `manifest.json`. Whole vendors are held out for validation and test. With `full`, stamps and
renders join the training drawings and landscapes are written to `photographs/`. Detection scenes are composed from
these files by `ovd.data.mini`.
"""

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from pretrain.atomic import write_atomically
from pretrain.data import debian, emoji
from pretrain.data.npm_archives import Archive, fetch

DRAWING_SIZE = 160  # pixels: the longest object in a scene is 150, so cut-outs are never enlarged
COLUMNS = ("image", "caption", "keywords", "concept", "label", "vendor", "split", "group", "subgroup", "cutout")
_FULL_SQUARE = 0.97  # a drawing whose opaque share exceeds this has its own background: no use as a cut-out


def _render(job: tuple[bytes | str, Path]) -> None:
    source, target = job
    if target.exists():
        return
    if isinstance(source, str):
        image = emoji.render_svg(source, DRAWING_SIZE)
    else:
        image = emoji.pad_to_square(Image.open(io.BytesIO(source)).convert("RGBA"), DRAWING_SIZE)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomically(target, buffer.getvalue())


def _is_cutout(path: Path) -> bool:
    alpha = np.asarray(Image.open(path))[..., 3]
    return 0.02 < float((alpha > 127).mean()) < _FULL_SQUARE


def _contact_sheet(rows: list[dict], root: Path, concepts: int = 12) -> Image.Image:
    """One row a vendor, one column a concept that every emoji vendor draws; other vendors show what they have."""
    vendors = [v.name for v in emoji.VENDORS]
    others = sorted({row["vendor"] for row in rows} - set(vendors))
    drawn: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["vendor"] in vendors:
            drawn.setdefault(row["concept"], {})[row["vendor"]] = row["image"]
    complete = [c for c, by_vendor in drawn.items() if len(by_vendor) == len(vendors)]
    chosen = [complete[i] for i in np.linspace(0, len(complete) - 1, concepts).astype(int)] if complete else []
    lines = [[drawn[concept][vendor] for concept in chosen] for vendor in vendors]
    for vendor in others:
        images = [row["image"] for row in rows if row["vendor"] == vendor]
        lines.append([images[i] for i in np.linspace(0, len(images) - 1, concepts).astype(int)])
    cell = 96
    sheet = Image.new("RGB", (cell * max(1, *map(len, lines)), cell * len(lines)), "white")
    for y, line in enumerate(lines):
        for x, image in enumerate(line):
            drawing = Image.open(root / image).resize((cell - 8, cell - 8), Image.Resampling.LANCZOS)
            sheet.paste(drawing, (x * cell + 4, y * cell + 4), drawing)
    return sheet


def _full_rows(drawings: list[debian.Drawing], concepts: list[emoji.Concept]) -> list[dict]:
    """Rows for the Debian drawings; one with an emoji's name is of the emoji's concept (`data.unique_by`)."""
    known = {emoji.normalise_name(c.label): c.hexcode for c in concepts}
    rows = []
    for d in drawings:
        concept = known.get(emoji.normalise_name(d.caption), "-".join(d.caption.lower().split()))
        rows.append(
            {
                "image": f"drawings/{d.vendor}/{d.name}.png", "caption": d.caption, "keywords": "|".join(d.keywords),
                "concept": concept, "label": d.caption, "vendor": d.vendor, "split": "train", "group": d.group,
                "subgroup": d.subgroup, "cutout": int(d.large_enough),
            }
        )  # fmt: skip
    return rows


def _licences(counts: dict[str, int], extra: Iterable[str]) -> str:
    lines = [
        "# Where the miniature's material comes from",
        "",
        "Drawings are rendered unchanged from these packages; scenes made from them carry the same terms.",
        "",
        "| part | source | author | licence | drawings |",
        "|---|---|---|---|---|",
        f"| names, keywords | {emoji.NAMES.name} {emoji.NAMES.version} | Miles Johnson | MIT | – |",
    ]
    for v in emoji.VENDORS:
        package = f"{v.package.name} {v.package.version}"
        lines.append(f"| {v.split} drawings | {package} | {v.author} | {v.licence} | {counts[v.name]} |")
    return "\n".join([*lines, *extra]) + "\n"


def build_pairs(
    root: Path,
    workers: int = 2,
    progress: Callable[[Iterable, int], Iterable] | None = None,
    licence_lines: Iterable[str] = (),
    full: bool = False,
) -> dict:
    """Fetch, render and index the drawings; what is already there is kept.

    Args:
        root: the miniature's folder; created if absent.
        workers: processes that render.
        progress: wraps an iterable of known length for display (`tqdm`-like); None for silence.
        licence_lines: further lines for LICENSES.md.
        full: add stamps, renders and landscapes of Debian packages (330 MB, apt-get) to the training material.

    Returns:
        The manifest: package versions, drawings per vendor, number of concepts, SHA-256 of `pairs.csv`.

    Raises:
        FetchError: if a package cannot be fetched or verified.
    """
    root = Path(root)
    archives = {v.name: Archive(fetch(v.package, root / "archives")) for v in emoji.VENDORS}
    concepts = emoji.read_concepts(Archive(fetch(emoji.NAMES, root / "archives")))
    by_code = {c.hexcode: c for c in concepts}
    jobs, rows = [], []
    for vendor, sources in emoji.match_icons(archives, concepts):
        for code, source in sources.items():
            path = f"drawings/{vendor.name}/{code}.png"
            jobs.append((source, root / path))
            concept = by_code[code]
            rows.append(
                {
                    "image": path, "caption": concept.label, "keywords": "|".join(concept.keywords), "concept": code,
                    "label": concept.label, "vendor": vendor.name, "split": vendor.split, "group": concept.group,
                    "subgroup": concept.subgroup,
                }
            )  # fmt: skip
    if full:
        drawings, photographs = debian.gather(root)
        rows += _full_rows(drawings, concepts)
        jobs += [(d.source, root / f"drawings/{d.vendor}/{d.name}.png") for d in drawings]
        licence_lines = [*debian.licence_lines(drawings, photographs), *licence_lines]
    else:
        # What a full build left would go into the scenes.
        shutil.rmtree(root / debian.PHOTOGRAPHS, ignore_errors=True)
    with ProcessPoolExecutor(workers) as pool:
        done = pool.map(_render, jobs, chunksize=32)
        for _ in progress(done, len(jobs)) if progress else done:
            pass
        for row, cutout in zip(rows, pool.map(_is_cutout, [j[1] for j in jobs], chunksize=64), strict=True):
            row["cutout"] = int(cutout and row.get("cutout", 1))
    return _write_index(root, rows, concepts, licence_lines)


def _write_index(root: Path, rows: list[dict], concepts: list[emoji.Concept], licence_lines: Iterable[str]) -> dict:
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(root / "pairs.csv", table.getvalue())
    counts = {v.name: sum(r["vendor"] == v.name for r in rows) for v in emoji.VENDORS}
    write_atomically(root / "LICENSES.md", _licences(counts, licence_lines))
    sheet = io.BytesIO()
    _contact_sheet(rows, root).save(sheet, "PNG")
    write_atomically(root / "contact_sheet.png", sheet.getvalue())
    packages = {v.package.name: v.package.version for v in emoji.VENDORS} | {emoji.NAMES.name: emoji.NAMES.version}
    others = sorted({row["vendor"] for row in rows} - counts.keys())
    if others:
        packages |= {p.name: p.version for p in debian.PACKAGES}
        counts |= {vendor: sum(r["vendor"] == vendor for r in rows) for vendor in others}
    manifest = {
        "packages": packages,
        "drawing_size": DRAWING_SIZE,
        "concepts": len(concepts),
        "drawings": counts,
        "pairs_sha256": hashlib.sha256(table.getvalue().encode()).hexdigest(),
    }
    write_atomically(root / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return manifest
