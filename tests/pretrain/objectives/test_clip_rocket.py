"""clip-rocket: its loss from a double loop, what is random and what is not, the terms' wiring, encoders, resumption."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pretrain.config import ConfigError, DataConfig, ObjectiveConfig, PhaseConfig, PretrainConfig
from pretrain.data.transforms import normalise
from pretrain.engine.checkpoint import load_state
from pretrain.engine.train import Trainer
from pretrain.losses.contrastive import info_nce
from pretrain.modeling.clip import set_image_size
from pretrain.objectives import build_objective, passes_of
from pretrain.objectives.clip_rocket import ClipRocket, ClipRocketOptions
from pretrain.objectives.clip_rocket_terms import TermSizes, build_term

SIZES = {
    "redundancy_hidden": 24, "redundancy_outputs": 16, "siamese_hidden": 24, "siamese_outputs": 16,
    "assignment_hidden": 24, "assignment_outputs": 16, "prototypes": 12,
}  # fmt: skip
SMALL = {"projector_hidden": 24, "sizes": SIZES}
PHASE = PhaseConfig(image_size=32, context_length=8)


def make(model, config, phase=PHASE, **options) -> ClipRocket:
    torch.manual_seed(1)
    node = {**SMALL, **options}
    built = build_objective(PretrainConfig(model=config, objective=ObjectiveConfig("clip_rocket", node)), model)
    built.enter_phase(phase)
    return built.train()


def batch(pairs=6, size=32, views=2, augmented_size=None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ["", *(f"augmented_{k}" for k in range(1, views + 1))]
    made = {}
    for name in names:
        side = augmented_size or size if name else size
        kind, _, number = name.rpartition("_")
        keys = ("image", "tokens") if not name else (f"{kind}_image_{number}", f"{kind}_tokens_{number}")
        tokens = torch.randint(1, 49000, (pairs, 8), generator=generator)
        tokens[:, 0], tokens[:, -1] = 49406, 49407
        images = torch.randint(0, 256, (pairs, 3, side, side), generator=generator, dtype=torch.uint8)
        made |= dict(zip(keys, (images, tokens), strict=True))
    return made


def test_the_loss_is_that_of_a_double_loop_over_views(model, model_config):
    objective = make(model, model_config, num_augmented=3)
    given = batch(views=3)
    output = objective(given)
    heads = [
        (F.normalize(model.visual(normalise(given["image"])), dim=1), F.normalize(model.text(given["tokens"]), dim=1))
    ]
    for k in (1, 2, 3):
        trunk = model.visual.trunk(normalise(given[f"augmented_image_{k}"]))  # pooled: timm's model has no head here
        text = objective.encode(given)[f"text_{k}"]
        heads.append(
            (F.normalize(objective.image_projector(trunk), dim=1), F.normalize(objective.text_projector(text), dim=1))
        )
    targets, losses = torch.arange(6), []
    (image, text), s = heads[0], 1 / 0.07
    clean = [F.cross_entropy(s * a @ b.T, targets) for a, b in ((image, text), (text, image))]
    for direction in (0, 1):
        total = 0.0
        for i in (1, 2, 3):
            for j in (1, 2, 3):
                a, b = (heads[i][0], heads[j][1]) if direction == 0 else (heads[j][1], heads[i][0])
                total = total + F.cross_entropy(10 * a @ b.T, targets, label_smoothing=0.1)
        losses.append((clean[direction] + 3 * total / 9) / 4)
    torch.testing.assert_close(output["loss"], sum(losses) / 2)
    assert output["logit_scale"].item() == pytest.approx(1 / 0.07, rel=1e-5)
    assert output["augmented_logit_scale"].item() == pytest.approx(10, rel=1e-5)
    torch.testing.assert_close(
        make(model, model_config, num_augmented=3, reduction="sum")(given)["loss"], 2 * output["loss"]
    )


def test_without_augmented_views_it_is_info_nce(model, model_config):
    objective = make(model, model_config, num_augmented=0)
    given = batch(views=0)
    image, text, scale = model(normalise(given["image"]), given["tokens"])
    torch.testing.assert_close(objective(given)["loss"], info_nce(image, text, scale))
    assert {n for n, _ in objective.named_parameters()} == {f"model.{n}" for n, _ in model.named_parameters()}
    assert list(objective.encoders()) == [""]


def test_shared_heads_and_scale_are_the_towers_own(model, model_config):
    objective = make(model, model_config, separate_projectors=False, separate_scales=False, smoothing=0.0)
    given = batch()
    for k in (1, 2):
        given |= {f"augmented_image_{k}": given["image"], f"augmented_tokens_{k}": given["tokens"]}
    output = objective(given)
    torch.testing.assert_close(output["loss"], output["clean_loss"])
    torch.testing.assert_close(output["augmented_loss"], output["clean_loss"])


def test_smoothing_touches_the_augmented_pairs_only(model, model_config):
    plain, smoothed = (make(model, model_config, smoothing=s)(batch()) for s in (0.0, 0.1))
    assert plain["clean_loss"] == smoothed["clean_loss"] and plain["augmented_loss"] != smoothed["augmented_loss"]


def test_text_dropout_leaves_the_clean_pair_alone(model, model_config):
    objective, given = make(model, model_config, text_dropout=0.2), batch()
    torch.manual_seed(0)
    first = objective.encode(given)
    second = objective.encode(given)
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed == {"text_1", "text_2"}
    objective.eval()
    assert torch.equal(objective.encode(given)["text_1"], objective.encode(given)["text_1"])


def test_every_parameter_is_trained(model, model_config):
    objective = make(model, model_config, terms={"barlip": 1.0, "siamlip": 1.0, "swalip_v1": 0.2})
    objective.terms["swalip_v1"].steps += 100
    objective(batch())["loss"].backward()
    idle = {n for n, p in objective.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert idle == set()


def described(network: nn.Sequential) -> str:
    """Linear layers by their widths, batch norms with or without scale and shift, biases that have an effect."""
    parts = []
    for place, layer in enumerate(network):
        if isinstance(layer, nn.Linear):
            biased = layer.bias is not None and not isinstance([*network, None][place + 1], nn.BatchNorm1d)
            parts.append(f"{layer.in_features}-{layer.out_features}{'+b' if biased else ''}")
        elif isinstance(layer, nn.BatchNorm1d):
            parts.append("norm" if layer.affine else "plain norm")
        else:
            parts.append(type(layer).__name__.lower())
    return " ".join(parts)


def test_the_terms_networks_are_the_published_ones():
    """As read in models.py of facebookresearch/clip-rocket, for pooled features of 384 (ViT-S) and 512 (text)."""
    made = {n: build_term(n, None, (384, 512), TermSizes()) for n in ("barlip", "siamlip", "swalip_v1")}
    barlip, siamlip, swalip = made["barlip"], made["siamlip"], made["swalip_v1"]
    for width, network in ((384, barlip.image), (512, barlip.text)):
        assert described(network) == f"{width}-3000 norm relu 3000-3000 norm relu 3000-8192 norm"
    for width, network in zip((384, 512), siamlip.projectors, strict=True):
        assert described(network) == f"{width}-2048 norm relu 2048-128 plain norm"
    assert [described(network) for network in siamlip.predictors] == 2 * ["128-2048 norm relu 2048-128+b"]
    for width, network in ((384, swalip.image), (512, swalip.text)):
        assert described(network) == f"{width}-2048 norm relu 2048-128+b"
    assert swalip.prototypes.shape == (3000, 128)


@pytest.mark.parametrize("name", ["barlip", "siamlip", "byolip", "swalip", "swalip_v1"])
def test_a_term_is_added_with_its_weight(model, model_config, name):
    options = {"smoothing": 0.0} if name == "swalip" else {}
    output = make(model, model_config, terms={name: 0.3}, **options)(batch())
    pairs = (output["clean_loss"] + 2 * output["augmented_loss"]) / 3
    torch.testing.assert_close(output["loss"], pairs + 0.3 * output[f"{name}_loss"])
    assert output[f"{name}_loss"] > 0


def test_byolip_equals_siamlip_while_the_average_is_the_model_itself(model, model_config):
    values = {
        name: make(model, model_config, terms={name: 1.0})(batch())[f"{name}_loss"] for name in ("siamlip", "byolip")
    }
    torch.testing.assert_close(values["siamlip"], values["byolip"])


def test_byolips_average_follows_slowly_and_is_not_trained(model, model_config):
    objective = make(model, model_config, terms={"byolip": 1.0})
    average = objective.terms["byolip"].average.module["towers"].text.text_projection
    before = average.clone()
    objective(batch())["loss"].backward()
    assert average.grad is None
    with torch.no_grad():
        model.text.text_projection += 1
    objective.after_step()
    torch.testing.assert_close(average, before + 0.01, atol=1e-6, rtol=0)


def test_prototypes_are_frozen_for_a_hundred_steps(model, model_config):
    objective = make(model, model_config, terms={"swalip_v1": 1.0})
    prototypes, moved = objective.terms["swalip_v1"].prototypes, []
    for steps in (99, 100):
        objective.terms["swalip_v1"].steps.fill_(steps)
        prototypes.grad = None
        objective(batch())["loss"].backward()
        moved.append(bool(prototypes.grad.any()))
    assert moved == [False, True]
    objective.after_step()
    assert objective.terms["swalip_v1"].steps == 101


def test_h_is_the_second_space_and_the_ensemble_mixes_similarities_exactly(model, model_config):
    objective = make(model, model_config, ensemble_weight=0.3).eval()
    given = batch()
    images, encoders, cosines = normalise(given["image"]), objective.encoders(), {}
    with torch.no_grad():
        for name, encoder in encoders.items():
            image, text = encoder.encode_image(images), encoder.encode_text(given["tokens"])
            cosines[name] = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
        h = F.normalize(objective.image_projector(objective.encode(given)["image_0"]), dim=1)
        torch.testing.assert_close(encoders["h"].encode_image(images), h)
    assert list(encoders) == ["", "h", "ensemble"] and encoders["h"].context_length == 8
    torch.testing.assert_close(cosines["ensemble"], 0.3 * cosines[""] + 0.7 * cosines["h"])
    assert not encoders["h"].training and make(model, model_config).encoders()["h"].training


def test_pieces_have_the_same_features_as_the_whole(model, model_config):
    """Batch norm is in `loss` alone; so a batch can be encoded in pieces."""
    objective, given = make(model, model_config, terms={"byolip": 1.0}), batch()
    assert objective.whole_batch == ""
    whole = objective.encode(given)
    parts = [objective.encode({k: v[rows] for k, v in given.items()}) for rows in (slice(0, 2), slice(2, 6))]
    for name, value in whole.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), value, atol=1e-5, rtol=1e-5)


def test_augmented_images_may_be_smaller(model, model_config):
    objective = make(model, model_config, PhaseConfig(image_size=48, context_length=8), augmented_image_scale=0.67)
    given = batch(size=48, augmented_size=32)
    output = objective(given)
    output["loss"].backward()
    assert output["loss"].isfinite() and model.visual.trunk.pos_embed.grad.any()
    # The tower itself at that size is the reference.
    mine = objective.encode(given)["image_1"]
    other = copy.deepcopy(model)
    set_image_size(other, 32)
    expected = other.visual.trunk(normalise(given["augmented_image_1"]))
    torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("image_size", "augmented"), [(224, 192), (64, 48), (32, 32), (16, 16)])
def test_augmented_images_follow_the_phase_in_whole_patches(model, model_config, image_size, augmented):
    """The 29M preset's share, patches of 16 px: the published 192 of 224, and sizes in a curriculum."""
    phase = PhaseConfig(image_size=image_size, context_length=8)
    objective = make(model, model_config, phase, augmented_image_scale=0.857)
    views = objective.views(DataConfig(), phase, [])
    sizes = {name: view.size for name, view in views.images.items()}
    assert sizes == {"image": image_size, "augmented_image_1": augmented, "augmented_image_2": augmented}


