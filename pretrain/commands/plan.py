"""Plan before you spend: tokens, FLOPs, memory, hours and saving of a curriculum, phase by phase.

python tools/plan.py --config configs/pretrain/reclip_l16_64px_550k_ft20k.yaml [--measure] [--json] [key=value …]
"""

import argparse
import json

from pretrain.commands.outcome import exit_status


def positive(text: str) -> float:
    """A positive number, `2e14` included."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def whole(text: str) -> int:
    """A number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def make_parser() -> argparse.ArgumentParser:
    """Every option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file; see pretrain/config.py for every field")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--devices", type=whole, default=1, metavar="N", help="how many share each batch (default: 1)")
    parser.add_argument("--memory", type=positive, metavar="GB", help="also give the largest micro batch in that much")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--measure", action="store_true", help="train a few steps of each phase here, to give hours")
    speed.add_argument(
        "--throughput", type=positive, metavar="PAIRS_S", help="pairs a second of one device in the first phase"
    )
    speed.add_argument("--flops", type=positive, metavar="FLOP_S", help="FLOP/s that one device sustains")
    parser.add_argument("--measure-batch", type=whole, default=0, metavar="N", help="pairs of a measured step")
    parser.add_argument(
        "--measure-seconds", type=positive, default=5.0, metavar="S", help="for each phase (default: 5)"
    )
    parser.add_argument(
        "--baseline", metavar="FILE", help="take towers, image size and text length from its main phase"
    )
    parser.add_argument("--baseline-image-size", type=whole, metavar="PX", help="default: 224")
    parser.add_argument("--baseline-context-length", type=whole, metavar="N", help="default: the text tower's")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example 'phases[0].image_size=80'")
    return parser


def run(options: argparse.Namespace) -> None:
    """Plan and print."""
    from pretrain.config import load_config
    from pretrain.engine.report import format_report, make_report

    report = make_report(
        load_config(options.config, options.overrides),
        devices=options.devices,
        memory_limit=options.memory * 1e9 if options.memory else None,
        throughput=options.throughput,
        flops=options.flops,
        measure=options.measure,
        measure_batch=options.measure_batch,
        measure_seconds=options.measure_seconds,
        baseline=load_config(options.baseline) if options.baseline else None,
        baseline_image_size=options.baseline_image_size,
        baseline_context_length=options.baseline_context_length,
    )
    print(json.dumps(report, indent=1) if options.json else format_report(report))


def main(arguments: list[str] | None = None) -> int:
    """Parse, plan; what a user can mend is one sentence on stderr."""
    options = make_parser().parse_args(arguments)

    # Imported here so that --help and typing errors answer at once.
    from pretrain.config import ConfigError

    return exit_status(lambda: run(options), "interrupted", mendable=(ConfigError, OSError))
