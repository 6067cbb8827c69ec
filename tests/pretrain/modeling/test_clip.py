"""Building the towers and changing their image size and text length."""

import copy

import pytest
import timm
import torch

from pretrain.config import ConfigError, ImageTowerConfig, ModelConfig, TextTowerConfig
from pretrain.data.tokenizer import build_tokenizer
from pretrain.engine.cost import describe_towers
from pretrain.modeling.checkpoint import load_checkpoint, save_checkpoint
from pretrain.modeling.clip import build_model, native_image_size, set_context_length, set_image_size


def test_initial_scale_is_the_inverse_temperature(model):
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-6)


def test_layer_scale_value_is_set(model_config):
    trunk = build_model(model_config).visual.trunk
    gammas = [p for n, p in trunk.named_parameters() if n.endswith("gamma")]
    assert len(gammas) == 2 * len(trunk.blocks) and all((g == 1).all() for g in gammas)


def test_native_size_is_timms():
    assert native_image_size("test_vit4") == timm.create_model("test_vit4").default_cfg["input_size"][-1] == 160
    assert native_image_size("vit_base_patch16_siglip_gap_224") == 224


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_a_tower_that_cannot_be_used_is_refused(name):
    config = ModelConfig(image=ImageTowerConfig(timm_model=name), text=TextTowerConfig(width=32, heads=2, layers=1))
    with pytest.raises(ConfigError, match=f"{name} is not an average-pooled vision transformer"):
        build_model(config)


def test_an_unknown_tower_is_named_with_near_ones():
    config = ModelConfig(image=ImageTowerConfig(timm_model="vit_base_patch16_siglip_gap_223"))
    with pytest.raises(ConfigError, match="no model 'vit_base_patch16_siglip_gap_223'; near ones: .*gap"):
        build_model(config)


@pytest.mark.parametrize("size", [32, 64, 160, 208])
def test_image_size_changes_only_the_position_table(model, size):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    set_image_size(model, size)
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == (set() if size == 160 else {"visual.trunk.pos_embed"})


@pytest.mark.parametrize("size", [16, 48, 160])
def test_token_count_is_the_number_of_patches(model, size):
    set_image_size(model, size)
    seen = []
    model.visual.trunk.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    assert model.encode_image(torch.zeros(2, 3, size, size)).shape == (2, 32)
    assert seen == [(size // 16) ** 2 + model.visual.trunk.num_prefix_tokens]
    assert model.visual.trunk.pos_embed.requires_grad


def test_a_tower_with_fixed_input_size_follows_too():
    config = ModelConfig(
        image=ImageTowerConfig(timm_model="vit_base_patch16_siglip_gap_224"),
        text=TextTowerConfig(width=32, heads=2, layers=1),
    )
    model = build_model(config).eval()
    with pytest.raises(AssertionError):  # timm's own check of this tower: it takes its native size only
        model.encode_image(torch.zeros(1, 3, 64, 64))
    set_image_size(model, 64)
    assert model.encode_image(torch.zeros(1, 3, 64, 64)).shape == (1, 512)


@pytest.mark.parametrize(("size", "remedy"), [(50, 48), (8, 16), (0, 16)])
def test_a_size_between_patches_is_refused_with_the_next_one(model, size, remedy):
    with pytest.raises(ValueError, match=f"image_size {size} is not a multiple of the patch size 16: use {remedy}"):
        set_image_size(model, size)


def test_features_of_a_short_text_do_not_depend_on_the_length(model):
    texts = ["an axe", "a red apple"]
    features = {}
    for length in (16, 8):
        set_context_length(model, length)
        features[length] = model.encode_text(build_tokenizer(length)(texts))
    torch.testing.assert_close(features[8], features[16], atol=1e-6, rtol=1e-5)


def test_text_length_changes_no_weight(model):
    before = copy.deepcopy(model.state_dict())
    set_context_length(model, 5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_text_longer_than_the_table_is_refused(model):
    with pytest.raises(ValueError, match="context_length 17 exceeds the text tower's 16"):
        set_context_length(model, 17)


@torch.no_grad()
def test_pool_avg_makes_an_average_pooled_tower_of_a_model_with_a_class_token():
    """As timm and open_clip would: the class token takes part in attention and not in the average."""
    config = ModelConfig(
        image=ImageTowerConfig(timm_model="vit_small_patch16_224", pool="avg"),
        text=TextTowerConfig(width=32, heads=2, layers=1, context_length=8), embed_dim=32,
    )  # fmt: skip
    visual = build_model(config).eval().visual
    images = torch.rand(1, 3, 224, 224)
    tokens = visual.trunk.forward_features(images)
    assert tokens.shape == (1, 1 + 196, 384)
    torch.testing.assert_close(visual(images), visual.head(tokens[:, 1:].mean(1)))


@torch.no_grad()
def test_pool_token_embeds_images_by_the_class_token_and_open_clip_reads_it_so(tmp_path):
    config = ModelConfig(
        image=ImageTowerConfig(timm_model="test_vit", pool="token"),
        text=TextTowerConfig(width=32, heads=2, layers=1, context_length=8), embed_dim=32,
    )  # fmt: skip
    visual = build_model(config).eval().visual
    images = torch.rand(2, 3, 160, 160)
    torch.testing.assert_close(visual(images), visual.head(visual.trunk.forward_features(images)[:, 0]))
    model = build_model(config).eval()
    set_image_size(model, 64)
    loaded = load_checkpoint(save_checkpoint(tmp_path / "checkpoint", model, config)).model
    assert loaded.visual.trunk.global_pool == "token"
    small = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(loaded.encode_image(small), model.encode_image(small))


@pytest.mark.parametrize("name", ["test_vit4", "vit_base_patch16_siglip_gap_224", "vit_base_patch16_rope_224"])
def test_pool_token_needs_a_plain_tower_with_a_class_token(name):
    """To train, and to plan: the planner tells of towers that timm refuses; others have no cost model of their own."""
    config = ModelConfig(
        image=ImageTowerConfig(timm_model=name, pool="token"), text=TextTowerConfig(width=32, heads=2, layers=1)
    )
    with pytest.raises(ConfigError, match=f"model.image.pool is token, but {name} is not a plain .* class token"):
        build_model(config)
    if "gap" in name:
        with pytest.raises(ConfigError, match="model.image.pool is token"):
            describe_towers(config)
