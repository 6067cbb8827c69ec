"""The image tower in steps against timm's own forward pass and a naive selection of tokens."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from open_clip.timm_model import TimmModel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.modeling.cropped_positions import crop_positions
from pretrain.modeling.image_tower import encode_image, encode_tokens, patch_positions, pool

SMALL = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
TRUNKS = {
    "register token": ("test_vit4", {"img_size": 64}),
    "average": ("vit_base_patch16_siglip_gap_224", SMALL),
    "class token averaged over": ("vit_base_patch16_224", {**SMALL, "global_pool": "avg"}),
    "class token": ("vit_base_patch16_224", SMALL),
    "class token and norm before": ("vit_base_patch16_clip_224", SMALL),
    "class token without position": ("deit3_base_patch16_224", SMALL),
    "registers with positions of any size": (
        "vit_base_patch16_224",
        {**SMALL, "reg_tokens": 2, "dynamic_img_size": True},
    ),
    "attention pooling": ("vit_base_patch16_siglip_224", SMALL),
}


@pytest.fixture(params=TRUNKS)
def trunk(request):
    return make_trunk(request.param)


def make_trunk(kind: str):
    torch.manual_seed(0)
    name, options = TRUNKS[kind]
    trunk = timm.create_model(name, **{**options, "num_classes": 0}).eval()
    with torch.no_grad():  # timm begins some of these with zeros, which would hide a token in the wrong place
        for parameter in (trunk.cls_token, trunk.reg_token, trunk.pos_embed):
            if parameter is not None:
                parameter.normal_()
    return trunk


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def keep():
    generator = torch.Generator().manual_seed(2)
    return torch.stack([torch.randperm(16, generator=generator)[:7].sort().values for _ in range(3)])


def naive_tokens(trunk, images, keep):
    """All tokens with positions by timm itself, the kept ones picked one by one, then the blocks."""
    with torch.no_grad():
        picked, prefix = [], trunk.num_prefix_tokens
        for tokens, kept in zip(trunk._pos_embed(trunk.patch_embed(images)), keep, strict=True):
            picked.append(torch.stack([*tokens[:prefix], *(tokens[prefix + i] for i in kept)]))
        return trunk.norm(trunk.blocks(trunk.norm_pre(torch.stack(picked))))


def all_patches(images):
    return torch.arange(16).expand(len(images), -1)


@torch.no_grad()
def test_the_plain_pass_is_timms_to_the_bit(trunk, images):
    tokens = encode_tokens(trunk, images)
    assert torch.equal(tokens, trunk.forward_features(images))
    assert torch.equal(pool(trunk, tokens), trunk(images))


@torch.no_grad()
def test_keeping_all_patches_with_their_own_positions_is_the_plain_pass_to_the_bit(trunk, images):
    plain = trunk.forward_features(images)
    assert torch.equal(encode_tokens(trunk, images, keep=all_patches(images)), plain)
    assert torch.equal(encode_tokens(trunk, images, positions=patch_positions(trunk)), plain)
    each = patch_positions(trunk).expand(len(images), -1, -1)
    assert torch.equal(encode_tokens(trunk, images, all_patches(images), each), plain)


@torch.no_grad()
def test_kept_patches_have_their_own_positions(trunk, images, keep):
    tokens = encode_tokens(trunk, images, keep)
    assert tokens.shape == (3, trunk.num_prefix_tokens + 7, trunk.embed_dim)
    torch.testing.assert_close(tokens, naive_tokens(trunk, images, keep), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_given_positions_replace_those_of_the_patches_only(trunk, images, keep):
    """Equal to a trunk whose own table holds them, one image at a time."""
    positions = torch.randn(3, 16, trunk.embed_dim, generator=torch.Generator().manual_seed(3))
    tokens = encode_tokens(trunk, images, keep, positions)
    whole = encode_tokens(trunk, images, positions=positions)
    for i in range(3):
        patch_positions(trunk).copy_(positions[i])  # a view of the table
        torch.testing.assert_close(tokens[i], naive_tokens(trunk, images[i : i + 1], keep[i : i + 1])[0])
        torch.testing.assert_close(whole[i], trunk.forward_features(images[i : i + 1])[0])


@torch.no_grad()
def test_dropped_patches_do_not_matter_and_kept_ones_do(trunk, images, keep):
    changed, patches = images.clone(), set(range(16))
    for image, kept in zip(changed, keep.tolist(), strict=True):
        for row, column in (divmod(index, 4) for index in patches - set(kept)):
            image[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 9.0
    assert torch.equal(encode_tokens(trunk, images, keep), encode_tokens(trunk, changed, keep))
    row, column = divmod(int(keep[0, 0]), 4)
    changed[0, :, 16 * row, 16 * column] += 1
    assert not torch.equal(encode_tokens(trunk, images, keep)[0], encode_tokens(trunk, changed, keep)[0])


@pytest.mark.parametrize("name", ["test_vit4", "vit_base_patch16_siglip_gap_224"])
@torch.no_grad()
def test_features_of_open_clips_tower(name):
    torch.manual_seed(0)
    visual = TimmModel(name, embed_dim=24, image_size=224, pool="", proj="linear").eval()
    if name != "test_vit4":
        visual.trunk.blocks = visual.trunk.blocks[:1]
    size = visual.trunk.patch_embed.img_size[0]
    images = torch.randn(2, 3, size, size)
    plain = visual(images)
    assert torch.equal(encode_image(visual, images), plain)
    everything = torch.arange(visual.trunk.patch_embed.num_patches).expand(2, -1)
    assert torch.equal(encode_image(visual, images, keep=everything), plain)
    some = everything[:, :5]
    tokens = encode_tokens(visual.trunk, images, some)[:, visual.trunk.num_prefix_tokens :]
    by_hand = visual.head(visual.trunk.fc_norm(tokens.mean(1)))  # an average over the kept patches only
    torch.testing.assert_close(encode_image(visual, images, keep=some), by_hand)


@pytest.mark.parametrize("kept", [4, 8, 12])
def test_arithmetic_falls_with_the_tokens(kept):
    """Blocks cost a share of tokens at least; only the patch embedding still sees the whole image."""
    trunk, images = make_trunk("average"), torch.zeros(2, 3, 64, 64)
    flops = {}
    for count in (16, kept):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encode_tokens(trunk, images, keep=torch.arange(count).expand(2, -1))
        flops[count] = counter.get_total_flops()
    embedding = 2 * 2 * 16 * (16 * 16 * 3) * 48
    assert (flops[kept] - embedding) / (flops[16] - embedding) <= kept / 16


def test_gradient_checkpointing_gives_the_same_gradients(images, keep):
    gradients = []
    for checkpointing in (False, True):
        trunk = make_trunk("register token").train()
        trunk.set_grad_checkpointing(checkpointing)
        calls = []
        trunk.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        pool(trunk, encode_tokens(trunk, images, keep)).square().sum().backward()
        assert len(calls) == (2 if checkpointing else 1)  # forward again in the backward pass
        gradients.append({name: p.grad for name, p in trunk.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_only_kept_positions_receive_gradient(images):
    trunk = make_trunk("class token")
    keep = torch.tensor([[0, 5], [5, 9], [0, 15]])
    encode_tokens(trunk, images, keep).square().sum().backward()
    touched = trunk.pos_embed.grad[0].abs().sum(1).nonzero().flatten().tolist()
    assert touched == [0, 1, 6, 10, 16]  # the class token's row, then patches 0, 5, 9 and 15


@torch.no_grad()
def test_an_image_of_another_size_where_timm_takes_it(keep):
    trunk = make_trunk("registers with positions of any size")
    images = torch.randn(3, 3, 96, 80)
    plain = trunk.forward_features(images)
    everything = torch.arange(30).expand(3, -1)
    assert torch.equal(encode_tokens(trunk, images, everything), plain)


def test_the_dtype_under_autocast_is_timms(images):
    trunk = make_trunk("average")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        plain = trunk.forward_features(images)
        assert torch.equal(encode_tokens(trunk, images, all_patches(images)), plain)


def test_towers_of_other_kinds_are_refused_only_when_it_matters(images):
    trunk = timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, num_classes=0).eval()
    with torch.no_grad():
        assert torch.equal(encode_tokens(trunk, images), trunk.forward_features(images))
    with pytest.raises(ValueError, match="VisionTransformerDistilled arranges its tokens in its own way"):
        encode_tokens(trunk, images, all_patches(images))
    with pytest.raises(ValueError, match="SimpleNamespace arranges its tokens"):
        patch_positions(SimpleNamespace(patch_embed=SimpleNamespace(grid_size=(4, 4))))


def test_a_tower_without_a_table_is_refused():
    trunk = timm.create_model("vit_base_patch16_224", **SMALL, pos_embed="none")
    with pytest.raises(ValueError, match="no table of positions: use one with learned absolute positions"):
        patch_positions(trunk)


def test_positions_of_another_grid_are_refused(images):
    with pytest.raises(ValueError, match=r"\(3, 25, 48\) do not fit 16 patches of 48 dimensions"):
        encode_tokens(make_trunk("average"), images, positions=torch.zeros(3, 25, 48))


# In a process of its own: autograd knows only devices that were there at the first backward pass of its process.
ON_XLA = """
import sys, timm, torch, torch_xla
import torch_xla.debug.metrics as metrics
from pretrain.modeling.cropped_positions import crop_positions, sample_boxes
from pretrain.modeling.image_tower import encode_tokens, patch_positions
from pretrain.modeling.masking import SAMPLERS, keep_patches

