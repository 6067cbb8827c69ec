"""Flat hit@K on toy cases, against sets, and through the command line."""

import csv
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from pretrain.config import ConfigError
from pretrain.data.folder import read_table
from pretrain.evaluation.hit_at_k import HITS, hit_at_k, label_rows, pad_labels, read_synonyms
from pretrain.evaluation.tasks import describe
from pretrain.modeling.checkpoint import save_checkpoint

TOOL = Path(__file__).resolve().parents[3] / "tools" / "evaluate.py"


def found(scores, class_of, labels, ks=(1, 2, 3)):
    hits = hit_at_k(torch.tensor(scores), torch.tensor(class_of), pad_labels(labels), ks)
    return [hits[k].tolist() for k in ks]


def test_a_hit_is_a_label_among_the_best():
    scores = [[0.9, 0.5, 0.1], [0.1, 0.9, 0.5]]
    assert found(scores, [0, 1, 2], [[1], [0]]) == [[0, 0], [1, 0], [1, 1]]


def test_synonyms_of_a_class_take_one_place():
    """Class 0 has the three best names; a list of names would find class 1 fourth."""
    scores = [[0.9, 0.8, 0.7, 0.6, 0.5]]
    assert found(scores, [0, 0, 0, 1, 2], [[1]]) == [[0], [1], [1]]
    assert found(scores, [0, 0, 0, 1, 2], [[2]]) == [[0], [0], [1]]


def test_the_best_of_a_classs_names_counts():
    assert found([[0.2, 0.5, 0.9]], [1, 0, 1], [[1]], ks=(1,)) == [[1]]


def test_one_of_several_labels_is_enough_and_padding_is_no_label():
    scores = [[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.9, 0.5, 0.1]]
    assert pad_labels([[2, 0], [2], []]).tolist() == [[2, 0], [2, -1], [-1, -1]]
    assert found(scores, [0, 1, 2], [[2, 0], [2], []]) == [[1, 0, 0], [1, 0, 0], [1, 1, 0]]


def test_it_agrees_with_sets_of_the_best_classes():
    generator = torch.Generator().manual_seed(0)
    scores, class_of = torch.randn(40, 30, generator=generator), torch.arange(30) % 12
    labels = [torch.randperm(12, generator=generator)[: 1 + i % 3].tolist() for i in range(40)]
    hits = hit_at_k(scores, class_of, pad_labels(labels), HITS)
    for row, own in enumerate(labels):
        ranked = list(dict.fromkeys(int(class_of[i]) for i in scores[row].argsort(descending=True)))
        for k in HITS:
            assert hits[k][row] == bool(set(own) & set(ranked[:k]))


def test_a_label_that_is_no_class_is_refused():
    with pytest.raises(ValueError, match="labels from -1 to 3 with 3 classes: use 0 to 2, and -1 for no label"):
        found([[0.1, 0.2, 0.3]] * 2, [0, 1, 2], [[3], []])
    with pytest.raises(ValueError, match="labels from -2"):
        found([[0.1, 0.2, 0.3]], [0, 1, 2], [[-2]])


def test_rows_give_labels_and_say_what_is_left_out():
    table = [
        {"image": "a", "labels": "cat| dog", "split": "val"},
        {"image": "b", "labels": "", "split": "val"},
        {"image": "c", "labels": "eel", "split": "train"},
    ]
    data = label_rows(table[:2], table, "labels")
    assert (data.images, data.labels, data.left_out) == (["a"], [[0, 1]], 1)
    assert data.names == [["cat"], ["dog"], ["eel"]]
    synonyms = {"dog": ["dog", "hound"], "cat": ["cat"]}
    assert label_rows(table[:2], table, "labels", synonyms).labels == [[1, 0]]
    with pytest.raises(ConfigError, match="1 labels of column 'labels' have no names, e.g. 'eel'"):
        label_rows(table, table, "labels", synonyms)
    with pytest.raises(ConfigError, match="--labels words: the table has no such column; it has image, labels, split"):
        label_rows(table, table, "words")
    with pytest.raises(ConfigError, match="no row has a label"):
        label_rows(table[1:2], table, "labels")


