"""How many images a second one core prepares: this project's loader beside open_clip's own WebDataset pipeline.

Both read the same shards, crop at random (90 to 100 % of the area), resize to the same size, tokenise the same captions
to the same length and collate batches. Training steps are not measured here.
"""

import argparse
import io
import itertools
import json
import multiprocessing
import os
import statistics
import tarfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pretrain.config import AugmentationConfig, ConfigError, DataConfig, PhaseConfig
from pretrain.data.loader import build_loader
from pretrain.data.shards import ShardSource
from pretrain.data.views import plain_views

# Photographs in scikit-image's wheel; a crop of each is enlarged where the photograph is smaller than the source size.
_PHOTOGRAPHS = (
    "astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png", "hubble_deep_field.jpg",
    "retina.jpg", "ihc.png",
)  # fmt: skip
_QUALITIES = (95, 90)  # img2dataset writes 95
_WORDS = (
    "red small old wooden view front street garden morning light photograph picture house table river mountain boat "
    "summer kitchen market close hand painted glass with near under beside behind detail vintage handmade original"
).split()
_CROP = [0.9, 1.0]  # open_clip's default share of the area


@dataclass(frozen=True)
class DataBenchmark:
    """What is measured: batches of `batch_size` images of `image_size` pixels from `shards`."""

    shards: str
    image_size: int = 64
    context_length: int = 16
    batch_size: int = 256
    seconds: float = 10.0  # of each measurement
    repeats: int = 5  # of each pipeline, alternating
    seed: int = 0


@dataclass
class Rates:
    """Images a second of the repeats; `cpu` counts CPU time, workers' too, which other load changes less."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def make_shards(folder: Path, images: int = 2000, side: int = 512, per_shard: int = 500, seed: int = 0) -> str:
    """Write shards of square JPEGs with captions of 4 to 12 words in img2dataset's layout; returns their pattern.

    Raises:
        ConfigError: if scikit-image, whose photographs are cropped, is not installed.
    """
    try:
        import skimage
    except ImportError as error:
        raise ConfigError("the pictures are scikit-image's: pip install -e '.[mini]', or give --shards") from error
    data = Path(skimage.__file__).parent / "data"
    photographs = [Image.open(data / name).convert("RGB") for name in _PHOTOGRAPHS]
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(-(-images // per_shard)):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as archive:
            for i in range(number * per_shard, min(images, (number + 1) * per_shard)):
                photograph = photographs[i % len(photographs)]
                caption = " ".join(rng.choice(_WORDS, int(rng.integers(4, 13))))
                fields = {"caption": caption, "width": side, "height": side, "key": f"{i:09d}", "status": "success"}
                _add(archive, f"{i:09d}.jpg", _random_jpeg(photograph, side, _QUALITIES[i // 8 % 2], rng))
                _add(archive, f"{i:09d}.txt", caption.encode())
                _add(archive, f"{i:09d}.json", json.dumps(fields).encode())
    return f"{folder}/{{00000..{number:05d}}}.tar"


def _random_jpeg(photograph: Image.Image, side: int, quality: int, rng: np.random.Generator) -> bytes:
    crop = int(min(photograph.size) * rng.uniform(0.6, 1.0))
    left, top = (int(rng.integers(length - crop + 1)) for length in photograph.size)
    buffer = io.BytesIO()
    picture = photograph.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + crop, top + crop))
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def own_batches(benchmark: DataBenchmark, workers: int) -> Iterator[dict]:
    """Endless batches of this project's loader."""
    augmentation = AugmentationConfig(flip=False, crop_scale=_CROP, colour=0.0, grey_probability=0.0)
    config = DataConfig(shards=benchmark.shards, workers=workers, augmentation=augmentation)
    phase = PhaseConfig(
        steps=10**9, image_size=benchmark.image_size, context_length=benchmark.context_length,
        batch_size=benchmark.batch_size,
    )  # fmt: skip
    views = plain_views(config, phase)
    return iter(build_loader(ShardSource.from_config(config), None, views, config, phase, benchmark.seed))


def open_clip_batches(benchmark: DataBenchmark, workers: int) -> Iterator[tuple]:
    """Endless batches of open_clip's training pipeline at its default augmentation.

    Raises:
        ConfigError: if webdataset is not installed.
    """
    try:
        from open_clip import SimpleTokenizer, image_transform
        from open_clip_train.data import get_wds_dataset
    except ImportError as error:
        raise ConfigError(f"open_clip's pipeline needs webdataset ({error}): pip install -e '.[shards]'") from error
    arguments = argparse.Namespace(
        train_data=benchmark.shards, train_num_samples=10**9, train_data_upsampling_factors=None,
        dataset_resampled=True, batch_size=benchmark.batch_size, workers=workers, world_size=1, seed=benchmark.seed,
    )  # fmt: skip
    transform = image_transform(benchmark.image_size, is_train=True)
    tokenizer = SimpleTokenizer(context_length=benchmark.context_length)
    return iter(get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokenizer).dataloader)


PIPELINES = {"this project": own_batches, "open_clip": open_clip_batches}


def measure(batches: Iterator, batch_size: int, seconds: float) -> tuple[float, float]:
    """Images per second of wall time and of CPU time (workers' too), from whole batches over at least `seconds`."""
    wall, cpu, count = time.perf_counter(), _cpu_seconds(), 0
    for _ in batches:
        count += batch_size
        elapsed = time.perf_counter() - wall
        if elapsed >= seconds:
            break
    return count / elapsed, count / (_cpu_seconds() - cpu)


def _cpu_seconds() -> float:
    """CPU time of this process, and on Linux of its living workers (in ticks of 10 ms)."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        status = Path(f"/proc/{child.pid}/stat")
        if status.exists():
            # Behind the name in parentheses: state is field 3, user and system ticks are 14 and 15.
            user, system = status.read_text().rpartition(")")[2].split()[11:13]
            total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return total


def run(benchmark: DataBenchmark, workers: Iterable[int] = (0, 1)) -> dict[int, dict[str, Rates]]:
    """Measure both pipelines in turn, `repeats` times: rates by number of workers, then by pipeline.

    Each measurement starts its pipeline anew and leaves out the first batch, which starts workers and fills open_clip's
    shuffle buffer. So no worker prepares batches while the other pipeline is measured.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # per core
    results = {count: {name: Rates() for name in PIPELINES} for count in workers}
    try:
        for count, rates in results.items():
            for _, (name, make) in itertools.product(range(benchmark.repeats), PIPELINES.items()):
                batches = make(benchmark, count)
                next(batches)
                wall, cpu = measure(batches, benchmark.batch_size, benchmark.seconds)
                rates[name].wall.append(wall)
                rates[name].cpu.append(cpu)
                del batches  # ends its workers
    finally:
        torch.set_num_threads(threads)
    return results


def to_markdown(results: dict[int, dict[str, Rates]]) -> str:
    """A table of medians (and ranges) with the ratio of the medians."""
    lines = [
        "| workers | measured in | this project, images/s | open_clip, images/s | ratio |",
        "|---|---|---|---|---|",
    ]
    for workers, rates in results.items():
        for kind in ("wall", "cpu"):
            ours, theirs = getattr(rates["this project"], kind), getattr(rates["open_clip"], kind)
            ratio = statistics.median(ours) / statistics.median(theirs)
            cells = [f"{statistics.median(v):.0f} ({min(v):.0f} to {max(v):.0f})" for v in (ours, theirs)]
            name = f"{workers}" if workers else "0 (in the process)"
            lines.append(f"| {name} | {kind} time | {cells[0]} | {cells[1]} | **{ratio:.2f}** |")
    return "\n".join(lines)
