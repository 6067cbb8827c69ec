"""The run folder's metrics."""

import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.engine.run_folder import RunFolder, git_revision, trim_metrics


def test_metrics_go_to_lines_and_to_tensorboard(tmp_path):
    folder = RunFolder(tmp_path / "run", "a: 1\n")
    folder.log(1, loss=2.5, phase="small")
    folder.log(2, loss=1.5, phase="small")
    folder.close()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 2.5, "phase": "small"}, {"step": 2, "loss": 1.5, "phase": "small"}]
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 2.5), (2, 1.5)]


def test_trimming_drops_later_steps_and_a_cut_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = '{"step": 1}\n{"step": 2, "loss": 1}\n{"step": 2, "top1": 0}\n'
    path.write_text(kept + '{"step": 3}\n{"no": 1}\n{"step": 2, "lo')
    trim_metrics(path, 2)
    assert path.read_text() == kept
    trim_metrics(tmp_path / "gone.jsonl", 2)
    assert not (tmp_path / "gone.jsonl").exists()


def test_outside_a_repository_the_revision_is_unknown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert git_revision() == "unknown"
