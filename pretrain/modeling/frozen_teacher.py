"""A frozen image tower whose patch features others learn to predict, and its text tower for the student.

The teacher is any checkpoint folder: ours, or another of open_clip's format with a vision transformer. Nothing here
trains; which features are compared how is in `losses.token_alignment` and the objectives.
"""

import json
from pathlib import Path

import open_clip
import torch
from open_clip import CustomTextCLIP
from open_clip.model import convert_to_custom_text_state_dict
from torch import nn

from pretrain.config import ConfigError, ModelConfig
from pretrain.data.transforms import normalise
from pretrain.modeling.checkpoint import CONFIG_FILE, load_checkpoint
from pretrain.modeling.clip import set_image_size
from pretrain.modeling.image_tower import encode_image_and_patches
from pretrain.modeling.plain_tower import plain_tower


class FrozenTeacher(nn.Module):
    """The image tower of a checkpoint folder: always in evaluation mode, never with gradient.

    Contract: uint8 images (B, 3, S, S) -> embedding (B, E) and patch embeddings (B, N, E) in the teacher's joint space,
    not normalised. The weights are part of the state dictionary, and `recipe` has the rest: a resumed run has the same
    teacher whatever happened to its folder.

    Args:
        visual: an image tower of open_clip.
        recipe: plain values: what open_clip made the tower from (embed_dim, vision_cfg, quick_gelu), and the
            normalisation (mean, std).

    Raises:
        ConfigError: if the tower cannot be taken apart into patches.
    """

    def __init__(self, visual: nn.Module, recipe: dict) -> None:
        super().__init__()
        try:
            self.visual = plain_tower(visual)
            table = self.visual.trunk.pos_embed
            if table is None:
                raise ValueError("the image tower has no table of positions")
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"objective.options.teacher cannot teach patch features: {error}") from error
        self.recipe = {**recipe, "image_size": int(self.visual.image_size[0])}
        self.mean, self.std = tuple(recipe["mean"]), tuple(recipe["std"])
        # Phases resample from this, not from each other: a table that went through a small size has lost detail.
        self.register_buffer("own_positions", table.detach().clone())
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Stay in evaluation mode."""
        return super().train(False)

    def set_image_size(self, size: int) -> None:
        """Take `size`-pixel squares: the table of the checkpoint is resampled."""
        self.visual.trunk.pos_embed = nn.Parameter(self.own_positions.clone(), requires_grad=False)
        set_image_size(self, size)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed whole pictures and each of their patches, with the teacher's own normalisation."""
        return encode_image_and_patches(self.visual, normalise(images, self.mean, self.std))


def load_teacher(folder: str, model: CustomTextCLIP, config: ModelConfig) -> FrozenTeacher:
    """The teacher of a checkpoint folder; `model` gets its text tower and its temperature, and keeps its image tower.

    The image tower of `model` is trained afterwards, the text tower and the temperature are frozen: what the student
    learns is measured in the teacher's joint space, where those are right.

    Args:
        folder: a checkpoint folder.
        model: the student's towers, changed in place.
        config: what `model` was built from.

    Raises:
        ConfigError: if student and teacher do not fit together; the message names the fields to change.
        CheckpointError: if the folder cannot be loaded.
    """
    if not folder:
        raise ConfigError("objective.options.teacher is empty: give a checkpoint folder (runs/…/checkpoint)")
    with torch.device("cpu"):  # also where a student without memory (on the meta device) is only to be checked
        source = load_checkpoint(folder)
    if source.embed_dim != config.embed_dim:
        raise ConfigError(
            f"model.embed_dim is {config.embed_dim}, but the teacher {folder} has a joint space of {source.embed_dim} "
            f"dimensions: set model.embed_dim={source.embed_dim}"
        )
    made_from = json.loads((Path(folder) / CONFIG_FILE).read_text())["model_cfg"]
    recipe = {
        "embed_dim": source.embed_dim, "vision_cfg": made_from["vision_cfg"],
        "quick_gelu": bool(made_from.get("quick_gelu", False)), "mean": list(source.mean), "std": list(source.std),
    }  # fmt: skip
    teacher = FrozenTeacher(source.model.visual, recipe)
    patches = [tuple(visual.trunk.patch_embed.patch_size) for visual in (model.visual, teacher.visual)]
    if patches[0] != patches[1]:
        raise ConfigError(
            f"model.image.timm_model has patches of {patches[0][0]} px, the teacher {folder} of {patches[1][0]}: their "
            "grids differ at every image size; use an image tower with the teacher's patches, or another teacher"
        )
    _copy_text_tower(model, source.model, folder)
    _train_images_only(model)
    return teacher


