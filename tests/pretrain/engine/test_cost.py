"""The cost model against the paper's formulas and tables, PyTorch's FLOP counter, and tensors that training saves."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import (
    ConfigError,
    ImageTowerConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    PhaseConfig,
    PretrainConfig,
    RunConfig,
    TextTowerConfig,
)
from pretrain.engine.benchmark_train import random_batch
from pretrain.engine.cost import describe_towers, make_plan, phase_cost, tower_flops
from pretrain.engine.device import Device
from pretrain.engine.measure import measure_phase
from pretrain.engine.memory import activation_bytes, largest_micro_batch, optimizer_bytes, phase_memory
from pretrain.engine.optim import build_optimizer
from pretrain.modeling.checkpoint import save_checkpoint
from pretrain.modeling.clip import build_model, set_context_length, set_image_size
from pretrain.objectives import build_objective, passes_of

SIZES = (64, 80, 96, 112, 128, 160, 224, 448)
# GFLOP of one image, as computed from the paper's formulas elsewhere.
IMAGE_TABLE = {
    (384, 12): (0.69, 1.09, 1.57, 2.15, 2.83, 4.49, 9.15, 45.1),
    (768, 12): (2.75, 4.30, 6.21, 8.47, 11.1, 17.5, 34.9, 156.8),
    (1024, 24): (9.71, 15.2, 21.9, 29.9, 39.2, 61.5, 122.5, 535.2),
}
TEXT_TABLE = {
    768: {8: 1.36, 16: 2.73, 32: 5.47, 64: 11.0, 77: 13.3},
    1024: {16: 4.84, 64: 19.5},
}
LARGE = ModelConfig(
    image=ImageTowerConfig("vit_large_patch16_siglip_gap_256"),
    text=TextTowerConfig(width=768, heads=12, layers=12, context_length=64),
    embed_dim=768,
)
SMALL = ModelConfig(
    image=ImageTowerConfig("vit_tiny_patch16_224", pool="avg"),
    text=TextTowerConfig(width=64, heads=4, layers=3, context_length=16, vocab_size=500),
    embed_dim=32,
)
REGISTER = replace(SMALL, image=ImageTowerConfig("test_vit4"))  # LayerScale, hidden size 3d, a register token


def rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


@pytest.mark.parametrize(("width", "depth"), IMAGE_TABLE)
def test_image_towers_cost_what_the_published_formulas_say(width, depth):
    for size, expected in zip(SIZES, IMAGE_TABLE[width, depth], strict=True):
        assert tower_flops(width, depth, (size // 16) ** 2, 16) / 1e9 == pytest.approx(expected, rel=0.006)


def test_the_large_tower_takes_9_71_and_122_5_gflop():
    assert rounded(tower_flops(1024, 24, 16, 16) / 1e9, 3) == 9.71
    assert rounded(tower_flops(1024, 24, 196, 16) / 1e9, 4) == 122.5


@pytest.mark.parametrize("width", TEXT_TABLE)
def test_text_towers_cost_what_the_published_formulas_say(width):
    for tokens, expected in TEXT_TABLE[width].items():
        assert tower_flops(width, 12, tokens, None) / 1e9 == pytest.approx(expected, rel=0.006)
        assert tower_flops(width, 12, tokens, 0) == tower_flops(width, 12, tokens)


@pytest.mark.parametrize("wrong", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_counts_below_one_are_refused(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        tower_flops(*wrong)


# Main steps, main px, main text; savings with a finetune of 20k at 224, 50k at 224, 20k at 448 px.
SAVINGS = [
    (550, 64, 16, (7.7, 5.4, 4.1)),
    (550, 64, 64, (5.2, 4.1, 3.3)),
    (550, 80, 16, (5.9, 4.4, 3.5)),
    (550, 112, 16, (3.6, 3.0, 2.5)),
    (550, 128, 16, (2.9, 2.5, 2.2)),
    (250, 64, 16, (5.8, 3.4, 2.4)),
    (250, 80, 16, (4.7, 3.0, 2.2)),
]


@pytest.mark.parametrize(("thousands", "size", "length", "expected"), SAVINGS)
def test_whole_recipes_save_what_the_table_says(large_towers, thousands, size, length, expected):
    main = PhaseConfig("main", thousands * 1000, size, length, 16384)
    for (steps, fine), saving in zip(((20, 224), (50, 224), (20, 448)), expected, strict=True):
        phases = [main, PhaseConfig("finetune", steps * 1000, fine, 64, 16384)]
        plan = make_plan(PretrainConfig(model=LARGE, phases=phases), towers=large_towers)
        assert plan.saving == pytest.approx(saving, abs=0.051)
        assert plan.baseline.steps == thousands * 1000


@pytest.fixture(scope="module")
def large_towers():
    return describe_towers(LARGE)


def test_a_high_resolution_finetune_costs_more_than_the_main_phase(large_towers):
    main = phase_cost(PhaseConfig("main", 550_000, 64, 16, 16384), large_towers)
    fine = phase_cost(PhaseConfig("finetune", 20_000, 448, 64, 16384), large_towers)
    assert fine.training_flops / main.training_flops == pytest.approx(1.6, abs=0.05)
    assert main.samples == 9_011_200_000


def counted(module: torch.nn.Module, sample: torch.Tensor) -> int:
    # The counter does not know the CPU's fused attention, so attention is made of matrix products here.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        module(sample)
    return counter.get_total_flops()


@pytest.mark.parametrize("config", [SMALL, REGISTER], ids=["class token", "register"])
@pytest.mark.parametrize("size", [64, 112])
def test_pytorch_counts_the_same_within_one_percent(config, size):
    towers, model = describe_towers(config), build_model(config)
    set_image_size(model, size)
    set_context_length(model, 12)
    cost = phase_cost(PhaseConfig("x", 1, size, 12, 1), towers)
    images = counted(model.visual, torch.rand(2, 3, size, size))
    texts = counted(model.text, torch.randint(1, 500, (2, 12)))
    assert 2 * cost.image_forward_flops == pytest.approx(images, rel=0.01)
    assert 2 * cost.text_forward_flops == pytest.approx(texts, rel=0.01)


def test_pytorch_counts_the_same_backward_within_one_percent():
    model = build_model(SMALL)
    set_image_size(model, 64)
    images = torch.rand(2, 3, 64, 64, requires_grad=True)  # else the first layer has one product less
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.visual(images).sum().backward()
    cost = phase_cost(PhaseConfig("x", 1, 64, 12, 1), describe_towers(SMALL))
    assert 3 * 2 * cost.image_forward_flops == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("info_nce", {}, (1, 1, 0, 0)),
        ("distillation", {}, (1, 1, 1, 1)),
        ("otter", {}, (1, 1, 1, 1)),
        ("clip_rocket", {}, (3, 3, 0, 0)),
        ("clip_rocket", {"num_augmented": 1, "terms": {"byolip": 1.0}}, (2, 2, 2, 2)),
        ("uta", {"mask_ratio": 0.5}, (1, 0, 1, 0)),
        ("masked_features", {"mask_ratio": 0.5}, (1, 0, 1, 0)),
    ],
)
def test_pytorch_counts_the_passes_of_every_objective_within_two_percent(tmp_path, name, options, expected):
    options = dict(options)
    if name in ("uta", "masked_features"):
        options["teacher"] = str(save_checkpoint(tmp_path, build_model(REGISTER), REGISTER))
    config = PretrainConfig(model=REGISTER, objective=ObjectiveConfig(name, options))
    phase = PhaseConfig("x", 1, 64, 12, 2)
    passes = passes_of(config, phase)
    assert (passes.images, passes.texts, passes.teacher_images, passes.teacher_texts) == expected
    objective = build_objective(config, build_model(REGISTER))
    objective.enter_phase(phase)
    batch = random_batch(objective, config, phase, 0)
    cost = phase_cost(phase, describe_towers(REGISTER), passes=passes)
    forward = cost.training_flops / 3 + cost.teacher_flops
    assert forward == pytest.approx(counted(objective.encode, batch), rel=0.02)
    plain = phase_memory(phase, describe_towers(REGISTER), PretrainConfig(model=REGISTER))
    memory = phase_memory(phase, describe_towers(REGISTER), config)
    assert memory.parameters == plain.parameters * (2 if expected[2] else 1)
    assert (memory.activations > 1.9 * plain.activations) == (expected[0] > 1)


def test_dropped_tokens_pass_no_block_but_all_patches_are_embedded():
    towers = describe_towers(LARGE)
    full = PhaseConfig("x", 1, 128, 16, 8)
    half = phase_cost(replace(full, token_dropping="random", keep_tokens=16), towers)
    assert (half.image_tokens, phase_cost(full, towers).image_tokens) == (16, 64)
    assert half.image_forward_flops == tower_flops(1024, 24, 16) + 2 * 64 * 768 * 1024
    with pytest.raises(ConfigError, match="keep_tokens 65 exceeds the 64"):
        phase_cost(replace(full, token_dropping="random", keep_tokens=65), towers)


def test_small_images_and_dropped_tokens_are_compared_at_equal_token_count():
    towers = describe_towers(SMALL)
    small = phase_cost(PhaseConfig("x", 1, 64, 16, 8), towers)
    dropped = phase_cost(PhaseConfig("x", 1, 128, 16, 8, token_dropping="block", keep_tokens=16), towers)
    assert small.image_tokens == dropped.image_tokens == 17  # the class token is one of them


@pytest.mark.parametrize("size", [0, 60, 100])
def test_an_image_size_that_patches_do_not_divide_is_refused(size):
    with pytest.raises(ConfigError, match="not a multiple of the patch size 16"):
        phase_cost(PhaseConfig("x", 1, size, 16, 8), describe_towers(SMALL))


def test_a_batch_that_devices_cannot_share_is_refused():
    with pytest.raises(ConfigError, match="batch_size 8 cannot be shared equally by 3"):
        phase_cost(PhaseConfig("x", 1, 64, 16, 8), describe_towers(SMALL), devices=3)


def test_micro_batches_cost_one_forward_pass_more_only_where_they_are_used():
    towers, phase = describe_towers(SMALL), PhaseConfig("x", 5, 64, 16, 64, micro_batch_size=16)
    in_pieces, whole = phase_cost(phase, towers), phase_cost(phase, towers, devices=4)
    assert in_pieces.recompute_flops * 3 == in_pieces.training_flops == whole.training_flops
    assert whole.recompute_flops == 0


def test_the_baseline_can_take_its_size_from_another_configuration():
    config = PretrainConfig(model=SMALL, phases=[PhaseConfig("main", 100, 64, 8, 32)])
    other = PretrainConfig(model=SMALL, phases=[PhaseConfig("a", 7, 224, 16, 8), PhaseConfig("b", 9, 128, 12, 8)])
    plan = make_plan(config, baseline=other)
    assert (plan.baseline.image_size, plan.baseline.context_length, plan.baseline.steps) == (128, 12, 100)
    overridden = make_plan(config, baseline=other, baseline_image_size=96, baseline_context_length=16)
    assert (overridden.baseline.image_size, overridden.baseline.context_length) == (96, 16)
    same = make_plan(config, baseline_image_size=64, baseline_context_length=8)
    assert same.saving == 1


def saved_bytes(module: torch.nn.Module, sample: torch.Tensor, bf16: bool) -> int:
    """Storage that the graph keeps, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor, so that its address is not used again
        return tensor

    cast = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), cast:
        module(sample)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", [SMALL, REGISTER], ids=["class token", "register"])
