"""Train or evaluate a detector: `python tools/train_net.py --config configs/ovd/mini_lvis.py [key=value …]`.

Several processes: `--num-gpus 8`, or `torchrun --nproc-per-node 8 tools/train_net.py …`, also over several machines.
"""

import argparse
from pathlib import Path

from pretrain.commands.outcome import exit_status


def run(options: argparse.Namespace) -> None:
    """In each process: train unless only evaluation is asked for, then evaluate in the first one."""
    from detectron2.utils import comm
    from detectron2.utils.logger import setup_logger

    from ovd.commands.quiet import quieten_libraries
    from ovd.detector_folder import detector_folder
    from ovd.engine.evaluate import results_table
    from ovd.engine.lazy_config import load_config
    from ovd.engine.trainer import evaluate, train
    from pretrain.config import ConfigError

    cfg = load_config(options.config, options.overrides)
    if options.eval_only and any(override.startswith("model.architecture") for override in options.overrides):
        raise ConfigError(
            "--eval-only measures a detector as it was trained, and model.architecture would change nothing: use "
            "evaluation.fusion (alpha, beta, …) or evaluation.inference (detections_per_image, …)"
        )
    for name in ("detectron2", "ovd", "fvcore"):
        setup_logger(distributed_rank=comm.get_rank(), name=name)
    quieten_libraries()
    folder = detector_folder(options.detector) if options.detector else Path(cfg.train.output) / "detector"
    if not options.eval_only:
        folder = train(cfg, resume=options.resume)
    if cfg.data.get("validation", True) == "":  # fine-tuning without a set to measure on
        if comm.is_main_process():
            print(f"\ndetector: {folder}\nnothing was measured: data.validation is empty")
        return
    results = evaluate(cfg, folder)
    if comm.is_main_process():
        print(f"\n{results_table(results)}\ndetector:   {folder}\nevaluation: {cfg.train.output}/summary.md")


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, print where the output went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", "--config-file", required=True, help="LazyConfig file below configs/ovd")
    parser.add_argument("--resume", action="store_true", help="continue the run in train.output")
    parser.add_argument("--eval-only", action="store_true", help="evaluate train.output/detector, or --detector")
    parser.add_argument("--detector", help="with --eval-only: its folder, or the name of one that ships")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes on this machine (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.max_iter=100")
    options = parser.parse_args(arguments)

    from ovd.engine.processes import run_in_processes

    mendable = (ValueError, FileNotFoundError, FloatingPointError)
    return exit_status(
        lambda: run_in_processes(run, options.num_gpus, (options,), mendable),
        "interrupted; continue with the same command and --resume",
        mendable,
    )
