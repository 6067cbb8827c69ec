"""What the README says exists: paths, commands and their options, `make` targets, and what its Python code imports."""

import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
MADE_BY_COMMANDS = ("data/", "runs/", "demo/")  # not in the repository: commands write there
OWN_PACKAGES = ("pretrain", "ovd", "tools", "configs", "tests")
_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)
_TOP_FILES = re.compile(r"[A-Z][\w-]*\.md|LICENSE|Makefile|pyproject\.toml")


def code_blocks(text: str) -> list[tuple[str, str]]:
    """Language (or "") and content of every fenced block."""
    return [(m[1].lower(), m[2]) for m in _FENCE.finditer(text)]


def prose(text: str) -> str:
    """The text without fenced blocks."""
    return _FENCE.sub("", text)


def paths(text: str) -> list[str]:
    """Repository paths named in backticks, links and pictures."""
    found = []
    for span in re.findall(r"`([^`\n]+)`", prose(text)):
        first = span.split("::")[0].strip()
        is_path = re.fullmatch(r"\.?[\w.-]+(/[\w.*{},-]*)+", first) and first.split("/")[0] in tops()
        if is_path or _TOP_FILES.fullmatch(first):
            found.append(first)
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", prose(text)) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if not re.match(r"[a-z]+:|#", target):
            found.append(target.split("#")[0])
    return found


def tops() -> set[str]:
    """First parts of the paths that this repository can have."""
    return {p.name for p in ROOT.iterdir()} | {p.rstrip("/") for p in MADE_BY_COMMANDS}


def missing_paths(text: str) -> list[str]:
    """The paths that are neither in the repository nor made by a command; `*` and `{a,b}` must match something."""

    def exists(path: str) -> bool:
        braces = re.search(r"\{([^}]*)\}", path)
        if braces:
            return all(exists(path[: braces.start()] + part + path[braces.end() :]) for part in braces[1].split(","))
        if "*" in path:
            return any(ROOT.glob(path))
        return (ROOT / path).exists()

    return [p for p in paths(text) if not p.startswith(MADE_BY_COMMANDS) and not exists(p)]


def commands(text: str) -> list[list[str]]:
    """Every `python tools/x.py …` of blocks and backticks, split as a shell does, up to a pipe or `&&`."""
    lines = [line for language, block in code_blocks(text) if language != "python" for line in joined(block)]
    lines += re.findall(r"`([^`\n]+)`", prose(text))
    found = []
    for line in lines:
        match = re.search(r"(?:python[\d.]*|\$\(PY\))\s+(tools/\S+\.py.*)", line)
        if match:
            parts = shlex.split(match[1].replace("…", ""), comments=True)
            stop = next((i for i, p in enumerate(parts) if p in ("|", "&&", ";", ">", "2>&1", "&")), len(parts))
            found.append(parts[:stop])
    return found


def joined(block: str) -> list[str]:
    """Lines of a shell block, those that end in a backslash joined with the next."""
    return re.sub(r"\\\n\s*", " ", block).splitlines()


@cache
def help_of(tool: str, *subcommand: str) -> str:
    """Text of a command's (or subcommand's) help; "" when it has none."""
    run = subprocess.run([sys.executable, tool, *subcommand, "--help"], capture_output=True, text=True, cwd=ROOT)
    return run.stdout if run.returncode == 0 else ""


def wrong_commands(text: str) -> list[str]:
    """What is wrong with the commands: no such tool or configuration file, or an option its help does not list."""
    wrong = []
    for tool, *arguments in commands(text):
        if not (ROOT / tool).is_file():
            wrong.append(f"{tool}: no such file")
            continue
        answer = help_of(tool)
        if arguments and re.search(r"^\s*\{[\w,-]*\b" + re.escape(arguments[0]) + r"\b", answer, re.MULTILINE):
            answer += help_of(tool, arguments[0])
        for i, argument in enumerate(arguments):
            name, _, value = argument.partition("=")
            if name.startswith("-") and not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", answer):
                wrong.append(f"{tool}: no option {name}")
            value = value or (arguments[i + 1] if i + 1 < len(arguments) else "")
            if name in ("--config", "--config-file") and not (ROOT / value).is_file() and not value.isupper():
                wrong.append(f"{tool}: no configuration file {value}")
    return wrong


def wrong_overrides(text: str) -> list[str]:
    """The `key=value` of commands with a configuration that the configuration does not know."""
    from ovd.engine.lazy_config import load_config as load_detector_config
    from pretrain.config import load_config

    loaders = {"tools/pretrain.py": load_config, "tools/train_net.py": load_detector_config}
    wrong = []
    for tool, *arguments in commands(text):
        overrides = [a for a in arguments if "=" in a and not a.startswith("-")]
        if tool in loaders and overrides:
            config = next(a for a, before in zip(arguments[1:], arguments, strict=False) if before == "--config")
            try:
                loaders[tool](str(ROOT / config), overrides)
            except ValueError as error:
                wrong.append(f"{tool}: {error}")
    return wrong