def teacher_again(recipe: dict, model: CustomTextCLIP) -> FrozenTeacher:
    """The teacher of an earlier `FrozenTeacher.recipe`, without weights: those, and the text tower that `model` took
    over, are in the state dictionary that is loaded next.

    Args:
        recipe: plain values.
        model: the student's towers; what is frozen of them becomes so again.
    """
    vision = {**recipe["vision_cfg"], "timm_model_pretrained": False}
    no_text = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
    towers = CustomTextCLIP(recipe["embed_dim"], vision, no_text, quick_gelu=recipe["quick_gelu"])
    teacher = FrozenTeacher(towers.visual, recipe)
    teacher.set_image_size(recipe["image_size"])
    teacher.own_positions = teacher.visual.trunk.pos_embed.detach().clone()
    teacher.recipe = dict(recipe)
    _train_images_only(model)
    return teacher


def _train_images_only(model: CustomTextCLIP) -> None:
    model.requires_grad_(True)
    model.text.requires_grad_(False)
    model.logit_scale.requires_grad_(False)


def check_grids(model: CustomTextCLIP, teacher: FrozenTeacher) -> None:
    """Compare the patch grids at the present image size.

    Raises:
        ConfigError: if they differ.
    """
    student, frozen = (tuple(visual.trunk.patch_embed.grid_size) for visual in (model.visual, teacher.visual))
    if student != frozen:
        raise ConfigError(
            f"at {model.visual.image_size[0]} px the image tower has {student[0]} x {student[1]} patches, the teacher "
            f"{frozen[0]} x {frozen[1]}: use an image tower with the teacher's patch size, or another teacher"
        )


def _copy_text_tower(model: CustomTextCLIP, teacher: nn.Module, folder: str) -> None:
    """Give the model the teacher's text tower and temperature."""
    text = getattr(teacher, "text", teacher)  # open_clip's CLIP is its own text tower
    if not isinstance(getattr(text, "transformer", None), open_clip.transformer.Transformer):
        raise ConfigError(
            f"the text tower of {folder} is a {type(text).__name__}, but the student takes over open_clip's own text "
            "transformer: use another teacher"
        )
    ours, theirs = _describe(model.text), _describe(text)
    if ours != theirs:
        unequal = [f"{key} is {ours[key]}, the teacher's {theirs[key]}" for key in ours if ours[key] != theirs[key]]
        raise ConfigError(
            f"the student takes over the text tower of {folder}, but {'; '.join(unequal)}: set the fields of "
            "model.text to the teacher's, or use a teacher with open_clip's plain text transformer"
        )
    weights = convert_to_custom_text_state_dict(teacher.state_dict())
    try:
        model.text.load_state_dict({k.removeprefix("text."): v for k, v in weights.items() if k.startswith("text.")})
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"the text tower of {folder} is of another kind than model.text describes ({reason}): use another teacher"
        ) from error
    with torch.no_grad():
        model.logit_scale.copy_(teacher.logit_scale.reshape(()))


def _describe(text: nn.Module) -> dict[str, object]:
    """What decides the features of open_clip's text transformer, by the name of the field."""
    block = text.transformer.resblocks[0]
    return {
        "model.text.width": text.token_embedding.embedding_dim,
        "model.text.heads": getattr(block.attn, "num_heads", None),
        "model.text.layers": len(text.transformer.resblocks),
        "model.text.context_length": text.positional_embedding.shape[0],
        "model.text.vocab_size": text.token_embedding.num_embeddings,
        # What model.text has no field for; weights of another kind might fit all the same.
        "its activation": type(block.mlp.gelu).__name__,
        "its pooling": getattr(text, "pool_type", None) or text.text_pool_type,
        "its attention": "to all tokens" if text.attn_mask is None else "causal",
    }
