"""Pretrain the towers: `python tools/pretrain.py --config configs/pretrain/reclip_mini.yaml [key=value …]`."""

import sys
from pathlib import Path

# Python puts this folder first on the path, where `pretrain.py` would pass for the package `pretrain`.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.commands.pretrain import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