def missing_targets(text: str, makefile: str) -> list[str]:
    """`make x` of blocks and backticks without a rule in the Makefile."""
    rules = set(re.findall(r"^([\w-]+)\s*:(?!=)", makefile, re.MULTILINE))
    places = [line for language, block in code_blocks(text) if language != "python" for line in block.splitlines()]
    places += re.findall(r"`([^`\n]+)`", prose(text))
    named = [m[1] for place in places if (m := re.match(r"\s*(?:\$ )?make\s+([a-z][\w-]*)", place))]
    return [name for name in named if name not in rules]


def python_faults(text: str) -> list[str]:
    """Python blocks that do not compile, and names they import from this project that do not exist."""
    faults = []
    for code in (block for language, block in code_blocks(text) if language in ("python", "py")):
        try:
            tree = ast.parse(code)
        except SyntaxError as error:
            faults.append(f"line {error.lineno} of a block: {error.msg}")
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                faults += [f"no module {a.name}" for a in node.names if not has_module(a.name)]
            elif isinstance(node, ast.ImportFrom) and node.module:
                if not has_module(node.module):
                    faults.append(f"no module {node.module}")
                elif node.module.split(".")[0] in OWN_PACKAGES:
                    module = importlib.import_module(node.module)
                    faults += [
                        f"{node.module} has no {a.name}"
                        for a in node.names
                        if a.name != "*" and not hasattr(module, a.name) and not has_module(f"{node.module}.{a.name}")
                    ]
    return faults


def has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


SAMPLE = """
See `ovd/detector.py`, `tools/demo.py::main`, `runs/mine/x.csv`, `configs/pretrain/*.yaml`,
`ovd/{detector,detections}.py`, [licence](LICENSE), [up](#top),
[web](https://example.org), `a/b`, `f/c`, `LICENSE`. Run `make test`, then
`python tools/demo.py --input a.jpg`.
```bash
make demo   # all
python tools/pretrain.py --config configs/pretrain/reclip_mini.yaml run.output=runs/x
.venv/bin/python tools/prepare_data.py mini \\
    --root data/mini --full | tee log --verbose
python tools/train_net.py --config FILE
```
```python
import numpy as np
from ovd import OpenVocabularyDetector
from ovd.data import images
detector = OpenVocabularyDetector.from_pretrained("mini")
```
"""


def test_a_correct_text_has_no_faults():
    assert missing_paths(SAMPLE) == [] and wrong_commands(SAMPLE) == [] and python_faults(SAMPLE) == []
    assert missing_targets(SAMPLE, (ROOT / "Makefile").read_text()) == [] and wrong_overrides(SAMPLE) == []
    assert len(commands(SAMPLE)) == 4 and commands(SAMPLE)[1] == [
        "tools/prepare_data.py", "mini", "--root", "data/mini", "--full",
    ]  # fmt: skip
    assert paths(SAMPLE) == [
        "ovd/detector.py", "tools/demo.py", "runs/mine/x.csv", "configs/pretrain/*.yaml",
        "ovd/{detector,detections}.py", "LICENSE", "LICENSE",
    ]  # fmt: skip


def test_every_kind_of_fault_is_found():
    text = """
`ovd/nothing.py` `configs/ovd/*.toml` `CONTRIBUTING_NOT.md` [x](docs/none.md) <img src="assets/none.png"> `make fly`
`python tools/nothing.py`
```
$ make soar
python tools/demo.py --input a --vocabluary b
python tools/prepare_data.py mini --seeds 3
python tools/pretrain.py --config=configs/none.yaml
```
"""
    assert missing_paths(text) == [
        "ovd/nothing.py", "configs/ovd/*.toml", "CONTRIBUTING_NOT.md", "docs/none.md", "assets/none.png",
    ]  # fmt: skip
    assert missing_targets(text, "demo: x\nVENV := .venv\n") == ["soar", "fly"]
    assert sorted(wrong_commands(text)) == [
        "tools/demo.py: no option --vocabluary",
        "tools/nothing.py: no such file",
        "tools/prepare_data.py: no option --seeds",
        "tools/pretrain.py: no configuration file configs/none.yaml",
    ]
    text = "`python tools/pretrain.py --config configs/pretrain/reclip_mini.yaml run.devise=cpu run.output=runs/x`"
    assert len(wrong_overrides(text)) == 1 and "run.devise" in wrong_overrides(text)[0]
    text = "`python tools/train_net.py --config configs/ovd/mini_lvis.py train.max_itre=1`"
    assert len(wrong_overrides(text)) == 1 and "max_iter" in wrong_overrides(text)[0]


def test_faults_of_python_examples_are_found():
    faults = python_faults("""
```python
from ovd import Nothing
import pretrain.nothing
```
```python
x = (
```
""")
    assert faults[:2] == ["ovd has no Nothing", "no module pretrain.nothing"] and "never closed" in faults[2]


@pytest.fixture(scope="module")
def readme() -> str:
    assert README.is_file(), "README.md does not exist"
    return README.read_text(encoding="utf-8")


def test_every_path_in_the_readme_exists(readme):
    assert missing_paths(readme) == []


def test_every_command_in_the_readme_is_one_the_tools_understand(readme):
    assert wrong_commands(readme) == [] and wrong_overrides(readme) == []


def test_every_make_target_in_the_readme_exists(readme):
    assert missing_targets(readme, (ROOT / "Makefile").read_text()) == []


def test_every_python_example_in_the_readme_compiles_and_imports_what_exists(readme):
    assert python_faults(readme) == []
