"""UTA and masked features: what is compared, what gets gradient, what stays frozen, and what does not fit together."""

import json
from copy import deepcopy
from dataclasses import replace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from pretrain.config import ConfigError, ImageTowerConfig, OptimConfig, PhaseConfig, TextTowerConfig
from pretrain.data.transforms import normalise
from pretrain.engine.device import Device
from pretrain.engine.optim import build_optimizer
from pretrain.engine.step import TrainStep
from pretrain.modeling.checkpoint import WEIGHTS_FILE, load_checkpoint, save_checkpoint
from pretrain.modeling.clip import build_model, open_clip_config
from pretrain.modeling.image_tower import encode_tokens
from pretrain.objectives import uta
from pretrain.objectives.info_nce import InfoNCE, InfoNCEOptions
from pretrain.objectives.masked_features import MaskedFeatures, MaskedFeaturesOptions
from pretrain.objectives.uta import UTA, UTAOptions

PHASE = PhaseConfig(image_size=64, context_length=8, batch_size=4, lr=1e-3, warmup_steps=0)


@pytest.fixture
def teacher(model_config, tmp_path) -> str:
    """A checkpoint folder whose temperature is not the default one."""
    torch.manual_seed(5)
    model = build_model(model_config)
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    return str(save_checkpoint(tmp_path / "teacher", model, model_config))


@pytest.fixture
def make(model, model_config, teacher):
    """`make(kind, phase=…, **options)`: an objective around the fixture's towers, in its phase."""

    def build(kind=UTA, phase=PHASE, **options):
        chosen = {UTA: UTAOptions, MaskedFeatures: MaskedFeaturesOptions}[kind](teacher=teacher, **options)
        objective = kind(model, model_config, chosen)
        objective.enter_phase(phase)
        return objective.train()

    return build


def images(count=4, size=64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"image": torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)}


def keeping(monkeypatch, kept: list[int]) -> None:
    """Let every image keep these patches (of masked features: mask them)."""
    module = "pretrain.objectives"
    for name in ("uta", "masked_features"):
        monkeypatch.setattr(
            f"{module}.{name}.keep_reversed_blocks",
            lambda batch, grid, keep, device: torch.tensor(kept).expand(batch, -1),
        )


# ------------------------------------------------------------------------------------------------- the loss


@torch.no_grad()
def test_the_loss_is_the_mean_cosine_of_kept_patches_and_the_average(make, monkeypatch):
    """By timm's own forward pass, one image and one token at a time."""
    keeping(monkeypatch, [1, 2, 6, 7, 8, 11, 12, 13, 14, 15])
    objective, batch = make(), images(2)
    output, losses = objective(batch), []
    student, frozen = objective.model.visual, objective.teacher.visual
    for image in normalise(batch["image"]).split(1):
        own = encode_tokens(student.trunk, image, torch.tensor([[1, 2, 6, 7, 8, 11, 12, 13, 14, 15]]))[:, 1:]
        whole = frozen.trunk.forward_features(image)[:, 1:]  # behind the register token
        pairs = [(own.mean(1), whole.mean(1))]
        pairs += [(own[:, i], whole[:, j]) for i, j in enumerate([1, 2, 6, 7, 8, 11, 12, 13, 14, 15])]
        cosines = [
            F.cosine_similarity(student.head(student.trunk.fc_norm(s)), frozen.head(frozen.trunk.fc_norm(t)))
            for s, t in pairs
        ]
        losses.append(-sum(cosines) / 11)
        torch.testing.assert_close(frozen.head(frozen.trunk.fc_norm(whole.mean(1))), frozen(image))
    torch.testing.assert_close(output["loss"], torch.cat(losses).mean())
    assert set(output) == {"loss", "pooled_cosine", "patch_cosine"}


@torch.no_grad()
def test_a_student_that_is_the_teacher_and_sees_everything_has_the_least_loss(make):
    objective = make(mask_ratio=0.0)
    assert -0.9 < objective(images())["loss"]
    objective.model.visual.load_state_dict(objective.teacher.visual.state_dict())
    torch.testing.assert_close(objective(images())["loss"], torch.tensor(-1.0))
    assert -0.9999 < make(mask_ratio=0.4)(images())["loss"]  # it misses the dropped patches


@torch.no_grad()
def test_without_a_mask_the_student_is_its_plain_forward_pass(make, monkeypatch):
    objective, batch = make(mask_ratio=0.0), images(2)
    seen = {}
    monkeypatch.setattr(
        uta, "token_cosines", lambda s, t: seen.update(student=s, teacher=t) or F.cosine_similarity(s, t, -1)
    )
    objective(batch)
    assert seen["student"].shape == (2, 17, 32)
    torch.testing.assert_close(seen["student"][:, 0], objective.model.visual(normalise(batch["image"])))
    torch.testing.assert_close(seen["teacher"][:, 0], objective.teacher.visual(normalise(batch["image"])))