(images, state), steps = torch.load(sys.argv[1]), []
device = torch_xla.device()
trunk = timm.create_model("test_vit4", img_size=64, num_classes=0, depth=1)
trunk.load_state_dict(state)
trunk, images = trunk.to(device), images.to(device)
for kind in SAMPLERS:
    compiled = []
    for step in range(4):
        keep, boxes = keep_patches(kind, 3, (4, 4), 7, device), sample_boxes(3, device=device)
        result = [keep, boxes]
        if kind == "block":  # compiling a tower takes long
            tokens = encode_tokens(trunk, images, keep, crop_positions(patch_positions(trunk), boxes))
            result += [tokens, *torch.autograd.grad(tokens.square().sum(), trunk.pos_embed)]
        torch_xla.sync()
        compiled.append(metrics.metric_data("CompileTime")[0])
    waits = [name for name in metrics.counter_names() if name.startswith("aten::")]
    steps.append((kind, compiled, waits, [tensor.detach().cpu() for tensor in result]))
torch.save(steps, sys.argv[2])
"""


@pytest.mark.skipif(find_spec("torch_xla") is None, reason="torch-xla is not installed")
def test_xla_drops_and_crops_as_the_cpu_without_leaving_the_device_or_compiling_again(tmp_path, images):
    trunk = timm.create_model("test_vit4", img_size=64, num_classes=0, depth=1)
    torch.save((images, trunk.state_dict()), tmp_path / "given.pt")
    root = str(Path(__file__).resolve().parents[3])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "PJRT_DEVICE": "CPU"}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiling takes a quarter of the time
    command = [sys.executable, "-c", ON_XLA, str(tmp_path / "given.pt"), str(tmp_path / "results.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for kind, compiled, waits, (keep, boxes, *tower) in torch.load(tmp_path / "results.pt"):
        assert len(set(compiled[1:])) == 1 and waits == [], kind
        assert (keep.diff(dim=1) > 0).all() and keep.min() >= 0 and keep.max() < 16
        if tower:
            expected = encode_tokens(trunk, images, keep, crop_positions(patch_positions(trunk), boxes))
            torch.testing.assert_close(tower[0], expected.detach(), atol=1e-4, rtol=1e-4)
            gradient = torch.autograd.grad(expected.square().sum(), trunk.pos_embed)[0]
            torch.testing.assert_close(tower[1], gradient, atol=1e-3, rtol=1e-3)
