"""Embed words with a model's text tower, keep them in a file that knows what made it, and say what is wrong with them.

python tools/embed_vocabulary.py --checkpoint DIR --vocabulary words.txt --output words.safetensors
"""

import sys
from pathlib import Path

# Python puts this folder first on the path, where `pretrain.py` would pass for the package `pretrain`.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from ovd.commands.embed_vocabulary import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
