"""Files are complete or absent, readable as ordinary new files are, and killed writers' leftovers go away."""

import os
import stat

import pytest

from pretrain.atomic import remove_leftovers, replacing, write_atomically


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_atomically(tmp_path / "a", "old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_a_file_has_the_permissions_of_an_ordinary_new_one(tmp_path):
    (tmp_path / "ordinary").touch()
    with replacing(tmp_path / "a") as temporary:
        temporary.touch(mode=0o600)  # as safetensors does
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "a")}
    assert len(modes) == 1


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    for name in (".state.pt.123.part", ".hidden", "state.pt", "x.part"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "state.pt", "x.part"]
