"""clip-rocket's spaces h and ensemble after training: the checkpoint folder's heads, and tools/evaluate.py --space."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pretrain.commands.evaluate import main
from pretrain.engine.train import Trainer
from pretrain.modeling.checkpoint import CheckpointError, copy_checkpoint, load_checkpoint, save_checkpoint
from pretrain.modeling.head_file import HEADS_FILE, in_space

OBJECTIVE = {
    "name": "clip_rocket",
    "options": {"projector_hidden": 24, "ensemble_weight": 0.3, "text": {"keywords_as_synonyms": True}},
}
PHASES = [{"name": "small", "steps": 2}, {"name": "large", "steps": 3, "image_size": 48, "lr": 1e-2}]


@pytest.fixture(scope="module")
def trained(module_run_config):
    """A trainer after its run, which ended at another size than the towers' native one, and the run's folder."""
    trainer = Trainer(module_run_config(PHASES, "run", evaluation={"splits": ["train", "val"]}, objective=OBJECTIVE))
    return trainer, trainer.train()


@pytest.fixture
def folder(trained, tmp_path):
    return Path(shutil.copytree(trained[1], tmp_path / "checkpoint"))


def judge(folder, pairs_table, space, *arguments):
    output = folder.parent / f"{space}.json"
    where = ["--checkpoint", folder, "--table", pairs_table, "--output", output, "--quiet"]
    return main([str(part) for part in [*where, "--space", space, *arguments]]), output


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_tools_numbers_in_every_space_are_those_of_the_training(trained, folder, pairs_table, split, capsys):
    metrics = [json.loads(line) for line in (Path(trained[1]).parent / "metrics.jsonl").read_text().splitlines()]
    found = []
    for space, title in (("z", split), ("h", f"{split}_h"), ("ensemble", f"{split}_ensemble")):
        status, output = judge(folder, pairs_table, space, "--split", split, "--template", "{}")
        result = json.loads(output.read_text())
        last = [line for line in metrics if f"zero_shot_{title}_top1" in line][-1]
        names = ("top1", "top5", "mean_per_class", "images", "classes")
        assert (" in the space " in capsys.readouterr().out) == (space != "z")
        assert status == 0 and result["space"] == space and result["image_size"] == 48
        assert {n: result[n] for n in names} == pytest.approx({n: last[f"zero_shot_{title}_{n}"] for n in names})
        found.append(tuple(result[n] for n in ("top1", "top5")))
    assert split == "val" or len(set(found)) == 3  # else the comparison would say little


@pytest.mark.parametrize("space", ["h", "ensemble"])
def test_the_features_are_those_of_the_objectives_own_encoder(trained, folder, space):
    loaded = in_space(load_checkpoint(folder), folder, space).model
    encoder = trained[0].objective.eval().encoders()[space]
    torch.manual_seed(0)
    images, texts = torch.randn(3, 3, 48, 48), ["a cat", "two dogs", "red"]
    # A folder's text tower has its full length again; a causal tower's features do not change by it.
    longer, tokens = (open_clip.tokenize(texts, model.context_length) for model in (loaded, encoder))
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode_image(images), encoder.encode_image(images))
        torch.testing.assert_close(loaded.encode_text(longer), encoder.encode_text(tokens))
    torch.testing.assert_close(loaded.logit_scale, encoder.logit_scale)


def test_each_space_is_read_at_the_temperature_it_was_trained_with(trained, folder, pairs_table):
    objective, scales = trained[0].objective, {}
    for space in ("z", "h", "ensemble"):
        status, output = judge(folder, pairs_table, space, "--task", "noise", "--split", "train", "--pairs", "12")
        assert status == 0
        scales[space] = json.loads(output.read_text())["logit_scale"]
    own, second = (float(s.detach().exp()) for s in (objective.model.logit_scale, objective.augmented_logit_scale))
    expected = {"z": own, "h": second, "ensemble": 0.3 * own + 0.7 * second}
    assert scales == pytest.approx(expected, rel=1e-5) and own - second > 1


def test_open_clip_reads_the_folder_as_if_the_heads_were_not_there(folder):
    (folder.parent / "bare").mkdir()
    bare = copy_checkpoint(folder, folder.parent / "bare")
    assert (folder / HEADS_FILE).is_file() and not (bare / HEADS_FILE).exists()
    with_heads, without = (open_clip.create_model(f"local-dir:{place}") for place in (folder, bare))
    for name, value in without.state_dict().items():
        assert torch.equal(value, with_heads.state_dict()[name])


def test_a_checkpoint_without_heads_has_the_space_z_alone(folder, pairs_table, capsys):
    (folder / HEADS_FILE).unlink()
    assert judge(folder, pairs_table, "z", "--split", "val")[0] == 0
    capsys.readouterr()
    assert judge(folder, pairs_table, "h", "--split", "val")[0] == 1
    message = capsys.readouterr().err.strip()
    assert "heads.safetensors is missing: this checkpoint has the space z alone (--space z)" in message
    assert len(message.splitlines()) == 1


def test_heads_of_other_weights_are_refused(folder, model, model_config):
    save_checkpoint(folder, model, model_config)
    with pytest.raises(CheckpointError, match="belongs to other weights than open_clip_model.safetensors"):
        in_space(load_checkpoint(folder), folder, "ensemble")


def test_a_run_without_heads_leaves_none_of_an_earlier_run(module_run_config):
    config = module_run_config(output="twice", objective=OBJECTIVE)
    first = Trainer(config).train()
    assert (first / HEADS_FILE).is_file()
    (first.parent / "state.pt").unlink()
    assert Trainer(module_run_config(output="twice")).train() == first
    assert not (first / HEADS_FILE).exists()


def changed(folder, change, about=None):
    path = folder / HEADS_FILE
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **(about or {})}
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / HEADS_FILE).write_bytes(b"no tensors"), "is damaged"),
        (lambda folder: changed(folder, lambda t: t.pop("image.0.weight")), "does not fit the towers"),
        (lambda folder: changed(folder, lambda t: [t.pop(n) for n in list(t) if n[0] == "t"]), "it has no text head"),
        (lambda folder: changed(folder, lambda t: t.update({"image.x": torch.ones(2, 2)})), "does not fit the towers"),
        (lambda folder: changed(folder, lambda t: t.update({"text.0.weight": torch.ones(10**6, 1)})), "matrices are"),
        (lambda folder: changed(folder, lambda t: None, {"ensemble_weight": "2"}), "ensemble_weight 2.0"),
    ],
)
def test_a_damaged_file_is_one_sentence_that_names_it(folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        in_space(load_checkpoint(folder), folder, "h")
    assert HEADS_FILE in str(caught.value) and "\n" not in str(caught.value)