def test_asymmetric_options_reach_the_views(model, model_config):
    objective = make(model, model_config, asymmetric=True, strong={"flip_probability": 0.25})
    images = objective.views(DataConfig(), PHASE, []).images
    drawn = {name: (view.strength.flip_probability, view.strength.blur_probability) for name, view in images.items()}
    assert drawn == {"image": (0.0, 0.0), "augmented_image_1": (0.25, 1.0), "augmented_image_2": (0.25, 0.1)}


def test_scales_are_clamped(model, model_config):
    objective = make(model, model_config)
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
        objective.augmented_logit_scale.fill_(-1.0)
    objective.after_step()
    assert model.logit_scale.item() == pytest.approx(math.log(100)) and objective.augmented_logit_scale == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"terms": {"swalip": 0.2}}, "smoothing is 0.1; set smoothing=0"),
        ({"terms": {"swalip": 0.2}, "smoothing": 0.0, "num_augmented": 1}, "num_augmented is 1; set it to 2"),
        ({"terms": {"barlow": 1.0}}, "'barlow': one of barlip"),
        ({"reduction": "mean"}, "'mean': avg or sum"),
        ({"num_augmented": -1}, "num_augmented is -1"),
        ({"smoothing": 1.5}, "smoothing is 1.5"),
        ({"strong": {"crop_scale": [0.5, 2.0]}}, r"strong.crop_scale is \[0.5, 2.0\]"),
        ({"text": {"captions": "one"}}, "captions is 'one'"),
        ({"text": {"synonym": "x"}}, "did you mean 'synonyms'"),
        ({"strong": {"crop_scale": [0.5]}}, r"strong.crop_scale is \[0.5\]: give two shares"),
        ({"weak": {"blur_sigma": [1.0]}}, r"weak.blur_sigma is \[1.0\]: give two widths"),
        ({"terms": {"barlip": -1}}, "terms.barlip is -1.0: it must be at least 0; leave it out for none"),
        ({"terms": {"barlip": float("nan")}}, "terms.barlip is nan"),
        ({"projector_hidden": 0}, "projector_hidden is 0: it must be at least 1"),
        ({"projector_layers": 0}, "projector_layers is 0: it must be at least 1"),
        ({"sizes": {"prototypes": 0}}, "sizes.prototypes is 0: it must be at least 1"),
        ({"terms": {"barlip": float("inf")}}, "terms.barlip is inf"),
        ({"smoothing": 1.0}, "smoothing is 1.0: it must be at least 0 and below 1"),
        ({"text_dropout": 1.0}, "text_dropout is 1.0: it must be at least 0 and below 1"),
        ({"augmented_temperature": 0.0}, "augmented_temperature is 0.0: it must be above 0"),
        ({"augmented_temperature": float("inf")}, "augmented_temperature is inf: it must be above 0 and at most 1"),
        ({"augmented_image_scale": -0.5}, "augmented_image_scale is -0.5: .* at most 1, the phase's own image size"),
        ({"augmented_image_scale": 3.0}, "augmented_image_scale is 3.0"),
        ({"chunk_size": -4}, "chunk_size is -4"),
    ],
)
def test_options_that_cannot_be_used_are_named(model, model_config, options, message):
    """In training, and in a plan, which builds no objective."""
    with pytest.raises(ConfigError, match=message):
        make(model, model_config, **options)
    with pytest.raises(ConfigError, match=message):
        passes_of(PretrainConfig(objective=ObjectiveConfig("clip_rocket", options)))