def test_estimated_activations_are_what_training_saves_within_a_fifth(config, bf16):
    towers, model = describe_towers(config), build_model(config)
    set_image_size(model, 64)
    tokens = towers.image.image_tokens(PhaseConfig(image_size=64))
    for module, sample, estimate in (
        (model.visual, torch.rand(1, 3, 64, 64), activation_bytes(towers.image, tokens, 16, bf16)),
        (model.text, torch.ones(1, 16, dtype=torch.long), activation_bytes(towers.text, 16, 0, bf16)),
    ):
        # The difference between two batches is free of weight copies and other constants.
        few, many = (saved_bytes(module, sample.repeat(n, *[1] * (sample.ndim - 1)), bf16) for n in (4, 12))
        assert estimate == pytest.approx((many - few) / 8, rel=0.2)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "adafactorbv", "muon", "sgd"])
def test_optimizer_state_is_known_exactly_before_it_exists(name):
    optim, model = OptimConfig(name=name), build_model(SMALL)
    optimizer = build_optimizer(model, optim, Device("cpu"))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    tensors = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    assert optimizer_bytes(describe_towers(SMALL).module, optim) == sum(t.numel() * t.element_size() for t in tensors)


def test_optimizers_differ_as_published():
    module = describe_towers(REGISTER).module
    count = sum(p.numel() for p in module.parameters())
    per_parameter = {n: optimizer_bytes(module, OptimConfig(name=n)) / count for n in ("adamw", "adafactor", "muon")}
    assert per_parameter["adamw"] == pytest.approx(8, rel=0.01)
    assert per_parameter["adafactor"] < 0.5  # a ViT-L has 0.02; here most matrices are small
    assert per_parameter["muon"] == pytest.approx(4, rel=0.1)