@pytest.mark.parametrize(("ratio", "kept"), [(0.4, 10), (0.5, 8), (0.99, 1)])
def test_the_student_sees_the_rounded_share_of_patches(make, monkeypatch, ratio, kept):
    objective, counts = make(mask_ratio=ratio), []
    inner = objective.model.visual.trunk.blocks.forward
    monkeypatch.setattr(objective.model.visual.trunk.blocks, "forward", lambda x: counts.append(x.shape[1]) or inner(x))
    assert objective(images())["loss"].isfinite()
    assert counts == [kept + 1]  # and the register token


def test_dropped_positions_and_patches_get_no_gradient(make, monkeypatch):
    keeping(monkeypatch, [0, 1, 4, 5])
    objective = make(mask_ratio=0.75)
    objective(images())["loss"].backward()
    table = objective.model.visual.trunk.pos_embed.grad[0, 1:]  # behind the register token's
    assert table[[0, 1, 4, 5]].any(1).all() and not table[[2, 3, *range(6, 16)]].any()
    batch, corner = images(), images()
    corner["image"][:, :, 32:] = 0  # the lower half, of which nothing is kept; the teacher sees it
    with torch.no_grad():
        objective.teacher.forward = lambda given: (torch.ones(4, 32), torch.ones(4, 16, 32))
        assert torch.equal(objective(batch)["loss"], objective(corner)["loss"])


def test_uta_has_no_mask_token_and_trains_the_image_tower_alone(make):
    objective = make()
    trained = {name for name, p in objective.named_parameters() if p.requires_grad}
    assert trained == {f"model.visual.{name}" for name, _ in objective.model.visual.named_parameters()}
    objective(images())["loss"].backward()
    assert {name for name, p in objective.named_parameters() if p.grad is not None and p.grad.any()} == trained


@torch.no_grad()
def test_masked_features_compares_masked_patches_only_and_hides_their_content(make, monkeypatch):
    keeping(monkeypatch, [0, 1, 4, 5])
    objective, batch = make(MaskedFeatures), images(2)
    same, other = deepcopy(batch), deepcopy(batch)
    same["image"][:, :, :32, :32] = 0  # the masked patches
    other["image"][:, :, 32:, :32] = 0
    pooled, patches = objective.teacher(batch["image"])
    wanted = patches.clone()
    objective.teacher.forward = lambda given: (pooled, wanted)
    loss = objective(batch)["loss"]
    assert torch.equal(objective(same)["loss"], loss) and not torch.equal(objective(other)["loss"], loss)
    wanted[:, [2, 3, *range(6, 16)]] = 0.0
    assert torch.equal(objective(batch)["loss"], loss)
    wanted[:, 0] *= -1
    assert not torch.equal(objective(batch)["loss"], loss)


def test_masked_features_trains_its_token_and_saves_it_in_states_not_in_checkpoints(make):
    objective = make(MaskedFeatures)
    objective(images())["loss"].backward()
    assert objective.mask_token.grad.any()
    assert "mask_token" in objective.state_dict() and not any("mask" in n for n in objective.model.state_dict())


# ------------------------------------------------------------------------------------- teacher and text tower


@pytest.mark.parametrize("kind", [UTA, MaskedFeatures])
def test_steps_change_neither_teacher_nor_text_tower(make, teacher, kind):
    objective = make(kind)
    before = deepcopy(objective.state_dict())
    step = TrainStep(objective, PHASE, OptimConfig(weight_decay=0.1), Device("cpu"))
    in_optimizer = {id(p) for group in step.optimizer.param_groups for p in group["params"]}
    frozen = [*objective.teacher.parameters(), *objective.model.text.parameters(), objective.model.logit_scale]
    assert not in_optimizer & {id(p) for p in frozen}
    for number in range(3):
        step(images(), number)
    for name, value in objective.state_dict().items():
        changed = name.startswith("model.visual.") or name == "mask_token"
        assert torch.equal(value, before[name]) != changed, name
    assert not any(module.training for module in objective.teacher.modules())


def test_training_approaches_the_teacher(make):
    objective = make()
    step = TrainStep(objective, PHASE, OptimConfig(weight_decay=0.0), Device("cpu"))
    losses = [step(images(), 0)["loss"].item() for _ in range(25)]
    assert losses[-1] < losses[0] - 0.3


