"""One self-contained report.html for a run folder: `python tools/report.py runs/pretrain_mini`."""

import sys
from pathlib import Path

# Python puts this folder first on the path, where `pretrain.py` would pass for the package `pretrain`.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from ovd.report.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
