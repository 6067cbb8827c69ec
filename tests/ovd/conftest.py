"""A tiny random image-text model in a checkpoint folder, and a detector on it, for the tests of the detection half."""

import json
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

IMAGE_TEXT_CONFIG = {
    "embed_dim": 64,
    "custom_text": True,
    "vision_cfg": {"timm_model_name": "test_vit4", "timm_pool": "", "timm_proj": "linear", "image_size": 160},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
PREPROCESSING = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "size": [160, 160],
    "interpolation": "bicubic",
    "resize_mode": "squash",
}


def write_image_text(folder: Path, timm_name: str = "test_vit4", image_size: int = 160) -> Path:
    """A random image-text model with one of timm's image towers, written as a checkpoint folder."""
    torch.manual_seed(0)
    vision = {**IMAGE_TEXT_CONFIG["vision_cfg"], "timm_model_name": timm_name, "image_size": image_size}
    config = {**IMAGE_TEXT_CONFIG, "vision_cfg": vision}
    model = open_clip.CustomTextCLIP(**{key: value for key, value in config.items() if key != "custom_text"})
    with torch.no_grad():
        for name, parameter in model.visual.named_parameters():
            # timm starts positions and layer scales near 0, where attention and positions hardly matter to a test.
            if "pos_embed" in name or "reg_token" in name:
                parameter.normal_(std=0.5)
            if name.endswith(".gamma"):
                parameter.fill_(0.5)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    content = {"model_cfg": config, "preprocess_cfg": {**PREPROCESSING, "size": [image_size] * 2}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def image_text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a random image-text model: test_vit4 (96 wide, 9 deep, one register token), 160 px."""
    return write_image_text(tmp_path_factory.mktemp("image_text"))


@pytest.fixture(scope="session")
def patch14_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with patches of 14 px, as ViT-L/14 and ViT-H/14 have, and 140 px."""
    name = "test_vit4_patch14"
    if not timm.is_model(name):

        def build(pretrained: bool = False, **options) -> nn.Module:
            return timm.create_model("test_vit4", patch_size=14, img_size=140, **options)

        build.__name__ = name
        timm.models.register_model(build)
    return write_image_text(tmp_path_factory.mktemp("patch14"), name, 140)


@pytest.fixture
def image_text(image_text_folder: Path):
    """The same model, loaded anew for each test."""
    from pretrain.modeling.checkpoint import load_checkpoint

    return load_checkpoint(image_text_folder)
