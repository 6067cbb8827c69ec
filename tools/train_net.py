"""Train or evaluate a detector: `python tools/train_net.py --config configs/ovd/mini_lvis.py [key=value …]`.

Several processes: `--num-gpus 8`, or `torchrun --nproc-per-node 8 tools/train_net.py …`, also over several machines.
"""

import sys
from pathlib import Path

# Python puts this folder first on the path, where `pretrain.py` would pass for the package `pretrain`.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from ovd.commands.train import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
