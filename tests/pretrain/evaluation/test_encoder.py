"""Preprocessing, image sizes and batching of the encoder."""

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from pretrain.config import ConfigError
from pretrain.data.folder import ImageStore
from pretrain.data.tokenizer import build_tokenizer
from pretrain.evaluation.encoder import (
    OWN_PREPROCESS,
    Encoder,
    evaluation_mode,
    evaluation_transform,
    on_white,
    resize_image_tower,
)

CPU = torch.device("cpu")


def classic(image_size=32):
    torch.manual_seed(0)
    vision = {"image_size": image_size, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    return open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval()


@pytest.fixture
def stripes():
    """Left quarter red, middle green, right quarter blue: 64 by 32 pixels."""
    image = Image.new("RGB", (64, 32), (0, 255, 0))
    image.paste((255, 0, 0), (0, 0, 16, 32))
    image.paste((0, 0, 255), (48, 0, 64, 32))
    return image


@pytest.mark.parametrize(
    ("mode", "left", "top"),
    [
        ("squash", (1, 0, 0), (0, 1, 0)),  # the whole image: red at the left edge
        ("shortest", (0, 1, 0), (0, 1, 0)),  # the middle square: red is cut away
        ("longest", (1, 0, 0), (0, 0, 0)),  # the whole image between black bars
    ],
)
def test_each_resize_mode_shows_what_it_should(stripes, mode, left, top):
    identity = {"mean": (0, 0, 0), "std": (1, 1, 1), "size": 32, "interpolation": "bilinear"}
    view = evaluation_transform({**identity, "resize_mode": mode})(stripes)
    assert view.shape == (3, 32, 32)
    torch.testing.assert_close(view[:, 16, 1], torch.tensor(left).float(), atol=0.05, rtol=0)
    torch.testing.assert_close(view[:, 1, 16], torch.tensor(top).float(), atol=0.05, rtol=0)


@pytest.mark.parametrize("mode", ["squash", "shortest", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_photograph_is_prepared_exactly_as_open_clip_does(stripes, mode, interpolation):
    preprocess = {"size": (32, 32), "resize_mode": mode, "interpolation": interpolation, "mean": (0.5, 0.4, 0.3)}
    theirs = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
    assert torch.equal(evaluation_transform(preprocess)(stripes), theirs(stripes))


def test_cut_outs_are_seen_on_white():
    cutout = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    cutout.putpixel((1, 0), (10, 20, 30, 255))
    assert list(on_white(cutout).getdata()) == [(255, 255, 255), (10, 20, 30)]
    assert on_white(Image.new("L", (1, 1), 7)).getpixel((0, 0)) == (7, 7, 7)


@pytest.mark.parametrize("field", ["resize_mode", "interpolation"])
def test_preprocessing_that_open_clip_does_not_know_is_refused(field):
    with pytest.raises(ConfigError, match=f"preprocess_cfg.{field} 'stretch' is not one of open_clip's"):
        evaluation_transform({field: "stretch"})


@torch.no_grad()
def test_a_classic_tower_changes_size_as_open_clips_own_loader_does(tmp_path):
    model = classic(32)
    state = model.state_dict()
    larger = classic(64)
    open_clip.model.resize_pos_embed(state, larger)
    larger.load_state_dict(state)
    resize_image_tower(model, 64)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.encode_image(images), larger.encode_image(images), atol=1e-5, rtol=1e-5)
    assert model.visual.image_size == (64, 64)
    with pytest.raises(ValueError, match="image_size 40 is not a multiple of the patch size 16: use 32"):
        resize_image_tower(model, 40)


@torch.no_grad()
def test_a_timm_tower_changes_size_as_open_clips_own_does(model):
    images, ours = torch.randn(1, 3, 64, 64), model.visual.state_dict()
    resize_image_tower(model, 64)
    features = model.encode_image(images)
    model.visual.set_input_size(160)
    model.visual.load_state_dict(ours)
    model.visual.set_input_size(64)  # what `force_image_size` calls
    torch.testing.assert_close(features, model.encode_image(images), atol=1e-5, rtol=1e-5)


def test_a_tower_of_one_size_says_so():
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 64, "head_width": 64}
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    resnet = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)
    with pytest.raises(ValueError, match="image_size 64: a ModifiedResNet image tower has a fixed size"):
        resize_image_tower(resnet, 64)


def test_worker_processes_give_the_same_features_in_the_same_order(pairs_table):
    model, store = classic(), ImageStore(pairs_table.parent)
    names = ["red_circle_0.png", "absent.png", "blue_square_1.png", "green_circle_2.png", "red_square_0.png"]
    found = []
    for workers in (0, 2):
        encoder = Encoder(model, build_tokenizer(8), OWN_PREPROCESS, CPU, batch_size=2, workers=workers)
        with evaluation_mode(model):
            parts = list(encoder.images(names, store))
        found.append(torch.cat([features for _, features in parts]))
        assert torch.cat([places for places, _ in parts]).tolist() == [0, 2, 3, 4]
        assert len(encoder.broken) == 1 and "absent.png" in encoder.broken[0]
    assert torch.equal(*found)


def test_the_mode_is_put_back_also_after_an_error(model):
    model.train()
    with pytest.raises(RuntimeError), evaluation_mode(model):
        assert not model.training and not torch.is_grad_enabled()
        raise RuntimeError
    assert model.training and torch.is_grad_enabled()
