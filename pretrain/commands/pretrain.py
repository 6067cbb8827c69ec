"""Pretrain the towers: `python tools/pretrain.py --config configs/pretrain/reclip_mini.yaml [key=value …]`."""

import argparse

from pretrain.commands.outcome import exit_status


def train(number: int, config: str, overrides: list[str], resume: bool) -> None:
    """Train and print where the output went; at the top level, because the processes of a TPU import it by name.

    Args:
        number: of this process among those started with it; torch-xla tells `Processes` its place.
    """
    from pretrain.config import load_config
    from pretrain.engine.processes import leave_processes
    from pretrain.engine.train import Trainer

    try:
        trainer = Trainer(load_config(config, overrides), resume=resume)
        checkpoint = trainer.train()
        if trainer.processes.is_main:
            print(f"checkpoint: {checkpoint}\nsummary:    {trainer.folder.path / 'summary.md'}")
    finally:
        leave_processes()


def main(arguments: list[str] | None = None) -> int:
    """Parse, and train in this process or in those it starts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file; see pretrain/config.py for every field")
    parser.add_argument("--resume", action="store_true", help="continue the run in run.output from its last state")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example run.output=runs/mine")
    options = parser.parse_args(arguments)

    # Imported here so that --help and typing errors answer at once.
    from pretrain.config import ConfigError, load_config
    from pretrain.engine.processes import start_processes
    from pretrain.modeling.checkpoint import CheckpointError

    def work() -> None:
        choice = options.config, options.overrides, options.resume
        if load_config(options.config, options.overrides).run.parallel == "processes":
            start_processes(train, *choice)
        else:
            train(0, *choice)

    return exit_status(
        work,
        "interrupted; continue with the same command and --resume",
        mendable=(ConfigError, CheckpointError, FloatingPointError, OSError),
    )
