"""Put Detectron2's Python code into the running environment, unless `import detectron2` already works.

Detectron2 publishes no package under its own name. `sal-detectron2` carries its code; the wheel is tagged for Python
3.10, but nothing in it that this project uses is compiled, so it is unpacked into this environment whatever its Python.
"""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

PACKAGE = "sal-detectron2==0.7.2"


def main() -> int:
    """Install, remove what does not belong, check the import."""
    if importlib.util.find_spec("detectron2"):
        print("detectron2 is already there")
        return 0
    site_packages = Path(sysconfig.get_paths()["purelib"])
    before = {path.name for path in site_packages.iterdir()}
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:",
        "--python-version", "3.10", "--implementation", "cp", "--target", str(site_packages), PACKAGE,
    ]  # fmt: skip
    if subprocess.run(command).returncode:
        print(
            f"error: pip could not fetch {PACKAGE}: check the network, or install Detectron2 yourself", file=sys.stderr
        )
        return 1
    # The wheel also ships its scripts as a top-level package `tools`, and an extension for another Python.
    if "tools" not in before:
        shutil.rmtree(site_packages / "tools", ignore_errors=True)
    for extension in (site_packages / "detectron2").glob("_C.*.so"):
        extension.unlink()
    return subprocess.run([sys.executable, "-c", "import detectron2"]).returncode


if __name__ == "__main__":
    sys.exit(main())
