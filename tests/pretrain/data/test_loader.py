"""Batch plans and loaders: complete, reproducible, resumable, independent of the number of workers."""

import pytest
import torch
from PIL import Image

from pretrain.config import AugmentationConfig, ConfigError, DataConfig, PhaseConfig
from pretrain.data.folder import ImageStore, TableSource, read_table, select_split
from pretrain.data.loader import BatchPlan, TrainingPairs, build_loader, plan_epoch, worker_count
from pretrain.data.transforms import TrainingView
from pretrain.data.views import Views, plain_views

SMALL_VIEWS = plain_views(DataConfig(), PhaseConfig(image_size=16))


@pytest.mark.parametrize(("size", "batch"), [(10, 5), (11, 5), (7, 7), (100, 1)])
def test_an_epoch_is_full_batches_without_repeats(size, batch):
    batches = plan_epoch(size, batch, seed=3, epoch=0)
    rows = [row for b in batches for row in b]
    assert len(batches) == size // batch and all(len(b) == batch for b in batches)
    assert len(set(rows)) == len(rows) and set(rows) <= set(range(size))


def test_an_epoch_depends_on_seed_and_epoch_only():
    assert plan_epoch(20, 4, 1, 2) == plan_epoch(20, 4, 1, 2)
    assert plan_epoch(20, 4, 1, 2) != plan_epoch(20, 4, 1, 3)
    assert plan_epoch(20, 4, 1, 2) != plan_epoch(20, 4, 2, 2)


@pytest.mark.parametrize("epoch", range(4))
def test_no_two_pairs_of_a_batch_share_their_group(epoch):
    groups = [str(i % 9) for i in range(60)] + ["0"] * 15  # one group is much larger than the others
    batches = plan_epoch(len(groups), 8, seed=0, epoch=epoch, groups=groups)
    rows = [row for batch in batches for row in batch]
    assert all(len({groups[row] for row in batch}) == len(batch) == 8 for batch in batches)
    assert len(set(rows)) == len(rows)
    assert len(batches) >= 6  # 60 rows of 9 even groups alone allow 7 batches of 8


