"""What can be wrong in a page of documentation: links, paths, commands, overrides, Python code, quoted errors, numbers.

Each check takes a page's text (and, where links count, its folder) and returns a list of faults, empty for a true page.
Nothing here trains, and no data is read: commands are compared with the help of their tools. `test_documentation.py`
runs the checks on every page, and on wrong texts.
"""

import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
MADE_BY_COMMANDS = ("data/", "runs/", "demo/")  # not in the repository: commands write there
OWN_PACKAGES = ("pretrain", "ovd", "tools", "configs", "tests")
CONFIG_FOLDERS = ("configs/pretrain", "configs/ovd", "configs/studies")
FIELD = "…"  # in a quoted error, what differs from case to case
_SHELL = ("", "bash", "sh", "shell", "console", "text")
_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)[^)]*\)|(?:src|href)=\"([^\"]+)\"")
_TOP_FILES = re.compile(r"[A-Z][\w-]*\.md|LICENSE|Makefile|pyproject\.toml")
_NEW_FILE = re.compile(r"^# new file: (\S+)\n")
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
_SHORTEST_QUOTE = 12  # letters of an error that must be quoted to say which one it is


# --- parts of a page


def code_blocks(text: str) -> list[tuple[str, str]]:
    """Language (or "") and content of every fenced block."""
    return [(m[1].lower(), m[2]) for m in _FENCE.finditer(text)]


def prose(text: str) -> str:
    """The text without fenced blocks."""
    return _FENCE.sub("", text)


def spans(text: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`\n]+)`", prose(text))


def links(text: str) -> list[str]:
    """Targets of links and pictures, without those of other sites."""
    found = [m[1] or m[2] for m in _LINK.finditer(re.sub(r"`[^`\n]+`", "", prose(text)))]
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """Names that a heading of the page can be linked by, as GitHub makes them."""
    found: set[str] = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))
    for title in re.findall(r"^#{1,6}[ \t]+(.+?)[ \t#]*$", prose(text), re.MULTILINE):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        count = 0
        while (name := f"{slug}-{count}" if count else slug) in found:
            count += 1
        found.add(name)
    return found


def new_files(text: str) -> dict[str, str]:
    """Files that a reader is shown how to write: blocks that begin with `# new file: PATH`, by path."""
    return {m[1]: block for _, block in code_blocks(text) if (m := _NEW_FILE.match(block))}


# --- links and paths


def broken_links(text: str, folder: Path) -> list[str]:
    """Relative links to files, pictures and headings that are not there."""
    faults = []
    for target in links(text):
        name, _, anchor = target.partition("#")
        file = (folder / name) if name else None
        if file is not None and not file.exists():
            faults.append(f"no file {target}")
        elif anchor and (file is None or file.suffix == ".md"):
            if anchor not in anchors(text if file is None else file.read_text(encoding="utf-8")):
                faults.append(f"no heading {target}")
    return faults


def paths(text: str) -> list[str]:
    """Repository paths named in backticks, relative to the root."""
    tops = {p.name for p in ROOT.iterdir()} | {p.rstrip("/") for p in MADE_BY_COMMANDS} | {"studies"}
    found = []
    for span in spans(text):
        first = span.split("::")[0].strip()
        is_path = re.fullmatch(r"\.?[\w.-]+(/[\w.*{},-]*)+", first) and first.split("/")[0] in tops
        if is_path or _TOP_FILES.fullmatch(first):
            found.append(first)
    return found


def missing_paths(text: str) -> list[str]:
    """The paths that are neither in the repository, nor made by a command or by the reader; `*` and `{a,b}` must match
    something."""
    shown = new_files(text)

    def exists(path: str) -> bool:
        braces = re.search(r"\{([^}]*)\}", path)
        if braces:
            return all(exists(path[: braces.start()] + part + path[braces.end() :]) for part in braces[1].split(","))
        if "*" in path:
            return any(ROOT.glob(path))
        return (ROOT / path).exists() or path in shown

    return [p for p in paths(text) if not p.startswith(MADE_BY_COMMANDS) and not exists(p)]


def unreachable(folder: Path = DOCS) -> list[str]:
    """Pages that no chain of links from README.md of their folder leads to."""
    seen, waiting = set(), [folder / "README.md"]
    while waiting:
        page = waiting.pop().resolve()
        if page in seen or not page.is_file():
            continue
        seen.add(page)
        targets = (page.parent / target.partition("#")[0] for target in links(page.read_text(encoding="utf-8")))
        waiting += [target for target in targets if target.suffix == ".md"]
    return [str(page.relative_to(folder)) for page in sorted(folder.rglob("*.md")) if page.resolve() not in seen]


