"""Plan before you spend: tokens, FLOPs, memory, hours and saving of a curriculum, phase by phase.

python tools/plan.py --config configs/pretrain/reclip_l16_64px_550k_ft20k.yaml [--measure] [--json] [key=value …]
"""

import sys
from pathlib import Path

# Python puts this folder first on the path, where `pretrain.py` would pass for the package `pretrain`.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.commands.plan import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