def test_equal_groups_use_every_row_that_fills_a_batch():
    groups = [str(i // 3) for i in range(36)]
    assert len(plan_epoch(36, 12, seed=0, epoch=0, groups=groups)) == 3


@pytest.mark.parametrize("first", [0, 1, 4, 5, 6, 13, 17])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_resumed_plan_is_the_tail_of_the_full_plan(first, grouped):
    groups = [str(i % 6) for i in range(23)] if grouped else None
    full = list(BatchPlan(23, 4, 7, 0, 17, groups))
    assert len(full) == 17 and len({epoch for batch in full for epoch, _ in batch}) > 2  # several epochs
    resumed = BatchPlan(23, 4, 7, first, 17, groups)
    assert list(resumed) == full[first:] and len(resumed) == 17 - first


def test_too_few_rows_or_groups_for_a_batch_are_refused():
    with pytest.raises(ConfigError, match=r"3 rows do not fill one batch of 4: lower phases\[0\].batch_size"):
        BatchPlan(3, 4, 0, 0, 1, None)
    with pytest.raises(ConfigError, match="8 rows of 2 distinct values do not fill one batch of 4"):
        BatchPlan(8, 4, 0, 0, 1, ["a", "b"] * 4)


def loaded(table, workers=0, first=0, seed=5, **data):
    rows = select_split(read_table(table), "train", str(table))
    phase = PhaseConfig(steps=7, image_size=32, context_length=8, batch_size=10)
    config = DataConfig(table=str(table), workers=workers, **data)
    return list(build_loader(rows, ImageStore(table.parent), plain_views(config, phase), config, phase, seed, first))


def assert_same_batches(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["tokens"], b["tokens"])


def test_batches_have_the_documented_shapes(pairs_table):
    batches = loaded(pairs_table)
    assert len(batches) == 7
    for batch in batches:
        assert batch["image"].shape == (10, 3, 32, 32) and batch["image"].dtype == torch.uint8
        assert batch["tokens"].shape == (10, 8) and batch["tokens"].dtype == torch.int64


def test_a_sample_does_not_depend_on_the_number_of_workers(pairs_table):
    assert_same_batches(loaded(pairs_table, workers=0), loaded(pairs_table, workers=2))


def test_a_resumed_loader_gives_the_same_batches(pairs_table):
    assert_same_batches(loaded(pairs_table, first=4), loaded(pairs_table)[4:])


def test_another_epoch_augments_differently(pairs_table):
    first, last = loaded(pairs_table)[0], loaded(pairs_table)[-1]
    assert not torch.equal(first["image"].float().mean(0), last["image"].float().mean(0))
    assert not torch.equal(first["image"], loaded(pairs_table, seed=6)[0]["image"])


def test_an_unknown_grouping_column_is_named(pairs_table):
    with pytest.raises(ConfigError, match="data.unique_by: the table has no column 'kind'; it has image, caption"):
        loaded(pairs_table, unique_by="kind")


def test_a_broken_image_is_counted_and_the_next_row_takes_its_place(tmp_path, capfd):
    rows = [{"image": f"{i}.png", "caption": f"thing {i}"} for i in range(3)]
    for i in (0, 2):
        Image.new("RGB", (20, 20), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"not a picture")
    store = ImageStore(tmp_path)
    pairs = TrainingPairs(TableSource(rows, store), SMALL_VIEWS, seed=0)
    assert pairs[(0, 1)]["tokens"] == "thing 2"
    assert pairs[(1, 1)]["tokens"] == "thing 2"
    assert store.broken == 2
    assert capfd.readouterr().err.count("left out:") == 1


def test_nothing_readable_is_an_error_that_names_the_setting(tmp_path):
    source = TableSource([{"image": "a.png", "caption": "a"}], ImageStore(tmp_path))
    pairs = TrainingPairs(source, SMALL_VIEWS, seed=0)
    with pytest.raises(OSError, match="data.root"):
        pairs[(0, 0)]


def second_caption(row, rng):
    return f"{row['caption']} {rng.integers(1000)}"


@pytest.mark.parametrize("workers", [0, 2])
def test_several_views_of_a_pair_reach_the_batch_under_their_keys(pairs_table, workers):
    rows = select_split(read_table(pairs_table), "train", str(pairs_table))
    phase, config = PhaseConfig(steps=2, image_size=32, context_length=8, batch_size=10), DataConfig(workers=workers)
    plain = plain_views(config, phase)
    small = TrainingView(16, AugmentationConfig())
    views = Views({**plain.images, "small": small}, {**plain.captions, "other": second_caption})
    store = ImageStore(pairs_table.parent)
    batch = next(iter(build_loader(rows, store, views, config, phase, 5)))
    assert list(batch) == ["image", "small", "tokens", "other"]
    assert batch["small"].shape == (10, 3, 16, 16) and batch["other"].shape == (10, 8)
    alone = next(iter(build_loader(rows, store, plain, config, phase, 5)))
    assert torch.equal(batch["image"], alone["image"])  # what comes first does not depend on what follows
    without_texts = next(iter(build_loader(rows, store, Views({"small": small}), config, phase, 5)))
    assert list(without_texts) == ["small"]


@pytest.mark.parametrize(
    ("given", "cores", "environment", "expected"),
    [
        (None, 96, {}, 96),
        (None, 96, {"LOCAL_WORLD_SIZE": "8"}, 12),  # torchrun
        (None, 8, {"PJRT_LOCAL_PROCESS_COUNT": "4"}, 2),  # torch_xla.launch
        (None, 2, {"LOCAL_WORLD_SIZE": "4"}, 1),
        (3, 96, {"LOCAL_WORLD_SIZE": "8"}, 3),
        (0, 96, {}, 0),
    ],
)
def test_workers_are_those_given_or_the_processs_share_of_its_cores(given, cores, environment, expected, monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "PJRT_LOCAL_PROCESS_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    assert worker_count(given) == expected


def test_null_starts_as_many_workers_as_there_are_cores_and_changes_no_batch(pairs_table, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2})
    rows = select_split(read_table(pairs_table), "train", str(pairs_table))
    phase, config = PhaseConfig(steps=3, image_size=32, context_length=8, batch_size=10), DataConfig(workers=None)
    views, store = plain_views(config, phase), ImageStore(pairs_table.parent)
    loader = build_loader(rows, store, views, config, phase, seed=5)
    assert loader.num_workers == 3
    assert_same_batches(list(loader), list(build_loader(rows, store, views, DataConfig(workers=0), phase, seed=5)))
