"""The part `regions` of `tools/prepare_data.py`: what distillation reads instead of embedding crops in every step."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every option."""
    add = parser.add_argument
    add("--config", required=True, help="LazyConfig file below configs/ovd, of the training that will read the regions")
    add("--detector", required=True, metavar="DIR", help="whose proposals they are: a folder, or a name that ships")
    add("--output", required=True, type=Path, metavar="DIR", help="folder for a file a picture")
    add("--limit", type=int, default=300, metavar="N", help="regions of a picture, at most (default: %(default)s)")
    add("overrides", nargs="*", metavar="key=value", help="of the configuration, for example train.device=cpu")


def run(options: argparse.Namespace) -> None:
    """Compute, write, print what was done."""
    from functools import partial

    from tqdm import tqdm

    from ovd.commands.quiet import quieten_libraries
    from ovd.engine.lazy_config import load_config
    from ovd.engine.region_files import write_regions

    quieten_libraries()
    cfg = load_config(options.config, options.overrides)
    progress = partial(tqdm, desc="regions", unit="picture", disable=None)
    counts = write_regions(cfg, options.detector, options.output, options.limit, progress)
    there = counts.pictures - counts.written - counts.unreadable
    print(
        f"{counts.pictures:,} pictures: {counts.written:,} files written with {counts.regions:,} regions, {there:,} "
        f"there already, {counts.unreadable:,} pictures unreadable"
    )
    print(f"regions: {options.output} (train with data.train.mapper.regions={options.output})")
