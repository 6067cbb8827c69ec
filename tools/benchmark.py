"""Measure this machine: `python tools/benchmark.py data` compares the loader with open_clip's, in images/s per core."""

import argparse
import sys
import tempfile
from pathlib import Path

# Python puts this folder first on the path, where tools/pretrain.py would pass for the package `pretrain`.
sys.path[0] = str(Path(__file__).resolve().parents[1])


def add_data_command(commands: argparse._SubParsersAction) -> None:
    """Options of `data`."""
    parser = commands.add_parser("data", help="images/s per core beside open_clip's WebDataset pipeline")
    parser.add_argument("--shards", help='tar shards, for example "dir/{00000..00009}.tar"; none: 2,000 are made')
    parser.add_argument("--folder", type=Path, help="where made shards go and stay; none: a temporary folder")
    parser.add_argument("--image-size", type=int, default=64, help="pixels that training gets")
    parser.add_argument("--source-size", type=int, default=512, help="pixels of the made JPEGs")
    parser.add_argument("--images", type=int, default=2000, help="number of made JPEGs")
    parser.add_argument("--context-length", type=int, default=16, help="tokens")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=5, help="of each pipeline, alternating")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1], help="0 measures inside the process")
    parser.set_defaults(run=run_data)


def run_data(options: argparse.Namespace) -> None:
    """Make shards if none are given, measure, print the table."""
    from pretrain.engine import benchmark_data

    with tempfile.TemporaryDirectory() as scratch:
        shards = options.shards
        if shards is None:
            folder = options.folder or Path(scratch)
            shards = benchmark_data.make_shards(folder, options.images, options.source_size)
            print(f"made {options.images} JPEGs of {options.source_size} px: {shards}", file=sys.stderr)
        benchmark = benchmark_data.DataBenchmark(
            shards, options.image_size, options.context_length, options.batch_size, options.seconds, options.repeats
        )
        print(benchmark_data.to_markdown(benchmark_data.run(benchmark, options.workers)))


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_data_command(commands)
    options = parser.parse_args(arguments)

    # Imported here so that --help and typing errors answer at once.
    from pretrain.config import ConfigError

    try:
        options.run(options)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