# --- commands


@dataclass(frozen=True)
class Command:
    """A command of the project: `name` is a file of tools/, or an `ovd-…` of pyproject.toml."""

    name: str
    arguments: tuple[str, ...]


def commands(text: str) -> list[Command]:
    """Every `python tools/x.py …`, `torchrun … tools/x.py …` and `ovd-x …` of blocks and backticks."""
    lines = [line for language, block in code_blocks(text) if language in _SHELL for line in joined(block)]
    found = []
    for line in lines + spans(text):
        match = re.search(r"(?:python[\d.]*|\$\(PY\)|torchrun\b.*?)\s+(tools/\S+\.py.*)", line)
        match = match or re.match(r"(?:\$ )?(?:\w+=\S+ )*(?:\S*/)?(ovd-[a-z-]+(?:\s.*)?)$", line.strip())
        if match:
            parts = shlex.split(match[1].replace("…", ""), comments=True)
            stop = next((i for i, p in enumerate(parts) if p in ("|", "&&", ";", ">", "2>&1", "&")), len(parts))
            found.append(Command(parts[0], tuple(parts[1:stop])))
    return found


def joined(block: str) -> list[str]:
    """Lines of a shell block, those that end in a backslash joined with the next."""
    return re.sub(r"\\\n\s*", " ", block).splitlines()


@cache
def console_commands() -> dict[str, str]:
    """What pyproject.toml installs: "module:function" by name."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]


@cache
def help_of(name: str, *subcommand: str) -> str:
    """Text of a command's (or subcommand's) help; "" when there is none."""
    start = [name]
    if name in console_commands():
        module, _, function = console_commands()[name].partition(":")
        start = ["-c", f"import sys; from {module} import {function} as main; sys.exit(main(sys.argv[1:]))"]
    run = subprocess.run([sys.executable, *start, *subcommand, "--help"], capture_output=True, text=True, cwd=ROOT)
    return run.stdout if run.returncode == 0 else ""


def wrong_commands(text: str) -> list[str]:
    """What is wrong with the commands: no such tool, configuration file, option, or choice of an option."""
    return [fault for command in commands(text) for fault in _wrong(command)]


def _wrong(command: Command) -> list[str]:
    name, arguments = command.name, command.arguments
    if not (ROOT / name).is_file() and name not in console_commands():
        return [f"{name}: no such command"]
    answer, faults = help_of(name), []
    if arguments and re.fullmatch(r"[a-z][a-z-]*", arguments[0]):
        below = help_of(name, arguments[0])
        if not below:
            return [f"{name}: no subcommand {arguments[0]}"]
        answer += below
    for i, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if not option.startswith("-"):
            continue
        if not re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", answer):
            faults.append(f"{name}: no option {option}")
            continue
        value = value or next(iter(arguments[i + 1 :]), "")
        if option in ("--config", "--config-file", "--study"):
            if value and not (ROOT / value).is_file() and not value.isupper():  # capitals and … are for the reader
                faults.append(f"{name}: no configuration file {value}")
        elif choices := re.search(rf"{re.escape(option)} (?:\[\s*)?\{{([^}}]*)\}}", answer):
            allowed = "".join(choices[1].split()).split(",")
            if value not in allowed and not value.isupper():
                faults.append(f"{name}: {option} {value} is none of {', '.join(allowed)}")
    return faults


def wrong_overrides(text: str) -> list[str]:
    """The `key=value` of commands with a configuration that the configuration does not know."""
    from ovd.engine.lazy_config import load_config as load_detector_config
    from pretrain.config import load_config

    loaders = dict.fromkeys(("tools/pretrain.py", "tools/plan.py", "ovd-pretrain", "ovd-plan"), load_config)
    loaders |= dict.fromkeys(("tools/train_net.py", "ovd-train"), load_detector_config)
    faults = []
    for command in commands(text):
        config = dict(zip(command.arguments, command.arguments[1:], strict=False)).get("--config", "")
        overrides = [a for a in command.arguments if "=" in a and not a.startswith("-")]
        if command.name in loaders and overrides and (ROOT / config).is_file():
            try:
                loaders[command.name](str(ROOT / config), overrides)
            except ValueError as error:
                faults.append(f"{command.name}: {error}")
    return faults


def missing_targets(text: str, makefile: str | None = None) -> list[str]:
    """`make x` of blocks and backticks without a rule in the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8") if makefile is None else makefile
    rules = set(re.findall(r"^([\w-]+)\s*:(?!=)", makefile, re.MULTILINE))
    places = [line for language, block in code_blocks(text) if language in _SHELL for line in block.splitlines()]
    named = [m[1] for place in places + spans(text) if (m := re.match(r"\s*(?:\$ )?make\s+([a-z][\w-]*)", place))]
    return [name for name in named if name not in rules]