def test_names_are_read_from_text_and_json(tmp_path):
    (tmp_path / "names.txt").write_text("n1\tcat|puss\n\nn2\tdog\n")
    (tmp_path / "names.json").write_text('{"n1": ["cat", "puss"], "n2": "dog"}')
    for name in ("names.txt", "names.json"):
        assert read_synonyms(tmp_path / name) == {"n1": ["cat", "puss"], "n2": ["dog"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("n.txt", "cat\n", 'must hold "class<TAB>name|name" lines'),
        ("n.json", "[1]", "or JSON {class: .names.}"),
        ("n.json", "{", "must hold"),
        ("n.json", '{"a": [1]}', "must hold"),
        ("n.txt", "n1\t|\n", "class 'n1' has no name"),
        ("n.txt", "\n", "names no class"),
    ],
)
def test_a_file_of_names_that_cannot_be_used_says_why(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_synonyms(tmp_path / name)
    with pytest.raises(ConfigError, match="no file of class names at"):
        read_synonyms(tmp_path / "absent.txt")


@pytest.fixture
def run(tmp_path, model, model_config, pairs_table, monkeypatch, capsys):
    """The tool in this process, on one checkpoint: `run("--task", "hits", …)` returns its JSON."""
    folder = save_checkpoint(tmp_path / "checkpoint", model, model_config)

    def call(*arguments):
        monkeypatch.setattr(sys, "path", list(sys.path))  # the tool changes its first entry
        main = runpy.run_path(str(TOOL))["main"]
        given = ("--checkpoint", folder, "--quiet", "--json", "--device", "cpu", *arguments)
        assert main([str(part) for part in given]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return call


def test_with_one_label_and_one_name_it_is_top_1_and_top_5(run, pairs_table):
    given = ("--table", pairs_table, "--split", "val", "--image-size", 32)
    hits, classified = run("--task", "hits", *given), run("--task", "table", *given)
    assert hits["hit_at_1"] == pytest.approx(classified["top1"])
    assert hits["hit_at_5"] == pytest.approx(classified["top5"])
    assert hits["hit_at_10"] >= hits["hit_at_5"] >= hits["hit_at_2"] >= hits["hit_at_1"]
    assert (hits["classes"], hits["names"], hits["labels"], hits["chance"]) == (12, 12, "caption", 1 / 12)
    first, second = describe(hits).splitlines()
    assert first == "12 images of split val, 1.00 labels each, 12 classes with 12 names"
    assert second.startswith("hit@1 ") and second.endswith("chance 8.33%")


def test_many_labels_and_synonyms_come_from_column_and_file(run, pairs_table, tmp_path):
    rows = read_table(pairs_table)
    table, names = pairs_table.parent / "many.csv", tmp_path / "names.json"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "labels", "split"])
        for row in rows:
            writer.writerow([row["image"], row["caption"], row["caption"].replace(" ", "|"), row["split"]])
    words = {word: [word] for word in ("green", "blue", "yellow", "circle", "square", "triangle")}
    names.write_text(json.dumps({"red": ["red", "crimson"], **words}))
    result = run("--task", "hits", "--table", table, "--split", "val", "--names", names, "--image-size", 32)
    assert (result["classes"], result["names"], result["labels_per_image"]) == (7, 8, 2)
    assert result["labels"] == "labels" and result["chance"] == pytest.approx(2 / 7)
    assert result["hit_at_10"] == 1  # seven classes only


def test_noise_is_measured_from_the_command_line(run, pairs_table):
    result = run(
        "--task", "noise", "--table", pairs_table, "--split", "train", "--pairs", 8, "--batches", 2, "--image-size", 32
    )  # fmt: skip
    assert (result["pairs"], result["batches"], result["threshold"]) == (8, 2, 0.2)
    assert result["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-5)
    assert 0 < result["off_diagonal_mean"] < 0.2 and 0 < result["diagonal_mean"] < 1
    lines = describe(result).splitlines()
    assert lines[0] == "2 batches of 8 pairs of split train" and len(lines) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "hits", "--labels", "tags"), "--labels tags: the table has no such column; it has image, caption"),
        (("--task", "hits", "--names", "absent.txt"), "no file of class names at absent.txt"),
        (("--task", "noise", "--template", "a {}", "--template", "{}"), "noise takes one template for the captions"),
        (("--task", "noise", "--pairs", "1"), "--pairs 1 is below 2"),
        (("--task", "noise", "--pairs", "64"), "12 pairs make no batch of 64: choose 2 to 12 (--pairs)"),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, model, model_config, pairs_table, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = save_checkpoint(tmp_path / "checkpoint", model, model_config)
    given = ("--checkpoint", folder, "--table", pairs_table, "--split", "val", "--quiet", "--device", "cpu", *arguments)
    assert runpy.run_path(str(TOOL))["main"]([str(part) for part in given]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and message in printed.err and len(printed.err.strip().splitlines()) == 1
