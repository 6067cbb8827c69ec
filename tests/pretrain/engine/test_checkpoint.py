"""Resumable states: whole or absent, loaded without running code."""

import os
import pickle

import pytest
import torch

from pretrain.engine.checkpoint import STATE_FILE, load_state, save_state
from pretrain.modeling.checkpoint import CheckpointError

STATE = {"step": 3, "weights": {"a": torch.arange(4.0)}, "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}], "config": "x"}


def test_a_state_comes_back_as_it_was(tmp_path):
    save_state(tmp_path, STATE)
    back = load_state(tmp_path)
    assert torch.equal(back["weights"].pop("a"), STATE["weights"]["a"])
    assert back == {**STATE, "weights": {}}
    assert [p.name for p in tmp_path.iterdir()] == [STATE_FILE]


def test_no_state_is_none(tmp_path):
    assert load_state(tmp_path) is None and load_state(tmp_path / "nowhere") is None


def test_a_cut_state_is_named_with_the_remedy(tmp_path):
    save_state(tmp_path, STATE)
    content = (tmp_path / STATE_FILE).read_bytes()
    (tmp_path / STATE_FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=f"{tmp_path}/state.pt cannot be read; delete it to start again"):
        load_state(tmp_path)


def test_a_state_that_would_run_code_is_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "broken_in"),)

    torch.save({"step": Attack()}, tmp_path / STATE_FILE, pickle_module=pickle)
    with pytest.raises(CheckpointError):
        load_state(tmp_path)
    assert not (tmp_path / "broken_in").exists()


def test_an_interrupted_write_keeps_the_previous_state(tmp_path, monkeypatch):
    save_state(tmp_path, STATE)

    def no_space(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError):
        save_state(tmp_path, {**STATE, "step": 4})
    assert load_state(tmp_path)["step"] == 3