# --- Python


def python_faults(text: str) -> list[str]:
    """Python blocks that do not compile, and names they import that do not exist."""
    shown = {path.removesuffix(".py").replace("/", ".") for path in new_files(text)}
    faults = []
    for code in (block for language, block in code_blocks(text) if language in ("python", "py")):
        try:
            tree = ast.parse(code)
        except SyntaxError as error:
            faults.append(f"line {error.lineno} of a block: {error.msg}")
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                faults += [f"no module {a.name}" for a in node.names if not _has_module(a.name)]
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module not in shown:
                faults += _missing_names(node)
    return faults


def _missing_names(node: ast.ImportFrom) -> list[str]:
    if not _has_module(node.module):
        return [f"no module {node.module}"]
    if node.module.split(".")[0] not in OWN_PACKAGES:
        return []
    module = importlib.import_module(node.module)
    names = [a.name for a in node.names if a.name != "*" and not hasattr(module, a.name)]
    return [f"{node.module} has no {name}" for name in names if not _has_module(f"{node.module}.{name}")]


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


# --- messages, configurations, numbers


@cache
def message_texts() -> tuple[str, ...]:
    """Every text of the source code, values that are filled in replaced by `FIELD`."""
    texts = []
    for folder in ("ovd", "pretrain", "tools", "requirements"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            pieces: set[int] = set()  # of f-strings: no message begins with one; parents are walked before them
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    pieces |= {id(value) for value in node.values}
                    texts.append("".join(v.value if isinstance(v, ast.Constant) else FIELD for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in pieces:
                    texts.append(node.value)
    shell = re.findall(r'echo "error: ([^"]*)"', (ROOT / "Makefile").read_text(encoding="utf-8"))
    texts += [re.sub(r"\$\([^)]*\)", FIELD, message) for message in shell]
    return tuple(message.removeprefix("error: ") for message in texts)


def unknown_errors(text: str) -> list[str]:
    """Quoted messages (lines `> error: …`) that no message of the source begins with; `…` stands for one value."""
    quoted = re.findall(r"^> error: (.+?)\s*$", prose(text), re.MULTILINE)
    wrong = [q for q in quoted if not any(message.startswith(q.removesuffix(FIELD)) for message in message_texts())]
    return wrong + [q for q in quoted if q not in wrong and len(q.replace(FIELD, "")) < _SHORTEST_QUOTE]


def unlisted_configs(text: str) -> list[str]:
    """Configurations that the page names neither in backticks nor in a link."""
    named = {Path(target.partition("#")[0]).name for target in links(text)} | {Path(span).name for span in spans(text)}
    files = [f for folder in CONFIG_FOLDERS for f in sorted((ROOT / folder).iterdir()) if f.is_file()]
    return [str(file.relative_to(ROOT)) for file in files if file.name not in named]


def unlinked_reports(text: str) -> list[str]:
    """Reports of studies that are in the repository, and that the page does not link."""
    named = {Path(target.partition("#")[0]).name for target in links(text)}
    studies = [file.read_text(encoding="utf-8") for file in sorted((ROOT / "configs/studies").glob("*.yaml"))]
    reports = [m[1] for study in studies if (m := re.search(r"^report: (\S+)", study, re.MULTILINE))]
    return [path for path in reports if (ROOT / path).is_file() and Path(path).name not in named]


def numbers_without_source(text: str, folder: Path) -> list[str]:
    """Numbers of two digits or more in a row of a table, that none of the files which the row links has."""
    faults = []
    for row in re.findall(r"^\|.*\|\s*$", prose(text), re.MULTILINE):
        files = [file for target in links(row) if (file := folder / target.partition("#")[0]).is_file()]
        if not files:
            continue
        known = set(_NUMBER.findall(" ".join(file.read_text(encoding="utf-8") for file in files)))
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|`[^`]*`", " ", row)
        used = [number.rstrip(",") for number in _NUMBER.findall(plain)]
        known = {number.replace(",", "") for number in known}
        faults += [f"{n} in {row[:60]}…" for n in used if len(n) > 1 and n.replace(",", "") not in known]
    return faults