def test_one_pair_is_too_few_for_batch_norm_only(model, model_config):
    phase = PhaseConfig(image_size=32, context_length=8, batch_size=1)
    with pytest.raises(ConfigError, match="phase main: batch_size is 1; batch norm .* needs 2 pairs or more"):
        make(model, model_config, phase)
    make(model, model_config, phase, separate_projectors=False)
    with pytest.raises(ConfigError, match="batch_size is 1"):
        make(model, model_config, phase, separate_projectors=False, terms={"barlip": 1.0})


def test_token_dropping_is_refused(model, model_config):
    with pytest.raises(ConfigError, match="clip_rocket does not drop tokens"):
        make(model, model_config).enter_phase(PhaseConfig(image_size=32, token_dropping="random", keep_tokens=2))


def test_the_defaults_are_the_published_ones():
    options = ClipRocketOptions()
    assert (options.num_augmented, options.smoothing, options.projector_hidden) == (2, 0.1, 4096)
    assert options.weak.crop_scale == [0.5, 1.0] and options.weak.flip_probability == 0
    assert options.sizes == TermSizes(3000, 8192, 2048, 128, 2048, 128, 3000)


OBJECTIVE = {
    "name": "clip_rocket",
    "options": {
        **SMALL, "text_dropout": 0.1, "text": {"keywords_as_synonyms": True},
        "terms": {"byolip": 1.0, "swalip_v1": 0.2},
    },
}  # fmt: skip


