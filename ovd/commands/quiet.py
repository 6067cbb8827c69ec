"""Silence what libraries say about each other, which a user of a command can do nothing about."""

import logging
import warnings


def quieten_libraries() -> None:
    """Leave out PyTorch's remark on meshgrid, the tracer's on unused inputs, and fvcore's on every file."""
    warnings.filterwarnings("ignore", message="torch.meshgrid", category=UserWarning)
    logging.getLogger("torch.fx").setLevel(logging.ERROR)
    logging.getLogger("fvcore.common.checkpoint").setLevel(logging.WARNING)
