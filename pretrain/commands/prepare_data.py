"""The commands of `tools/prepare_data.py` that pretraining alone needs."""

import argparse
from pathlib import Path


def fetch_synonyms(options: argparse.Namespace) -> None:
    """The synonyms of WordNet, for `text.synonyms` of clip-rocket's configurations."""
    from pretrain.data.wordnet import LICENCE_FILE, SYNONYMS_FILE, build_synonyms

    counts = build_synonyms(options.root)
    print(f"{options.root / SYNONYMS_FILE}: {counts['synonyms']:,} synonyms of {counts['words']:,} words")
    print(f"licence: {options.root / LICENCE_FILE}")


def index_shards(options: argparse.Namespace) -> None:
    """The indices of tar shards, so that no training process waits for them."""
    from pretrain.data.shard_index import kept_index
    from pretrain.data.shards import ShardSource, expand_shards

    if options.processes is not None and options.processes < 1:
        raise ValueError(f"--processes {options.processes} is below 1")
    paths = expand_shards(options.pattern)
    print(*ShardSource(paths, processes=options.processes, caption_reader="").notes, sep="\n")
    if lost := sum(kept_index(path) is None for path in paths):
        raise OSError(
            f"the indices of {lost} shards cannot be kept, neither beside them nor in the user's cache: make one of "
            "the folders writable"
        )


def add_pretraining_sets(sets: argparse._SubParsersAction) -> None:
    """The commands `synonyms` and `shards`."""
    synonyms = sets.add_parser("synonyms", help="WordNet's synonyms for clip-rocket's text views, 11 MB")
    synonyms.add_argument(
        "--root", type=Path, default=Path("data/wordnet"), help="where to put it (default: %(default)s)"
    )
    synonyms.set_defaults(work=fetch_synonyms)
    shards = sets.add_parser("shards", help="index tar shards and count their pairs, before a training run")
    shards.add_argument("pattern", help='as data.shards: "dir/{00000..00099}.tar", a glob, several joined by "::"')
    shards.add_argument("--processes", type=int, help="that scan (default: one a CPU core)")
    shards.set_defaults(work=index_shards)
