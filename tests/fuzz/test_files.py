"""Tables, shards, annotations, word lists, configurations and archives of strangers: one sentence, never a crash."""

import copy
import io
import json
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ovd.data.lvis import load_lvis
from ovd.data.mapper import _bitmask
from ovd.evaluation.lvis_evaluator import evaluate_results
from ovd.text.vocabulary import Vocabulary
from pretrain.config import ConfigError, DataConfig, load_config
from pretrain.data.npm_archives import Archive
from pretrain.data.pairs import load_pairs
from pretrain.data.shards import ShardSource, expand_shards
from pretrain.parsing import parse_json, parse_yaml

DEEP = "[" * 100_000 + "]" * 100_000
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
JUNK = [None, 5, "x", [], {}, [None], float("nan"), float("inf"), -1, 10**400, True, [1], "\0"]
BOXES = [[1, 1, float("nan"), 4], [1, 1, -4, 4], ["a"] * 4, [None] * 4, [1, 1, 0, 0], [1e308] * 4, [[1]] * 4]
MASKS = [
    [[1, 1, 2, 2]], [[1, 1, 2, 2, 3]], [["a"] * 6], [[float("nan")] * 6], [[1e9] * 6], {"size": [10, 10]},
    *({"counts": counts, "size": size} for counts, size in (
        ([5], [10, 10]), ([10**9], [10, 10]), ("0d0", [10**5, 10**5]), ([100], [3, 3]), ([9], [3, 3]), ("zz", [10, 10]),
        ([-5, 105], [10, 10]), ("\u20ac", [10, 10]), (5, [10, 10]), ("abc", "x"), ("P", [10, 10]), (None, [10, 10]),
    )),
]  # fmt: skip
TRUTH = {
    "images": [
        {"id": 1, "width": 10, "height": 10, "file_name": "a.png", "neg_category_ids": [],
         "not_exhaustive_category_ids": []}
    ],
    "categories": [{"id": 1, "name": "x", "frequency": "f", "synonyms": ["x"]}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4], "area": 16,
         "segmentation": [[1, 1, 5, 1, 5, 5]]}
    ],
}  # fmt: skip
DETECTION = {"image_id": 1, "category_id": 1, "score": 0.5, "bbox": [1, 1, 4, 4],
             "segmentation": {"size": [10, 10], "counts": "T3"}}  # fmt: skip


def places(value: dict) -> list[tuple]:
    found = [(key,) for key in value] + [(key, 0) for key in value]
    return found + [(key, 0, field) for key in value for field in value[key][0]]


def changes():
    for place in places(TRUTH):
        for junk in [*JUNK, *(BOXES if place[-1] == "bbox" else []), *(MASKS if place[-1] == "segmentation" else [])]:
            content = copy.deepcopy(TRUTH)
            above = content
            for key in place[:-1]:
                above = above[key]
            above[place[-1]] = junk
            yield place, content
        if isinstance(place[-1], str):
            content = copy.deepcopy(TRUTH)
            above = content
            for key in place[:-1]:
                above = above[key]
            del above[place[-1]]
            yield place, content


def attempt(call, *documented: type[Exception]) -> None:
    try:
        call()
    except documented as error:
        assert str(error) and "\n" not in str(error)


def test_annotations_with_one_wrong_value_are_read_or_refused(tmp_path):
    path = tmp_path / "truth.json"
    for place, content in changes():
        path.write_text(json.dumps(content))
        content = json.loads(path.read_text())  # no object is shared
        try:
            attempt(lambda: load_lvis(path, tmp_path), ValueError)
            for kind in ("bbox", "segm"):
                attempt(lambda: evaluate_results(content, [DETECTION], kind), ValueError)  # noqa: B023
        except Exception as error:
            raise AssertionError(f"{place} {content}") from error


def test_results_with_one_wrong_value_are_measured_or_refused():
    for field in DETECTION:
        for junk in [*JUNK, *BOXES, *MASKS]:
            for kind in ("bbox", "segm"):
                attempt(lambda: evaluate_results(TRUTH, [DETECTION, {**DETECTION, field: junk}], kind), ValueError)  # noqa: B023
    for results in (None, 5, [5], [None], {}, "", [[]]):
        with pytest.raises((ValueError, OSError)):
            evaluate_results(TRUTH, results)