def test_a_resumed_run_ends_with_the_same_bits(module_run_config, monkeypatch):
    phases = [{"name": "small", "steps": 3}, {"name": "large", "steps": 2, "image_size": 48, "micro_batch_size": 4}]
    make_config = module_run_config
    straight = make_config(phases, "straight", {"checkpoint_every": 2}, objective=OBJECTIVE)
    Trainer(straight).train()
    broken = make_config(phases, "broken", {"checkpoint_every": 2}, objective=OBJECTIVE)
    original, calls = Trainer._step, []

    def stop(self, live, given, step):
        calls.append(step)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, live, given, step)

    monkeypatch.setattr(Trainer, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        Trainer(broken).train()
    monkeypatch.setattr(Trainer, "_step", original)
    trainer = Trainer(broken, resume=True)
    trainer.train()
    ends = [load_state(Path(c.run.output))["objective"] for c in (straight, broken)]
    assert ends[0].keys() == ends[1].keys()
    assert [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])] == []
    kept = set(ends[0])
    assert {"image_projector.1.running_mean", "terms.byolip.average.updates", "terms.swalip_v1.steps"} <= kept
    assert ends[0]["terms.swalip_v1.steps"] == 5
    metrics = (Path(straight.run.output) / "metrics.jsonl").read_text()
    assert "zero_shot_val_h_top1" in metrics and "zero_shot_val_ensemble_top1" in metrics
