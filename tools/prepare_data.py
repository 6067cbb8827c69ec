"""Build data sets: `python tools/prepare_data.py mini` makes the miniature (drawings, captions, scenes, LVIS files)."""

import argparse
import os
import sys
from pathlib import Path

# Python puts this folder first on the path, where `pretrain.py` would pass for the package `pretrain`.
sys.path[0] = str(Path(__file__).resolve().parents[1])


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


def main(arguments: list[str] | None = None) -> int:
    """Parse, build, print where things are."""
    parser = argparse.ArgumentParser(description=__doc__)
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
    options = parser.parse_args(arguments)

    from pretrain.data.npm_archives import FetchError

    try:
        build_mini(options)
    except (FetchError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