@pytest.mark.parametrize("mask", MASKS)
def test_masks_that_lie_about_their_size_are_not_decoded(mask):
    with pytest.raises(ValueError):
        _bitmask({"id": 1, "segmentation": mask}, (10, 10))


@pytest.mark.parametrize("content", [DEEP, "", "{", '{"images": [{"id": ' + "9" * 5000 + "}]}", "\ud800", "nul", "[1"])
def test_annotation_and_word_files_that_are_no_json_are_one_sentence(content, tmp_path):
    path = tmp_path / "words.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    for read in (lambda: load_lvis(path, tmp_path), lambda: Vocabulary.parse(path), lambda: evaluate_results(path, [])):
        with pytest.raises(ValueError) as caught:
            read()
        assert "\n" not in str(caught.value)


@given(content=JSON)
def test_any_json_is_a_vocabulary_or_one_sentence(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.json"
    for value in (content, {"categories": content}, {"categories": [content]}):
        path.write_text(json.dumps(value))
        attempt(lambda: Vocabulary.parse(path), ValueError)


@given(words=st.one_of(st.text(max_size=50), st.lists(st.text(max_size=20), max_size=5), st.integers(), st.none()))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_text_is_words_or_one_sentence(words):
    attempt(lambda: Vocabulary.parse(words), ValueError)


def test_impossible_names_of_word_lists_are_one_sentence():
    for name in ("a" * 10_000 + ".txt", "a\0b.txt", "/dev.txt"):
        with pytest.raises(ValueError):
            Vocabulary.parse(name)


TABLES = [
    "", "image,caption\n", "image,caption\na.png\n", 'image,caption\n"a.png,x\n', "image,caption\na.png,x,more,still\n",
    "image,caption\na.png," + "x" * 200_000, "image,image,caption\na,b,c\n", "image,caption\na\0.png,x\n", "\0",
    "image,caption\n/dev/zero,x\n", "image,caption\n../../etc/passwd,x\n", "image,caption\n,\n",
    "image,caption\ncaf\xe9,x",
]  # fmt: skip


@pytest.mark.parametrize("preload", [False, True])
@pytest.mark.parametrize("text", TABLES)
def test_broken_rows_of_a_table_are_left_out_or_one_sentence(text, preload, tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode("latin-1"))
    attempt(lambda: load_pairs(DataConfig(table=str(path), train_split=None, preload=preload), []), ConfigError)


def test_a_table_with_a_byte_order_mark_and_one_that_is_no_parquet(tmp_path):
    (tmp_path / "t.csv").write_bytes("\ufeffimage,caption\na.png,x\n".encode())
    assert len(load_pairs(DataConfig(table=str(tmp_path / "t.csv"), train_split=None), []).training) == 1
    (tmp_path / "t.parquet").write_bytes(b"PAR1junkPAR1")
    pytest.importorskip("pandas", reason="Parquet is an extra")
    with pytest.raises(ConfigError, match="Parquet"):
        load_pairs(DataConfig(table=str(tmp_path / "t.parquet")), [])


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20)).save(buffer, "JPEG")
    return buffer.getvalue()


