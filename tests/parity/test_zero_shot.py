"""Zero-shot classification and retrieval against open_clip's own code, on the same toy towers and images."""

import json
from itertools import product
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from open_clip_train import zero_shot
from open_clip_train.train import get_clip_metrics
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from pretrain.data.folder import ImageStore
from pretrain.evaluation.encoder import evaluation_mode
from pretrain.evaluation.image_folders import read_image_folder
from pretrain.evaluation.imagenet import class_indices, class_synsets, read_imagenet
from pretrain.evaluation.prompts import imagenet_templates
from pretrain.evaluation.ranking import expected_hits
from pretrain.evaluation.retrieval import CaptionedImages, evaluate_retrieval
from pretrain.evaluation.tasks import build_encoder
from pretrain.evaluation.zero_shot import class_features, classify
from pretrain.modeling.checkpoint import load_checkpoint

CPU = torch.device("cpu")
COLOURS = {"red": (220, 30, 30), "green": (20, 150, 40), "blue": (30, 60, 220), "grey": (128, 128, 128)}
WORDS = ("axe", "tea pot", "x", "12 o'clock")


@pytest.fixture(autouse=True)
def _open_clip_on_new_numpy(monkeypatch):
    """open_clip 3.3's `accuracy` calls float() on an array of shape (1,), which NumPy 2.4 refuses."""
    monkeypatch.setattr(zero_shot, "float", lambda array: array.item(), raising=False)


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory):
    """A folder as open_clip publishes them: its classic towers with class token, foreign normalisation and a crop."""
    torch.manual_seed(0)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    preprocess = {"mean": [0.2, 0.3, 0.9], "std": [0.1, 0.5, 0.3], "resize_mode": "shortest"}
    folder = tmp_path_factory.mktemp("published")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    state = open_clip.CLIP(**config).state_dict()
    state["visual.conv1.weight"] *= 30  # untrained towers hardly look at their image otherwise
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def noise_folder(tmp_path_factory):
    """Sixteen class folders of coloured noise, 60 by 40 pixels, so that a crop and a squash differ."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for word, (name, colour) in product(WORDS, COLOURS.items()):
        (root / f"{name}_{word}").mkdir()
        for i in range(2):
            noise = rng.normal(colour, 90, (40, 60, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noise).save(root / f"{name}_{word}" / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def theirs(checkpoint_folder):
    """Model, preprocessing and tokenizer by open_clip alone."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{checkpoint_folder}")
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{checkpoint_folder}")


@pytest.fixture(scope="module")
def encoder(checkpoint_folder):
    return build_encoder(load_checkpoint(checkpoint_folder), CPU, batch_size=7)


def test_the_classifier_equals_open_clips_for_eighty_templates(encoder, theirs):
    names = ["great white shark", "axe", "traffic light, traffic signal"]
    expected = open_clip.build_zero_shot_classifier(
        theirs[0], theirs[2], names, open_clip.OPENAI_IMAGENET_TEMPLATES, num_classes_per_batch=2
    )
    with evaluation_mode(encoder.model):
        features = class_features(encoder, names, imagenet_templates())
    torch.testing.assert_close(features.T, expected, atol=1e-5, rtol=1e-5)


def test_accuracies_of_a_folder_equal_open_clips_run_with_the_checkpoints_own_crop(encoder, theirs, noise_folder):
    model, preprocess, tokenizer = theirs
    templates = ["a photo of a {}.", "{}"]
    data = read_image_folder(noise_folder)
    classifier = open_clip.build_zero_shot_classifier(model, tokenizer, data.classes, templates)
    loader = DataLoader(ImageFolder(str(noise_folder), preprocess), batch_size=5)
    expected = zero_shot.run(model, classifier, loader, SimpleNamespace(device="cpu", precision="fp32", batch_size=5))
    result = classify(encoder, data.images, data.labels, ImageStore(data.root), data.classes, templates)
    assert (result.top1, result.top5) == pytest.approx(expected)
    assert 0 < result.top1 < result.top5 < 1  # untrained towers: neither nothing nor everything


def test_accuracies_of_an_imagenet_subset_equal_a_thousand_classes_cut_to_two_hundred(encoder, theirs, tmp_path):
    """-R as its authors' script does: the 1000-way classifier's columns at the subset's numbers."""
    rng, synsets = np.random.default_rng(1), class_synsets("imagenet-r")
    for synset in (synsets[0], synsets[77], synsets[199]):
        (tmp_path / synset).mkdir()
        for i in range(2):
            Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).save(tmp_path / synset / f"{i}.png")
    model, preprocess, tokenizer = theirs
    indices = class_indices("imagenet-r")
    data = read_imagenet("imagenet-r", tmp_path)
    names = open_clip.IMAGENET_CLASSNAMES
    classifier = open_clip.build_zero_shot_classifier(model, tokenizer, names, ["{}"], None)[:, indices]
    with torch.no_grad():
        images = torch.stack([preprocess(Image.open(tmp_path / image)) for image in data.images])
        scores = model.encode_image(images, normalize=True) @ classifier
    labels = torch.tensor([synsets.index(image.split("/")[0]) for image in data.images])
    right = labels[:, None] == torch.arange(200)
    for k in (1, 5, 50):
        (expected,) = zero_shot.accuracy(scores, labels, (k,))
        assert expected_hits(scores, right, k).sum() == expected
    result = classify(encoder, data.images, data.labels, ImageStore(tmp_path), data.classes, ["{}"])
    assert (result.classes, result.classes_with_images, result.images) == (200, 3, 6)
    assert result.top5 == pytest.approx(zero_shot.accuracy(scores, labels, (5,))[0] / 6)


def test_retrieval_of_one_caption_an_image_equals_open_clips_metrics(encoder, theirs, noise_folder):
    model, preprocess, tokenizer = theirs
    images = read_image_folder(noise_folder).images
    captions = [f"the {name.split('/')[0]} noise of number {place}" for place, name in enumerate(images)]
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.open(noise_folder / name)) for name in images])
        expected = get_clip_metrics(
            model.encode_image(pixels, normalize=True), model.encode_text(tokenizer(captions), normalize=True), 1.0
        )
    data = CaptionedImages(images, captions, list(range(len(images))), 0)
    result = evaluate_retrieval(encoder, data, ImageStore(noise_folder))
    for k in (1, 5, 10):
        assert result.image_to_text[k] == pytest.approx(expected[f"image_to_text_R@{k}"])
        assert result.text_to_image[k] == pytest.approx(expected[f"text_to_image_R@{k}"])
    assert 0 < result.text_to_image[10] < 1
