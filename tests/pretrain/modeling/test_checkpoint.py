"""Checkpoint folders: read back by open_clip and timm without this project, and refused clearly when damaged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from pretrain.modeling import checkpoint
from pretrain.modeling.checkpoint import (
    CONFIG_FILE,
    POSITIONS_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    copy_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from pretrain.modeling.clip import build_model, set_context_length, set_image_size

TEXTS = ["an axe", "a drawing of a red apple", ""]

# Run by a fresh interpreter outside the project, with open_clip only.
STRANGER = """
import sys, open_clip, torch
folder, inputs, outputs = sys.argv[1:]
model, _, _ = open_clip.create_model_and_transforms("local-dir:" + folder)
tokenizer = open_clip.get_tokenizer("local-dir:" + folder)
model.eval()
given = torch.load(inputs)
with torch.no_grad():
    image, text = model.encode_image(given["image"]), model.encode_text(tokenizer(given["texts"]))
assert "pretrain" not in sys.modules
torch.save({"image": image, "text": text, "scale": model.logit_scale.detach()}, outputs)
"""


@pytest.fixture
def images():
    return torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path, model, model_config):
    return save_checkpoint(tmp_path / "checkpoint", model, model_config)


@torch.no_grad()
def features(model, images, tokenizer):
    return model.encode_image(images), model.encode_text(tokenizer(TEXTS))


def test_open_clip_reads_it_in_a_fresh_process_with_equal_features(tmp_path, folder, model, images):
    torch.save({"image": images, "texts": TEXTS}, tmp_path / "in.pt")
    script = tmp_path / "stranger.py"
    script.write_text(STRANGER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script), str(folder), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = torch.load(tmp_path / "out.pt")
    image, text = features(model, images, open_clip.SimpleTokenizer(context_length=16))
    assert torch.equal(theirs["image"], image) and torch.equal(theirs["text"], text)
    assert torch.equal(theirs["scale"], model.logit_scale.detach())


def test_timm_reads_the_image_tower_with_equal_features(folder, model, images):
    state = load_file(folder / WEIGHTS_FILE)
    prefix = "visual.trunk."
    trunk = timm.create_model("test_vit4", num_classes=0)
    trunk.load_state_dict({name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)})
    with torch.no_grad():
        assert torch.equal(trunk.eval()(images), model.visual.trunk(images))


def test_loading_gives_equal_features_and_what_feeds_the_towers(folder, model, images):
    loaded = load_checkpoint(folder)
    for ours, theirs in zip(
        features(model, images, loaded.tokenizer), features(loaded.model, images, loaded.tokenizer), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert (loaded.image_size, loaded.embed_dim, loaded.model.training) == (160, 32, False)
    assert loaded.mean == open_clip.OPENAI_DATASET_MEAN and loaded.std == open_clip.OPENAI_DATASET_STD
    digest = subprocess.run(["sha256sum", folder / WEIGHTS_FILE], capture_output=True, text=True, check=True).stdout
    assert loaded.fingerprint == digest.split()[0]


def test_foreign_normalisation_is_read_from_the_folder(folder):
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["preprocess_cfg"].update(mean=[0.5, 0.5, 0.5], std=[0.25, 0.5, 0.5])
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    loaded = load_checkpoint(folder)
    assert (loaded.mean, loaded.std) == ((0.5, 0.5, 0.5), (0.25, 0.5, 0.5))


def test_half_precision_halves_the_file_and_loads_as_float32(tmp_path, folder, model, model_config, images):
    half = save_checkpoint(tmp_path / "half", model, model_config, half=True)
    assert (half / WEIGHTS_FILE).stat().st_size < 0.51 * (folder / WEIGHTS_FILE).stat().st_size
    loaded = load_checkpoint(half)
    for (name, stored), exact in zip(loaded.model.state_dict().items(), model.state_dict().values(), strict=True):
        assert stored.dtype == exact.dtype == torch.float32, name
        torch.testing.assert_close(stored, exact, rtol=2**-11, atol=2**-24)  # rounding to float16, no more
    for a, b in zip(
        features(model, images, loaded.tokenizer), features(loaded.model, images, loaded.tokenizer), strict=True
    ):
        assert torch.nn.functional.cosine_similarity(a, b).min() > 0.9999


@torch.no_grad()
def test_towers_of_another_size_come_back_as_they_were_and_elsewhere_at_the_native_size(tmp_path, model, model_config):
    set_image_size(model, 64)
    set_context_length(model, 8)
    folder = save_checkpoint(tmp_path / "small", model, model_config)
    small, native = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 160, 160)
    loaded = load_checkpoint(folder)
    assert loaded.image_size == 64 and loaded.tokenizer(TEXTS).shape == (3, 16)
    assert torch.equal(loaded.model.encode_image(small), model.encode_image(small))
    elsewhere, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    set_image_size(model, 160)
    torch.testing.assert_close(elsewhere.eval().encode_image(native), model.encode_image(native))


def test_a_later_save_at_the_native_size_leaves_no_old_positions(tmp_path, model, model_config):
    set_image_size(model, 64)
    folder = save_checkpoint(tmp_path / "c", model, model_config)
    assert (folder / POSITIONS_FILE).is_file()
    set_image_size(model, 160)
    assert load_checkpoint(save_checkpoint(folder, model, model_config)).image_size == 160
    assert not (folder / POSITIONS_FILE).exists()


def test_positions_that_are_missing_or_of_other_weights_are_refused(tmp_path, model, model_config):
    set_image_size(model, 64)
    folder = save_checkpoint(tmp_path / "c", model, model_config)
    other = save_checkpoint(tmp_path / "d", model, model_config, half=True)
    (folder / POSITIONS_FILE).write_bytes((other / POSITIONS_FILE).read_bytes())
    with pytest.raises(CheckpointError, match=f"{POSITIONS_FILE} belongs to other weights than {WEIGHTS_FILE}"):
        load_checkpoint(folder)
    (folder / POSITIONS_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"{POSITIONS_FILE} is missing .the towers were trained at 64 px"):
        load_checkpoint(folder)


def test_a_folder_without_configuration_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path} is not a checkpoint folder: it has no {CONFIG_FILE}"):
        load_checkpoint(tmp_path)


def test_missing_weights_are_named(folder):
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"has no {WEIGHTS_FILE}: the checkpoint is incomplete"):
        load_checkpoint(folder)


def cut_weights(folder):
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(content[: len(content) // 2])


def empty_weights(folder):
    (folder / WEIGHTS_FILE).write_bytes(b"")


def other_shape(folder):
    state = load_file(folder / WEIGHTS_FILE)
    state["visual.head.proj.weight"] = torch.zeros(48, 96)
    save_file(state, folder / WEIGHTS_FILE)


def lost_tensor(folder):
    state = load_file(folder / WEIGHTS_FILE)
    del state["text.text_projection"]
    save_file(state, folder / WEIGHTS_FILE)


def cut_configuration(folder):
    (folder / CONFIG_FILE).write_text('{"model_cfg": {')


def configuration_without_a_model(folder):
    (folder / CONFIG_FILE).write_text("{}")


@pytest.mark.parametrize(
    "damage", [cut_weights, empty_weights, other_shape, lost_tensor, cut_configuration, configuration_without_a_model]
)
def test_damage_is_one_sentence_that_names_the_folder(folder, damage):
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder} cannot be loaded (") and "\n" not in message and len(message) < 600


def test_a_full_disk_is_one_sentence_that_names_the_file(tmp_path, model, model_config):
    """A process whose files cannot grow: writing fails as on a full disk."""
    script = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "from pretrain.config import ModelConfig, ImageTowerConfig, TextTowerConfig\n"
        "from pretrain.modeling.clip import build_model; from pretrain.modeling.checkpoint import save_checkpoint\n"
        "config = ModelConfig(ImageTowerConfig('test_vit4'), TextTowerConfig(32, 2, 1, 8), 32)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))\n"
        "try: save_checkpoint(sys.argv[2], build_model(config), config)\n"
        "except OSError as error: print(error)\n"
    )
    root = str(Path(__file__).resolve().parents[3])
    command = [sys.executable, "-c", script, root, str(tmp_path / "c")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.startswith(f"{tmp_path}/c/{WEIGHTS_FILE} cannot be written ("), done.stderr
    assert list((tmp_path / "c").iterdir()) == []


@pytest.mark.parametrize("stage", ["save_file", "fsync"])
def test_an_interrupted_write_leaves_the_old_files(folder, model, model_config, images, monkeypatch, stage):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def half_written(state, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError("No space left on device")

    def no_space(descriptor):
        raise OSError("No space left on device")

    if stage == "save_file":
        monkeypatch.setattr(checkpoint, "save_file", half_written)
    else:
        monkeypatch.setattr("os.fsync", no_space)
    with torch.no_grad():
        model.logit_scale.zero_()
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(folder, model, model_config)
    assert {name: (folder / name).read_bytes() for name in before} == before
    load_checkpoint(folder)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("size", [160, 64])
def test_a_copied_folder_is_the_same_model_at_the_size_it_was_trained_at(tmp_path, model_config, half, size):
    torch.manual_seed(1)
    trained = build_model(model_config).eval()
    set_image_size(trained, size)
    with torch.no_grad():
        trained.visual.trunk.pos_embed.normal_()
    source = save_checkpoint(tmp_path / "source", trained, model_config)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "image_positions.safetensors").write_bytes(b"of another model")
    copied = load_checkpoint(copy_checkpoint(source, tmp_path / "copy", half=half))
    assert copied.image_size == size
    pixels = torch.rand(2, 3, size, size)
    with torch.no_grad():
        expected, found = trained.encode_image(pixels), copied.model.encode_image(pixels)
    torch.testing.assert_close(found, expected, atol=3e-2 if half else 0, rtol=3e-2 if half else 0)
    again = copy_checkpoint(source, source)  # onto itself: left alone
    assert load_checkpoint(again).fingerprint == load_checkpoint(source).fingerprint


def test_only_a_checkpoint_folder_can_be_copied(tmp_path):
    with pytest.raises(CheckpointError, match="is not a checkpoint folder"):
        copy_checkpoint(tmp_path, tmp_path / "copy")