def member(name: str, content: bytes = b"", **changes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in changes.items():
        setattr(info, key, value)
    return info, content


def tar(*members: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=tarfile.PAX_FORMAT) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def read_shard(path) -> list[str]:
    """Captions of the pairs that a shard gives; other errors than the documented ones pass through."""
    try:
        source = ShardSource([path], ["txt", "caption"])
    except ConfigError:
        return []
    captions = []
    for index in range(len(source)):
        try:
            picture, row = source.read(index)
            picture.resize((4, 4))
            captions += row["captions"]
        except OSError as error:
            assert "\n" not in str(error)
    return captions


def shards() -> dict[str, bytes]:
    picture, chain, liar = jpeg(), tarfile.TarInfo("x"), tarfile.TarInfo("huge.jpg")
    chain.type, liar.size = b"x", 2**40
    long_name = tarfile.TarInfo("long")
    long_name.type, long_name.size = b"L", 2**36
    found = {
        "huge member": liar.tobuf() + bytes(2000),
        "huge name": long_name.tobuf(tarfile.GNU_FORMAT) + bytes(2048),
        "chain of headers": chain.tobuf() * 3000,
        "links": tar(member("a.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"), member("a.txt", b"x"),
                     member("b.jpg", type=tarfile.LNKTYPE, linkname="/etc/passwd"), member("b.txt", b"x")),
        "device": tar(member("a.jpg", type=tarfile.CHRTYPE), member("a.txt", b"x")),
        "deep JSON": tar(member("a.jpg", picture), member("a.json", DEEP.encode())),
        "repeated": tar(member("a.jpg", picture), member("a.jpg", b"x"), member("a.txt", b"x")),
        "no UTF-8": tar(member("a.jpg", picture), member("a.txt", b"\xff\xfe")),
        "long text": tar(member("a.jpg", picture), member("a.txt", b"x" * (2**24 + 1))),
    }  # fmt: skip
    headers = {"size": ["-5", "-1024", "-1536", "9" * 30], "GNU.sparse.map": ["0,x"], "GNU.sparse.size": ["z"]}
    for key, values in headers.items():
        for value in values:
            found[f"{key} {value}"] = tar(member("a.jpg", b"12345", pax_headers={key: value}))
    return found


@pytest.mark.parametrize("name", sorted(shards()))
def test_no_shard_leads_the_reader_astray(name, tmp_path):
    (tmp_path / "s.tar").write_bytes(shards()[name])
    assert read_shard(tmp_path / "s.tar") == []


def test_members_with_paths_outside_are_read_in_place_and_written_nowhere(tmp_path):
    picture, inner = jpeg(), tmp_path / "inner"
    inner.mkdir()
    members = [member("../up.jpg", picture), member("../up.txt", b"up"), member("/abs.jpg", picture)]
    (inner / "s.tar").write_bytes(tar(*members, member("/abs.txt", b"abs"), member("x/y.jpg", picture)))
    assert read_shard(inner / "s.tar") == ["up", "abs"]
    (inner / "p.tgz").write_bytes(
        tar(member("package/../../up.txt", b"up"), member("package/a.txt", b"a"),
            member("package/l.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd"), mode="w:gz")
    )  # fmt: skip
    archive = Archive(inner / "p.tgz")
    assert "l.txt" not in archive.names() and archive.read("a.txt") == b"a"
    assert [path.name for path in tmp_path.iterdir()] == ["inner"]


def test_truncated_and_changed_shards_give_what_is_whole(tmp_path):
    content = tar(member("a.jpg", jpeg()), member("a.txt", b"one"), member("b.jpg", jpeg()), member("b.txt", b"two"))
    random = np.random.default_rng(0)
    path = tmp_path / "s.tar"
    for length in range(0, len(content), 500):
        path.write_bytes(content[:length])
        assert read_shard(path) == ["one", "two"][: len(read_shard(path))]
    for _ in range(60):
        broken = bytearray(content)
        for place in random.integers(0, 2000, 5):
            broken[place] = random.integers(256)
        path.write_bytes(broken)
        read_shard(path)


@pytest.mark.parametrize("pattern", ["{1..1000000000000}.tar", "{0..99999999}.tar", "{a,b}" * 40, "\0.tar"])
def test_patterns_of_too_many_shards_are_one_sentence(pattern):
    with pytest.raises(ConfigError):
        expand_shards(pattern)


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
YAML = [BOMB, "a: &a [*a]", "a: !!python/object/apply:os.system ['true']", "[" * 1500, "5", "a: [", "? [a]\n: b", "\0",
        "a: 2000-99-99", "parent: config.yaml", "parent: 5", "parent: [a]", "phases: 5", "data: [x]"]  # fmt: skip


@pytest.mark.parametrize("text", YAML)
def test_configurations_of_strangers_are_one_sentence(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "config.yaml")
    assert "\n" not in str(caught.value)


@given(text=st.one_of(st.text(max_size=40), st.text("[]{}&*a:!?-,\n \"'|>%#", max_size=40)))
def test_any_text_is_parsed_or_one_sentence(text):
    attempt(lambda: parse_json(text), ValueError)
    attempt(lambda: parse_yaml(text), ValueError)
