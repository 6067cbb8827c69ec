"""Train or evaluate a detector: `python tools/train_net.py --config configs/ovd/mini_lvis.py [key=value …]`."""

import argparse
import sys
from pathlib import Path

# Python puts this folder first on the path, where `pretrain.py` would pass for the package `pretrain`.
sys.path[0] = str(Path(__file__).resolve().parents[1])


def load_config(path: str, overrides: list[str]):
    """Read a LazyConfig and apply overrides; ConfigError names what is wrong."""
    import difflib

    from detectron2.config import LazyConfig
    from omegaconf import OmegaConf

    from pretrain.config import ConfigError

    if not Path(path).is_file():
        near = difflib.get_close_matches(Path(path).name, [p.name for p in Path(path).parent.glob("*.py")], n=1)
        raise ConfigError(f"no configuration file {path}" + (f"; did you mean {near[0]}?" if near else ""))
    cfg = LazyConfig.load(path)
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r} is not of the form key=value")
        parent, _, leaf = key.rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else cfg
        if node is None or not hasattr(node, "keys") or (leaf not in node and parent != "evaluation.fusion"):
            known = [str(k) for k in node] if hasattr(node, "keys") else [str(k) for k in cfg]
            near = difflib.get_close_matches(leaf if node is not None else key.split(".")[0], known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
            raise ConfigError(f"unknown field {key!r}: {hint}")
    return LazyConfig.apply_overrides(cfg, overrides)


def run(options: argparse.Namespace) -> None:
    """In each process: train unless only evaluation is asked for, then evaluate in the first one."""
    import logging

    from detectron2.utils import comm
    from detectron2.utils.logger import setup_logger

    from ovd.engine.evaluate import results_table
    from ovd.engine.trainer import evaluate, train

    cfg = load_config(options.config, options.overrides)
    for name in ("detectron2", "ovd", "fvcore"):
        setup_logger(distributed_rank=comm.get_rank(), name=name)
    logging.getLogger("fvcore.common.checkpoint").setLevel(logging.WARNING)
    folder = Path(options.detector or Path(cfg.train.output) / "detector")
    if not options.eval_only:
        folder = train(cfg, resume=options.resume)
    results = evaluate(cfg, folder)
    if comm.is_main_process():
        print(f"\n{results_table(results)}\ndetector:   {folder}\nevaluation: {cfg.train.output}/summary.md")


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, print where the output went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", "--config-file", required=True, help="LazyConfig file below configs/ovd")
    parser.add_argument("--resume", action="store_true", help="continue the run in train.output")
    parser.add_argument("--eval-only", action="store_true", help="evaluate train.output/detector, or --detector")
    parser.add_argument("--detector", help="checkpoint folder to evaluate (with --eval-only)")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes on this machine (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.max_iter=100")
    options = parser.parse_args(arguments)

    from detectron2.engine import launch

    try:
        launch(run, options.num_gpus, dist_url="auto", args=(options,))
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; continue with the same command and --resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