def test_an_unknown_optimizer_is_one_sentence():
    with pytest.raises(ConfigError, match="optim: admaw cannot be used"):
        optimizer_bytes(describe_towers(SMALL).module, OptimConfig(name="admaw"))


def test_an_optimizer_that_reads_values_is_estimated_as_an_adam_with_a_warning() -> None:
    module = torch.nn.Linear(6, 5, device="meta")  # where the planner has its towers
    with pytest.warns(UserWarning, match="novograd is estimated as that of an Adam"):
        assert optimizer_bytes(module, OptimConfig(name="novograd")) == 35 * 8
    assert all(p.grad is None for p in module.parameters())


def large_config(**options) -> PretrainConfig:
    return PretrainConfig(
        model=LARGE, optim=OptimConfig(name="adafactorbv"), run=RunConfig(precision="bf16", **options)
    )


@pytest.fixture(scope="module")
def large_state(large_towers) -> int:
    """Bytes of the optimiser; found once, since the real one is run for it."""
    return optimizer_bytes(large_towers.module, large_config().optim)


def test_a_batch_of_16384_at_64_px_fits_16_gb_with_a_micro_batch_and_does_not_without(large_towers, large_state):
    config = large_config()
    config.objective.options["chunk_size"] = 1024
    phase = PhaseConfig("main", 1, 64, 16, 16384, micro_batch_size=256)
    in_pieces = phase_memory(phase, large_towers, config, 1, large_state)
    assert in_pieces.total < 16e9 / 1.15  # with room for what is not counted
    at_once = replace(phase, micro_batch_size=0)
    assert phase_memory(at_once, large_towers, config, 1, large_state).total > 200e9
    fits = largest_micro_batch(phase, large_towers, config, 16e9, 1, large_state)
    assert fits >= 256 and 16384 % fits == 0
    assert largest_micro_batch(phase, large_towers, config, 1e9, 1, large_state) == 0


