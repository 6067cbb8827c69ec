"""Pretrain the towers: `python tools/pretrain.py --config configs/pretrain/reclip_mini.yaml [key=value …]`."""

import argparse
import sys
from pathlib import Path

# Python puts this folder first on the path, where this very file would pass for the package `pretrain`.
sys.path[0] = str(Path(__file__).resolve().parents[1])


def main(arguments: list[str] | None = None) -> int:
    """Parse, train, print where the output went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file; see pretrain/config.py for every field")
    parser.add_argument("--resume", action="store_true", help="continue the run in run.output from its last state")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example run.output=runs/mine")
    options = parser.parse_args(arguments)

    # Imported here so that --help and typing errors answer at once.
    from pretrain.config import ConfigError, load_config
    from pretrain.engine.train import Trainer
    from pretrain.modeling.checkpoint import CheckpointError

    try:
        trainer = Trainer(load_config(options.config, options.overrides), resume=options.resume)
        folder = trainer.train()
    except (ConfigError, CheckpointError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; continue with the same command and --resume", file=sys.stderr)
        return 130
    print(f"checkpoint: {folder}\nsummary:    {trainer.folder.path / 'summary.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
