"""README.md and the pages of docs/ say what is so: every check of `documentation_checks` on each, and on wrong texts.

That the code of the pages does what they say is tested in `test_documentation_examples.py`.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_SPECIFICATION = importlib.util.spec_from_file_location(
    "documentation_checks", Path(__file__).with_name("documentation_checks.py")
)
checks = sys.modules["documentation_checks"] = importlib.util.module_from_spec(_SPECIFICATION)
_SPECIFICATION.loader.exec_module(checks)

README, DOCS = ROOT / "README.md", checks.DOCS
PAGES = [README, *sorted(DOCS.glob("**/*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


# --- the pages


@every_page
def test_links_pictures_and_headings_are_there(page):
    assert checks.broken_links(read(page), page.parent) == []


@every_page
def test_paths_are_there(page):
    assert checks.missing_paths(read(page)) == []


@every_page
def test_commands_are_ones_the_tools_understand(page):
    assert checks.wrong_commands(read(page)) == []
    assert checks.missing_targets(read(page)) == []


@every_page
def test_overrides_are_fields_of_their_configuration(page):
    assert checks.wrong_overrides(read(page)) == []


@every_page
def test_python_compiles_and_imports_what_exists(page):
    assert checks.python_faults(read(page)) == []


@every_page
def test_quoted_errors_are_messages_of_the_source(page):
    assert checks.unknown_errors(read(page)) == []


def test_recipes_lists_every_configuration_and_report():
    text = read(DOCS / "recipes.md")
    assert checks.unlisted_configs(text) == []
    assert checks.unlinked_reports(text) == [], "there are results now: link them, and remove 'not yet measured'"


def test_numbers_of_recipes_are_those_of_the_files_they_link():
    assert checks.numbers_without_source(read(DOCS / "recipes.md"), DOCS) == []


def test_every_page_is_reached_from_the_first():
    assert checks.unreachable(DOCS) == []
    assert "docs/README.md" in checks.links(read(README))


# --- the checks themselves

CORRECT = """
# A title, with `code`!
See `ovd/detector.py`, `tools/demo.py::main`, `runs/mine/x.csv`, `configs/pretrain/*.yaml`,
`ovd/{detector,detections}.py`, `docs/none.py`, [licence](LICENSE), [up](#a-title-with-code),
[web](https://example.org), [told](README.md#what-was-measured), `a/b`, `f/c`, `LICENSE`. Run `make test`, then
`python tools/demo.py --input a.jpg`.
```bash
make demo   # all
python tools/pretrain.py --config configs/pretrain/reclip_mini.yaml run.output=runs/x
.venv/bin/python tools/prepare_data.py mini \\
    --root data/mini --full | tee log --verbose
OMP_NUM_THREADS=1 .venv/bin/torchrun --nproc-per-node 2 tools/train_net.py --config FILE --eval-only
.venv/bin/ovd-demo --input a --save json --vocabulary "b, c"
```
```python
import numpy as np
from ovd import OpenVocabularyDetector
from docs.none import anything
detector = OpenVocabularyDetector.from_pretrained("mini")
```
```python
# new file: docs/none.py
from .common import model
```
> error: picture … is … x … pixels, its annotation says
"""


def test_a_correct_text_has_no_faults():
    assert checks.broken_links(CORRECT, ROOT) == [] and checks.missing_paths(CORRECT) == []
    assert checks.wrong_commands(CORRECT) == [] and checks.wrong_overrides(CORRECT) == []
    assert checks.missing_targets(CORRECT) == [] and checks.python_faults(CORRECT) == []
    assert checks.unknown_errors(CORRECT) == []


def test_commands_are_found_and_cut_as_a_shell_does():
    found = [(command.name, command.arguments) for command in checks.commands(CORRECT)]
    assert found[1] == ("tools/prepare_data.py", ("mini", "--root", "data/mini", "--full"))
    assert found[2] == ("tools/train_net.py", ("--config", "FILE", "--eval-only"))
    assert found[3] == ("ovd-demo", ("--input", "a", "--save", "json", "--vocabulary", "b, c"))
    assert found[4] == ("tools/demo.py", ("--input", "a.jpg")) and len(found) == 5


MINI, LVIS = "configs/pretrain/reclip_mini.yaml", "configs/ovd/mini_lvis.py"


@pytest.mark.parametrize(
    ("check", "text", "fault"),
    [
        ("missing_paths", "`ovd/nothing.py`", "ovd/nothing.py"),
        ("missing_paths", "`configs/ovd/*.toml`", "configs/ovd/*.toml"),
        ("missing_paths", "`ovd/{detector,nothing}.py`", "ovd/{detector,nothing}.py"),
        ("missing_paths", "`studies/nothing.md`", "studies/nothing.md"),
        ("missing_paths", "`NOTHING.md`", "NOTHING.md"),
        ("wrong_commands", "`python tools/nothing.py`", "tools/nothing.py: no such command"),
        ("wrong_commands", "`ovd-nothing --input a`", "ovd-nothing: no such command"),
        ("wrong_commands", "```\npython tools/demo.py --vocabluary b\n```", "tools/demo.py: no option --vocabluary"),
        ("wrong_commands", "```\nX=1 .venv/bin/ovd-web --hots x\n```", "ovd-web: no option --hots"),
        ("wrong_commands", "`torchrun --nnodes 2 tools/train_net.py --gpus 3`", "tools/train_net.py: no option --gpus"),
        ("wrong_commands", "`python tools/prepare_data.py mini --seeds 3`", "tools/prepare_data.py: no option --seeds"),
        ("wrong_commands", "`python tools/prepare_data.py lvis --full`", "tools/prepare_data.py: no option --full"),
        ("wrong_commands", "`python tools/benchmark.py trian`", "tools/benchmark.py: no subcommand trian"),
        ("wrong_commands", "`python tools/evaluate.py --task imagnet`", "tools/evaluate.py: --task imagnet is none of"),
        (
            "wrong_commands",
            "`python tools/plan.py --config=none.yaml`",
            "tools/plan.py: no configuration file none.yaml",
        ),
        ("wrong_overrides", f"`python tools/pretrain.py --config {MINI} run.devise=cpu`", "run.devise"),
        ("wrong_overrides", f"`python tools/pretrain.py --config {MINI} run.device=cup`", "run.device is 'cup'"),
        ("wrong_overrides", f"`python tools/train_net.py --config {LVIS} train.max_itre=1`", "train.max_itre"),
        ("wrong_overrides", f"```\novd-train --config {LVIS} data.nothing=1\n```", "data.nothing"),
        ("missing_targets", "`make fly`", "fly"),
        ("missing_targets", "```\n$ make soar\n```", "soar"),
        ("python_faults", "```python\nx = (\n```", "never closed"),
        ("python_faults", "```python\nfrom ovd import Nothing\n```", "ovd has no Nothing"),
        ("python_faults", "```python\nimport pretrain.nothing\n```", "no module pretrain.nothing"),
        ("unknown_errors", "> error: picture … is … x … pixels, the annotation says", "the annotation says"),
        ("unknown_errors", "> error: megapixels, the limit", "megapixels, the limit"),
        ("unknown_errors", "> error: … is …", "… is …"),
        ("unlisted_configs", "`configs/pretrain/reclip_mini.yaml`", "configs/ovd/mini_lvis.py"),
    ],
)
def test_a_wrong_text_has_its_fault(check, text, fault):
    assert any(fault in found for found in getattr(checks, check)(text))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[x](none.md)", "no file none.md"),
        ("![x](../assets/none.png)", "no file ../assets/none.png"),
        ('<img src="none.png">', "no file none.png"),
        ("[x](../README.md#nowhere)", "no heading ../README.md#nowhere"),
        ("# Here\n[x](#there)", "no heading #there"),
        ("# Twice\n# Twice\n[x](#twice-1) [y](#twice-2)", "no heading #twice-2"),
    ],
)
def test_a_broken_link_is_found(text, fault):
    assert checks.broken_links(text, DOCS) == [fault]


def test_a_number_that_the_linked_file_does_not_have_is_found(tmp_path):
    (tmp_path / "source.md").write_text("12.5 % in 1,800 steps")
    right = "| [a](source.md) | 12.5 % | 1800 steps |\n"
    assert checks.numbers_without_source(right, tmp_path) == []
    assert len(checks.numbers_without_source(right + "| [b_64.md](source.md) | 12.6 % | `99` |\n", tmp_path)) == 1


def test_a_page_that_nothing_links_is_found(tmp_path):
    (tmp_path / "README.md").write_text("[a](a.md)")
    for name, text in (("a.md", "[b](more/b.md#x)"), ("orphan.md", "[a](a.md)"), ("more/b.md", "# x")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert checks.unreachable(tmp_path) == ["orphan.md"]


def test_a_report_that_is_there_must_be_linked(tmp_path, monkeypatch):
    (tmp_path / "configs/studies").mkdir(parents=True)
    (tmp_path / "configs/studies/a.yaml").write_text("title: A\nreport: studies/a.md\n")
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    assert checks.unlinked_reports("") == []
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies/a.md").write_text("# A")
    assert checks.unlinked_reports("") == ["studies/a.md"] and checks.unlinked_reports("[a](../studies/a.md)") == []
