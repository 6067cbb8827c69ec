"""Put a headless Chromium for the test of the page into the running environment, without root; does nothing if there.

The npm package `@sparticuz/chromium` carries chrome-headless-shell for Linux on x86-64 with the few libraries that a
plain system may lack. It is downloaded as an archive and checked against its SHA-512; none of its scripts runs.
"""

import io
import platform
import shlex
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain.data.npm_archives import Archive, FetchError, NpmPackage, fetch  # noqa: E402

PACKAGE = NpmPackage(
    "@sparticuz/chromium", "153.0.0",
    "jiGWqSvPMdu4+P9TilYqAR7yEGPEHINx+lCvE/NqNO/EHYzF/x1hUiI5T6ioVIt7dEy7n88byyT0vk+dnsgQwA==",
)  # fmt: skip
# One folder for each version, so that a changed pin is installed beside the old one and not taken for it.
FOLDER = Path(sys.prefix) / "share" / f"headless-chromium-{PACKAGE.version}"
PROGRAM = FOLDER / "headless-chromium"  # a script that sets the paths of libraries and fonts


def is_supported() -> bool:
    """Whether there is such a browser for this machine."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def unpack(archive: Archive, folder: Path) -> None:
    """Write the browser, its libraries and one font family below `folder`."""
    import brotli  # comes with gradio

    program = folder / "chromium"
    program.write_bytes(brotli.decompress(archive.read("bin/chromium.br")))
    program.chmod(0o755)
    for part in ("al2023", "fonts", "swiftshader"):
        content = io.BytesIO(brotli.decompress(archive.read(f"bin/{part}.tar.br")))
        with tarfile.open(fileobj=content) as tar:
            tar.extractall(folder, filter="data")
    # Without a font the browser ends at the first letter.
    (folder / "fonts.conf").write_text(
        '<?xml version="1.0"?>\n<!DOCTYPE fontconfig SYSTEM "fonts.dtd">\n<fontconfig>'
        f"<dir>{FOLDER / 'fonts'}</dir><cachedir>{FOLDER / 'font-cache'}</cachedir></fontconfig>\n"
    )
    start = folder / PROGRAM.name
    here = shlex.quote(str(FOLDER))
    start.write_text(
        f'#!/bin/sh\nexport LD_LIBRARY_PATH={here}/lib FONTCONFIG_FILE={here}/fonts.conf\nexec {here}/chromium "$@"\n'
    )
    start.chmod(0o755)


def main() -> int:
    """Fetch, unpack beside the final place, rename."""
    if PROGRAM.exists():
        return 0
    if not is_supported():
        print("note: no headless Chromium for this machine; the test of the page in a browser is skipped")
        return 0
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=FOLDER.parent) as scratch:
            archive = Archive(fetch(PACKAGE, Path(scratch)))
            ready = Path(scratch) / "ready"
            ready.mkdir()
            unpack(archive, ready)
            ready.rename(FOLDER)
    except (FetchError, OSError, ImportError) as error:
        print(f"error: headless Chromium could not be installed ({error})", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
