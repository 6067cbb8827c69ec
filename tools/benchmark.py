"""Measure this machine beside others: `data` and `train` (open_clip), `evaluation` (lvis), `detector` (Detectron2).

python tools/benchmark.py train [--image-size 64 160]
python tools/benchmark.py train --schedule configs/pretrain/reclip_s16_64px_550k_ft20k.yaml
"""

import argparse
import sys
import tempfile
from pathlib import Path

# Python puts this folder first on the path, where tools/pretrain.py would pass for the package `pretrain`.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.commands.outcome import exit_status  # noqa: E402


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


def add_train_command(commands: argparse._SubParsersAction) -> None:
    """Options of `train`."""
    parser = commands.add_parser("train", help="images/s of a step beside open_clip's; hours of a schedule")
    parser.add_argument("--config", help="whose towers; none: the miniature's on a CPU, ViT-B/16 on a GPU")
    parser.add_argument("--image-size", type=int, nargs="*", default=[64], help="pixels; several: one after the other")
    parser.add_argument("--context-length", type=int, default=16, help="tokens")
    parser.add_argument("--batch-size", type=int, help="pairs of a step (256); of a schedule's dearest step (CPU: 8)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "xla"])
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--compile", action="store_true", help="torch.compile, for both")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=5, help="of each step, alternating")
    parser.add_argument("--peak", type=float, metavar="TFLOP_S", help="of the device, where it is not known")
    parser.add_argument("--schedule", metavar="CONFIG", help="measure its phases, and give its hours, instead")
    parser.add_argument("--baseline", metavar="CONFIG", help="default: the schedule's main steps at 224 px")
    parser.set_defaults(run=run_train)


def run_train(options: argparse.Namespace) -> None:
    """Measure steps, or the phases of a schedule, and print the table."""
    from pretrain.config import load_config
    from pretrain.engine import benchmark_schedule, benchmark_train
    from pretrain.engine.device import Device

    device = Device(options.device, options.precision)
    on_cpu = device.kind == "cpu"
    print(device.describe(), file=sys.stderr)
    if options.schedule:
        batch = options.batch_size or (8 if on_cpu else 256)
        baseline = load_config(options.baseline) if options.baseline else None
        times = benchmark_schedule.compare_schedules(
            load_config(options.schedule), baseline,
            lambda jobs: benchmark_schedule.time_phases(
                jobs, device, batch, options.seconds, options.repeats, options.compile
            ),
        )  # fmt: skip
        print(benchmark_schedule.schedule_to_markdown(times))
        return
    default = "reclip_mini.yaml" if on_cpu else "reclip_b16_64px_550k_ft20k.yaml"
    configs = Path(__file__).resolve().parents[1] / "configs" / "pretrain"
    model = load_config(options.config or configs / default).model
    benchmark = benchmark_train.TrainBenchmark(
        model, options.context_length, options.batch_size or 256, options.compile, options.seconds, options.repeats
    )
    results = [benchmark_train.compare_steps(benchmark, size, device) for size in options.image_size]
    peak = options.peak * 1e12 if options.peak else benchmark_train.device_peak(device)
    print(benchmark_train.steps_to_markdown(results, on_cpu, peak))


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    from ovd.engine.benchmark_detector import add_detector_command  # these two import neither torch nor Detectron2
    from ovd.evaluation.benchmark import add_evaluation_command

    for add_command in (add_data_command, add_train_command, add_evaluation_command, add_detector_command):
        add_command(commands)
    options = parser.parse_args(arguments)
    from pretrain.config import ConfigError  # here, so that --help and typing errors answer at once

    return exit_status(lambda: options.run(options), mendable=(ConfigError, OSError))


if __name__ == "__main__":
    sys.exit(main())
