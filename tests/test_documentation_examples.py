"""The code of docs/ does what the pages say: it is written, applied and run here as it stands there."""

import ast
import importlib
import importlib.util
import inspect
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def load(path: str, name: str) -> ModuleType:
    """A file beside this one: test folders are no packages."""
    specification = importlib.util.spec_from_file_location(name, Path(__file__).parent / path)
    module = sys.modules[name] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


checks = load("documentation_checks.py", "documentation_checks")
_PRETRAINING = load("pretrain/conftest.py", "pretrain_fixtures")
_one_thread, model, model_config = _PRETRAINING._one_thread, _PRETRAINING.model, _PRETRAINING.model_config
pairs_table, run_config = _PRETRAINING.pairs_table, _PRETRAINING.run_config
image_text_folder = load("ovd/conftest.py", "ovd_fixtures").image_text_folder

EXTEND, DATA, START = (checks.DOCS / name for name in ("extend.md", "data.md", "quick_start.md"))
SHOWN = checks.new_files(EXTEND.read_text(encoding="utf-8"))
OBJECTIVE, CONFIG = "pretrain/objectives/siglip.py", "configs/pretrain/siglip_mini.yaml"
TESTS, HEAD = "tests/pretrain/objectives/test_siglip.py", "ovd/modeling/two_crops_head.py"


def changed(path: str) -> str:
    """The source of a file with the page's changes: blocks of diff that begin with `--- PATH`."""
    source = (ROOT / path).read_text(encoding="utf-8")
    blocks = [code for language, code in checks.code_blocks(EXTEND.read_text(encoding="utf-8")) if language == "diff"]
    hunks = [lines[1:] for code in blocks if (lines := code.splitlines())[0] == f"--- {path}"]
    assert hunks, f"the page does not change {path}"
    for lines in hunks:
        before, after = ("\n".join(line[1:] for line in lines if line[:1] in kinds) for kinds in (" -", " +"))
        assert source.count(before) == 1, f"{path} no longer has:\n{before}"
        source = source.replace(before, after)
    return source


def as_module(name: str, source: str, monkeypatch) -> ModuleType:
    """Import a source under a name for the length of a test."""
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(source, name, "exec"), module.__dict__)
    return module


@pytest.fixture
def siglip(monkeypatch) -> ModuleType:
    """The objective of the page, known by its name."""
    import pretrain.objectives

    module = as_module("pretrain.objectives.siglip", SHOWN[OBJECTIVE], monkeypatch)
    known: dict = {"__name__": "pretrain.objectives"}
    exec(compile(changed("pretrain/objectives/__init__.py"), "pretrain.objectives", "exec"), known)
    monkeypatch.setattr(pretrain.objectives, "OBJECTIVES", known["OBJECTIVES"])
    return module


@pytest.mark.parametrize("name", re.findall(r"^def (test_\w+)", SHOWN[TESTS], re.MULTILINE))
def test_the_tests_of_the_objective_pass(name, siglip, request, monkeypatch):
    function = getattr(as_module("shown_tests", SHOWN[TESTS], monkeypatch), name)
    function(**{fixture: request.getfixturevalue(fixture) for fixture in inspect.signature(function).parameters})


def test_the_configuration_of_the_objective_trains(siglip, pairs_table, tmp_path):
    from pretrain.config import load_config
    from pretrain.engine.train import Trainer

    shutil.copytree(ROOT / "configs/pretrain", tmp_path / "configs")
    path = tmp_path / "configs" / Path(CONFIG).name
    path.write_text(SHOWN[CONFIG])
    small = "[{steps: 2, image_size: 32, context_length: 8, batch_size: 12, micro_batch_size: 6}]"
    overrides = [f"data.table={pairs_table}", "data.backgrounds=null", "data.workers=0", "evaluation.splits=[val]"]
    config = load_config(path, [*overrides, f"phases={small}", f"run.output={tmp_path / 'run'}", "run.device=cpu"])
    trainer = Trainer(config)
    trainer.train()
    assert type(trainer.objective) is siglip.SigLIP and trainer.objective.options.bias == -5.0


@pytest.fixture
def two_crops(monkeypatch) -> ModuleType:
    """`ovd.modeling.rcnn` with the page's changes."""
    importlib.import_module("ovd.detector")  # all that the page does not change keeps the modules as they are
    as_module("ovd.modeling.two_crops_head", SHOWN[HEAD], monkeypatch)
    as_module("ovd.modeling.detector_config", changed("ovd/modeling/detector_config.py"), monkeypatch)
    return as_module("ovd.modeling.rcnn", changed("ovd/modeling/rcnn.py"), monkeypatch)


@torch.no_grad()
def test_the_scoring_part_is_built_by_its_name_and_scores(two_crops, image_text_folder):
    small = {"image_size": 160, "pyramid_channels": 16, "box_fc_dim": 32, "box_conv_dim": 16, "mask_conv_dim": 16}
    torch.manual_seed(0)
    model = two_crops.build_detector({**small, "vlm_mode": "two_crops"}, image_text_folder).eval()
    head, images = model.roi_heads.image_text_head, torch.randn(1, 3, 160, 160)
    assert type(head).__name__ == "TwoCropsHead"
    regions = head.embed_regions(images, [torch.tensor([[10.0, 20.0, 60.0, 90.0], [0.0, 0.0, 160.0, 160.0]])])
    torch.testing.assert_close(regions.norm(dim=1), torch.ones(2))
    words, order = torch.randn(3, 64), torch.tensor([2, 0, 1])
    scores = []
    for rows in (words, words[order]):
        model.set_text_embeddings(rows)
        parts = model.inference([{"image": torch.full((3, 160, 160), 90, dtype=torch.uint8)}], return_parts=True)
        scores.append(parts[0]["parts"].image_text[:, 1:])
    torch.testing.assert_close(scores[1], scores[0][:, order])


def run_blocks(page: Path, monkeypatch, folder: Path) -> dict:
    """Run the Python blocks of a page that write no file, one after the other; returns what they name."""
    monkeypatch.chdir(folder)
    names: dict = {"__name__": "page"}
    for language, code in checks.code_blocks(page.read_text(encoding="utf-8")):
        if language == "python" and not code.startswith("# new file:"):
            exec(compile(ast.parse(code), str(page), "exec"), names)
    return names


@pytest.mark.parametrize("page", [EXTEND, START], ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page, two_crops, monkeypatch):
    found = run_blocks(page, monkeypatch, ROOT)["detections"]
    assert {"coat", "bell"} >= set(found.names) and len(found.boxes) >= 1


def test_the_configuration_for_boxes_without_masks_loads(tmp_path):
    from ovd.engine.lazy_config import load_config

    files = checks.new_files(DATA.read_text(encoding="utf-8"))
    shown = {path: content for path, content in files.items() if path.startswith("configs/ovd/")}
    shutil.copytree(ROOT / "configs/ovd", tmp_path / "ovd")
    assert len(shown) == 1
    for path, content in shown.items():
        (tmp_path / "ovd" / Path(path).name).write_text(content)
        config = load_config(tmp_path / "ovd" / Path(path).name, ["train.batch_size=16"])
        assert config.data.train.mapper.with_masks is False and config.model.architecture.mask_on is False