def test_the_rows_of_similarities_are_those_of_the_phases_own_objective(large_towers, large_state):
    """As the same options of the run's objective: 64 rows of 4,096 float32, four times."""
    phase, chunked = PhaseConfig("main", 1, 64, 16, 4096), ObjectiveConfig(options={"chunk_size": 64})
    own = phase_memory(replace(phase, objective=chunked), large_towers, large_config(), 1, large_state)
    runs = phase_memory(phase, large_towers, replace(large_config(), objective=chunked), 1, large_state)
    assert own.loss == runs.loss == 4 * 64 * 4096 * 4
    plain = replace(phase, objective=ObjectiveConfig())
    assert phase_memory(plain, large_towers, replace(large_config(), objective=chunked), 1, large_state).loss > own.loss


def test_memory_hardly_grows_with_the_batch_at_a_fixed_micro_batch(large_towers, large_state):
    config = large_config()
    config.objective.options["chunk_size"] = 1024
    totals = [
        phase_memory(
            PhaseConfig("main", 1, 64, 16, batch, micro_batch_size=256), large_towers, config, 1, large_state
        ).total
        for batch in (1024, 16384)
    ]
    # 1,024 rows of similarities with as many more columns, and the embeddings; nothing else.
    assert totals[1] - totals[0] == (16384 - 1024) * 4 * (4 * 1024 + 4 * 768)


def test_devices_split_the_batch_and_fsdp_the_parameters(large_towers, large_state):
    phase = PhaseConfig("main", 1, 64, 16, 16384)
    one, many = (phase_memory(phase, large_towers, large_config(), n, large_state) for n in (1, 64))
    sharded = phase_memory(phase, large_towers, large_config(parallel="fsdp"), 64, large_state)
    assert one.activations == 64 * many.activations and one.parameters == many.parameters
    assert many.parameters // 64 == sharded.parameters and sharded.total < many.total


def test_large_towers_are_described_without_their_memory(large_towers):
    assert all(p.device.type == "meta" for p in large_towers.module.parameters())
    assert (large_towers.image.width, large_towers.image.depth, large_towers.image.mlp_ratio) == (1024, 24, 4)
    assert large_towers.text.mlp_ratio == 4 and large_towers.image.prefix_tokens == 0


def test_an_image_tower_without_plain_blocks_is_refused():
    with pytest.raises(ConfigError, match="no plain vision transformer"):
        describe_towers(replace(SMALL, image=ImageTowerConfig("resnet18")))


def test_measuring_trains_real_steps_and_reports_consistent_numbers():
    phase = PhaseConfig("x", 10, 32, 8, 64, micro_batch_size=4)
    config = PretrainConfig(model=REGISTER, phases=[phase], run=RunConfig(device="cpu"))
    towers = describe_towers(REGISTER)
    speed = measure_phase(config, phase, towers, Device("cpu"), seconds=0.01)
    assert speed.batch == 4 and speed.steps >= 1 and speed.device.startswith("cpu")
    cost = phase_cost(phase, towers)
    per_pair = 3 * (cost.image_forward_flops + cost.text_forward_flops)
    assert math.isclose(speed.flops_per_second, speed.pairs_per_second * per_pair)