@torch.no_grad()
def test_the_student_embeds_texts_as_the_teacher_does(make, teacher):
    source = load_checkpoint(teacher)
    objective = make()
    tokens = open_clip.get_tokenizer("ViT-B-32", context_length=8)(["a red square", "dogs"])
    expected = source.model.encode_text(F.pad(tokens, (0, 8)), normalize=True)
    found = objective.encoders()[""].encode_text(tokens, normalize=True)
    torch.testing.assert_close(found, expected)
    assert objective.model.logit_scale == source.model.logit_scale == 3.0
    objective.model.visual.load_state_dict(objective.teacher.visual.state_dict())
    pictures = normalise(images()["image"])
    logits = objective.model(pictures, tokens)[0] @ found.T
    source.model.visual.set_input_size(64)
    torch.testing.assert_close(logits, source.model.encode_image(pictures, normalize=True) @ expected.T)


def test_every_phase_resamples_the_teachers_own_table(make):
    """Through a small size and back, detail would be lost."""
    objective = make(phase=replace(PHASE, image_size=160))
    table = objective.teacher.visual.trunk.pos_embed.clone()
    for size in (32, 160):
        objective.enter_phase(replace(PHASE, image_size=size))
        assert objective.teacher.visual.trunk.pos_embed.shape[1] == (size // 16) ** 2 + 1
        assert objective(images(2, size))["loss"].isfinite()
    assert torch.equal(objective.teacher.visual.trunk.pos_embed, table)


@torch.no_grad()
def test_open_clips_own_tower_with_a_class_token_teaches(model_config, tmp_path):
    """Pooled with class token, patches with patches, each through the teacher's own norm and projection."""
    torch.manual_seed(2)
    settings = open_clip_config(model_config)["text_cfg"]
    vision = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 16, "image_size": 96}
    native = open_clip.CLIP(32, vision, settings).eval()
    folder = tmp_path / "native"
    folder.mkdir()
    save_file(native.state_dict(), folder / WEIGHTS_FILE)
    cfg = {
        "model_cfg": {"embed_dim": 32, "vision_cfg": vision, "text_cfg": settings},
        "preprocess_cfg": {"mean": [0.5] * 3},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(cfg))
    objective = UTA(build_model(model_config), model_config, UTAOptions(teacher=str(folder), mask_ratio=0.0))
    objective.enter_phase(replace(PHASE, image_size=96))
    batch = images(2, 96)
    pooled, patches = objective.teacher(batch["image"])
    pictures = normalise(batch["image"], (0.5,) * 3)
    native.visual.output_tokens = True
    expected, tokens = native.visual(pictures)
    torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(patches, tokens @ native.visual.proj, atol=1e-5, rtol=1e-5)
    assert objective(batch)["loss"].isfinite()
    words = torch.tensor([[49406, 320, 49407] + [0] * 13])
    native.visual.output_tokens = False
    objective.enter_phase(replace(PHASE, context_length=16))
    torch.testing.assert_close(objective.model.encode_text(words), native.encode_text(words))


def with_class_token(model_config):
    return replace(model_config, image=ImageTowerConfig("test_vit", pool="token"))


def tokens_in_the_joint_space(visual, picture: torch.Tensor, kept: list[int]) -> list[torch.Tensor]:
    """Of a tower with a class token: the image's embedding, then those of the kept patches, by the tower's parts."""
    trunk = visual.trunk
    patches = trunk.patch_embed.proj(picture[None])[0].flatten(1).T
    rows = [trunk.cls_token[0, 0] + trunk.pos_embed[0, 0]]
    rows += [patches[i] + trunk.pos_embed[0, 1 + i] for i in kept]
    return list(visual.head(trunk.norm(trunk.blocks(torch.stack(rows)[None])))[0])


@torch.no_grad()
def test_a_class_token_is_aligned_with_the_teachers_and_patches_with_patches(model_config, tmp_path, monkeypatch):
    """By a double loop over images and tokens; the teacher has a class token, too, as the paper's."""
    kept = [1, 2, 6, 7, 8, 11, 12, 13, 14, 15]
    keeping(monkeypatch, kept)
    config = with_class_token(model_config)
    torch.manual_seed(5)
    folder = str(save_checkpoint(tmp_path / "class_token", build_model(config), config))
    objective = UTA(build_model(config), config, UTAOptions(teacher=folder))
    objective.enter_phase(PHASE)
    objective.eval()
    total, count, batch = 0.0, 0, images(3)
    for picture in normalise(batch["image"]):
        own = tokens_in_the_joint_space(objective.model.visual, picture, kept)
        whole = tokens_in_the_joint_space(objective.teacher.visual, picture, list(range(16)))
        for student, frozen in zip(own, [whole[0], *(whole[1 + i] for i in kept)], strict=True):
            total -= float(student @ frozen / student.norm() / frozen.norm())
            count += 1
    assert count == 33
    assert float(objective(batch)["loss"]) == pytest.approx(total / count, abs=1e-6)
    torch.testing.assert_close(whole[0], objective.teacher.visual(picture[None])[0], atol=1e-5, rtol=1e-5)


