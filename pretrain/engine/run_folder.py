"""A run folder that explains itself: configuration, command, code version, environment, data, metrics, summary.

Used by both halves. Nothing here knows what is trained.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from pretrain.atomic import write_atomically

_REPORTED = ("torch", "torchvision", "torch-xla", "timm", "open_clip_torch", "sal-detectron2", "lvis", "numpy")


def git_revision() -> str:
    """Commit of the working folder, with `+changes` when files differ from it; `unknown` outside a repository."""
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return revision + ("+changes" if dirty else "")


def describe_environment() -> dict[str, str | int]:
    """Python, platform, processor count and the versions of the packages that decide results."""
    versions: dict[str, str | int] = {
        "python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count() or 0
    }  # fmt: skip
    for name in _REPORTED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def file_fingerprint(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RunFolder:
    """Writes a run's files. Opening an existing folder continues its metrics.

    Args:
        path: created if absent.
        config: the resolved configuration as text.
        data: what identifies the data: fingerprints by name (`file_fingerprint` for a file).
    """

    def __init__(self, path: str | Path, config: str, data: dict[str, str] | None = None):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / "config.yaml", config)
        with (self.path / "command.txt").open("a") as file:  # one line for the start, one for every resumption
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {shlex.join([Path(sys.executable).name, *sys.argv])}\n")
        about = {
            "git_revision": git_revision(), "environment": describe_environment(),
            "data": data or {},
        }  # fmt: skip
        write_atomically(self.path / "about.json", json.dumps(about, indent=1) + "\n")
        self._metrics = (self.path / "metrics.jsonl").open("a", buffering=1)
        self._board = SummaryWriter(str(self.path / "tensorboard"))

    def log(self, step: int, **values: float | int | str) -> None:
        """Append one line to metrics.jsonl; numbers also go to TensorBoard."""
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(name, value, step)

    def write_summary(self, text: str) -> None:
        """Replace summary.md."""
        write_atomically(self.path / "summary.md", text)

    def close(self) -> None:
        """Flush everything."""
        self._metrics.close()
        self._board.close()


def trim_metrics(path: Path, last_step: int) -> None:
    """Drop the lines of metrics.jsonl that a resumed run will write again (steps after `last_step`, and a cut line)."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    write_atomically(path, "".join(line + "\n" for line in kept))
