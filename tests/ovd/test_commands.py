"""The commands that installation puts on the path: there is one function for each, and asking for help is quick."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    name: target
    for name, target in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].items()
    if target.startswith("ovd.commands.")
}
SLOW = ("torch", "torchvision", "detectron2", "timm", "open_clip", "cv2", "matplotlib", "numpy")


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_of_an_installed_command_needs_no_slow_imports(name, tmp_path) -> None:
    module, function = SCRIPTS[name].split(":")
    program = (
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"sys.argv = [{name!r}, '--help']\n"
        f"from {module} import {function}\n"
        "try:\n"
        f"    {function}()\n"
        "except SystemExit as stop:\n"
        "    print('status', stop.code or 0)\n"
        f"print('slow', sorted(set({SLOW!r}) & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"usage: {name}" in done.stdout and done.stdout.splitlines()[-2:] == ["status 0", "slow []"]


def test_every_tool_of_a_command_calls_the_same_function() -> None:
    for target in SCRIPTS.values():
        module = target.split(":")[0]
        tools = [p for p in (ROOT / "tools").glob("*.py") if f"from {module} import main" in p.read_text()]
        assert len(tools) == 1, module
        assert callable(importlib.import_module(module).main)
