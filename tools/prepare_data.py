"""Build or check data sets: `python tools/prepare_data.py mini` makes the miniature (drawings, captions, LVIS files).

`trees` fetches photographs of forests with boxes, to fine-tune on. `synonyms` makes the file that clip-rocket's text
views take synonyms from. `shards` indexes tar shards before a training run does. `lvis`, `coco` and `custom` check your
own download and write training files without the novel classes. `regions` embeds regions of training pictures, for
distillation.
"""

import argparse
import os
import sys
from pathlib import Path

# Python puts this folder first on the path, where `pretrain.py` would pass for the package `pretrain`.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from ovd.commands import region_files  # noqa: E402
from pretrain.commands.outcome import exit_status  # noqa: E402
from pretrain.commands.prepare_data import add_pretraining_sets  # noqa: E402


def build_mini(options: argparse.Namespace) -> None:
    """Drawings and captions first, then scenes made of them."""
    from tqdm import tqdm

    from ovd.data.mini import background_licences, build_scenes
    from pretrain.data.mini import build_pairs

    def bar(items, total):
        return tqdm(items, total=total, desc="drawings", unit="drawing")

    print("fetching and checking the packages …", flush=True)
    pairs = build_pairs(options.root, options.workers, bar, background_licences(), full=options.full)
    print(f"{pairs['concepts']} concepts, {sum(pairs['drawings'].values())} drawings: {options.root}/pairs.csv")
    with tqdm(desc="scenes", unit="scene") as scenes:

        def update(split: str, done: int, total: int) -> None:
            scenes.set_description(f"{split} scenes")
            scenes.total, scenes.n = total, done
            scenes.refresh()

        build_scenes(
            options.root, options.seed, options.train_scenes, options.val_scenes, options.test_scenes,
            workers=options.workers, progress=update,
        )  # fmt: skip
    for name in ("mini_lvis_train.json", "contact_sheet.png", "scenes_contact_sheet.png", "LICENSES.md"):
        print(f"{options.root / name}")


def fetch_trees(options: argparse.Namespace) -> None:
    """Photographs of forests from the air: three COCO files and their tiles."""
    from ovd.data.trees import build_trees

    for split, counts in build_trees(options.root).items():
        print(f"{options.root / split}.json: {counts['tiles']} tiles, {counts['trees']} trees")
    print(f"whole pictures: {options.root}/whole; licence: {options.root}/LICENSE.txt")


def check_lvis(options: argparse.Namespace) -> None:
    """LVIS v1: counts, pictures, base-only training file."""
    from ovd.data.lvis_v1 import prepare_lvis, report_lines

    print("\n".join(report_lines(prepare_lvis(options.root, options.images, options.sample))))


def check_coco(options: argparse.Namespace) -> None:
    """OV-COCO: 48 base and 17 novel classes of COCO 2017."""
    from ovd.data.coco import prepare_coco

    for part in prepare_coco(options.root, options.images, options.sample).values():
        print(
            f"{part['path']}: {part['categories']} classes, {part['images']:,} pictures, {part['annotations']:,} boxes"
        )
        print(f"  {len(part['missing']):,} missing; {len(part['unusable'])} of {part['sampled']} opened do not fit")


def check_custom(options: argparse.Namespace) -> None:
    """A COCO-format file of one's own."""
    from ovd.data.custom import prepare_custom

    novel, base = ([w.strip() for w in words.split(",") if w.strip()] for words in (options.novel, options.base))
    report = prepare_custom(options.annotations, options.images, options.root, novel, base or None, options.sample)
    print(*(f"{key}: {value}" for key, value in report.items()), sep="\n")


def add_checks(sets: argparse._SubParsersAction) -> None:
    """The commands for data of one's own."""
    lvis = sets.add_parser("lvis", help="check LVIS v1 and write its base-only training file")
    coco = sets.add_parser("coco", help="check COCO 2017 and write OV-COCO's files (48 base, 17 novel classes)")
    custom = sets.add_parser("custom", help="check a COCO-format file and split its classes")
    custom.add_argument("--annotations", required=True, help="COCO-format JSON file")
    custom.add_argument("--novel", default="", help="novel classes by name, with commas (default: none)")
    custom.add_argument("--base", default="", help="base classes by name, with commas (default: all others)")
    custom.add_argument("--root", type=Path, required=True, help="folder for the files to write")
    custom.add_argument("--images", required=True, help="folder that the pictures' names are relative to")
    for name, parser in (("lvis", lvis), ("coco", coco)):
        parser.add_argument("--root", type=Path, default=Path(f"data/{name}"), help="of the download (%(default)s)")
        parser.add_argument("--images", help="folder with train2017 and val2017 (default: the root)")
    for parser, work in ((lvis, check_lvis), (coco, check_coco), (custom, check_custom)):
        parser.add_argument("--sample", type=int, default=200, help="pictures to open (default: %(default)s)")
        parser.set_defaults(work=work)


def main(arguments: list[str] | None = None) -> int:
    """Parse, build, print where things are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sets = parser.add_subparsers(dest="data", required=True)
    mini = sets.add_parser("mini", help="the miniature: real drawings with LVIS's names, about 170 MB, 2 minutes")
    mini.add_argument("--root", type=Path, default=Path("data/mini"), help="where to put it (default: %(default)s)")
    mini.add_argument("--seed", type=int, default=0, help="of the scenes (default: %(default)s)")
    mini.add_argument("--train-scenes", type=int, default=2400, help="(default: %(default)s)")
    mini.add_argument("--val-scenes", type=int, default=200, help="(default: %(default)s)")
    mini.add_argument("--test-scenes", type=int, default=400, help="(default: %(default)s)")
    mini.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    mini.add_argument(
        "--full", action="store_true", help="add Debian's stamps, furniture renders and photographs (330 MB)"
    )
    mini.set_defaults(work=build_mini)
    trees = sets.add_parser(
        "trees", help="aerial photographs with boxes of trees to fine-tune on, 20 MB (docs/finetune.md)"
    )
    trees.add_argument("--root", type=Path, default=Path("data/trees"), help="where to put it (default: %(default)s)")
    trees.set_defaults(work=fetch_trees)
    add_pretraining_sets(sets)
    add_checks(sets)
    regions = sets.add_parser("regions", help="embed regions of training pictures, for distillation (docs/data.md)")
    region_files.add_arguments(regions)
    regions.set_defaults(work=region_files.run)
    options = parser.parse_args(arguments)

    from pretrain.data.npm_archives import FetchError

    return exit_status(
        lambda: options.work(options),
        "interrupted; the same command continues",
        mendable=(FetchError, OSError, ValueError),
    )


if __name__ == "__main__":
    sys.exit(main())