def test_all_of_a_student_with_a_class_token_trains(model_config, teacher):
    """With a teacher that averages: the class token learns that average."""
    config = with_class_token(model_config)
    objective = UTA(build_model(config), config, UTAOptions(teacher=teacher))
    objective.enter_phase(PHASE)
    objective.train()(images())["loss"].backward()
    assert objective.model.visual.trunk.cls_token.grad.any()
    idle = {n for n, p in objective.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert idle == set()


# ------------------------------------------------------------------------------------ what does not fit together


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 48}, r"model.embed_dim is 48, but the teacher .* set model.embed_dim=32"),
        (
            {"image": ImageTowerConfig("vit_small_patch8_224", pool="avg")},
            "has patches of 8 px, the teacher .* of 16",
        ),
        (
            {"text": TextTowerConfig(width=64, heads=2, layers=2, context_length=12)},
            r"model.text.width is 64, the teacher's 32; model.text.context_length is 12, the teacher's 16",
        ),
        (
            {"text": TextTowerConfig(width=32, heads=4, layers=2, context_length=16)},
            "model.text.heads is 4, the teacher's 2",
        ),
        ({"text": TextTowerConfig(width=32, heads=2, layers=1, context_length=16)}, "model.text.layers is 1"),
    ],
)
def test_towers_that_do_not_fit_the_teacher_name_the_field(model_config, teacher, changes, message):
    config = replace(model_config, **changes)
    with pytest.raises(ConfigError, match=message):
        UTA(build_model(config), config, UTAOptions(teacher=teacher))


def test_impossible_options_are_refused(make, model, model_config):
    with pytest.raises(ConfigError, match=r"objective.options.teacher is empty"):
        UTA(model, model_config)
    for kind, ratio in ((UTA, 1.0), (UTA, -0.1), (MaskedFeatures, 0.0), (MaskedFeatures, 1.0)):
        with pytest.raises(ConfigError, match=f"objective.options.mask_ratio is {ratio}"):
            make(kind, mask_ratio=ratio)
    with pytest.raises(ConfigError, match="token_dropping and cropped_positions are not for UTA"):
        make(phase=replace(PHASE, token_dropping="random", keep_tokens=3))


# --------------------------------------------------------------------------------------------- fine-tuning


def test_the_fine_tuning_trains_both_towers_again_at_a_fixed_temperature(make, model_config):
    model = make().model
    objective = InfoNCE(model, model_config, InfoNCEOptions(fixed_temperature=0.01))
    objective.enter_phase(PHASE)
    fixed = {name for name, p in objective.named_parameters() if not p.requires_grad}
    assert fixed == {"model.logit_scale"}
    tokens = torch.randint(1, 49000, (4, 8), generator=torch.Generator().manual_seed(0))
    tokens[:, 0], tokens[:, -1] = 49406, 49407
    batch = {**images(), "tokens": tokens}
    step = TrainStep(objective, PHASE, OptimConfig(name="lamb"), Device("cpu"))
    for number in range(2):
        output = step(batch, number)
        assert output["logit_scale"].item() == pytest.approx(100, rel=1e-6)
    assert model.logit_scale.grad is None
    with pytest.raises(ConfigError, match="fixed_temperature is -1"):
        InfoNCE(model, model_config, InfoNCEOptions(fixed_temperature=-1))


def test_a_learned_temperature_stays_learned(model, model_config):
    objective = InfoNCE(model, model_config)
    assert objective.model.logit_scale.requires_grad
    assert id(objective.model.logit_scale) in {
        id(p) for g in build_optimizer(objective, OptimConfig(), Device("cpu")).param_groups for p in g["params"]
    }


def test_cached_embeddings_give_the_gradient_of_the_whole_batch(make, monkeypatch):
    keeping(monkeypatch, [0, 1, 2, 4, 5, 6, 8, 9, 10, 12])
    gradients = []
    for micro in (0, 2):
        objective = make()
        step = TrainStep(objective, replace(PHASE, micro_batch_size=micro, lr=0.0), OptimConfig(), Device("cpu"))
        output = step(images(), 0)
        gradients.append([output["loss"].detach(), *(p.grad.clone() for p in objective.model.visual.parameters())])
    for whole, pieces in zip(*gradients, strict=True):
        torch.testing.assert_close(pieces, whole, atol=1e-6, rtol=1e-4)
