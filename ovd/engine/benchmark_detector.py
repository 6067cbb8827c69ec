"""How fast the detector is: training steps and inference beside Detectron2's ViTDet Mask R-CNN, and large vocabularies.

Both run in turn on the same random pictures; the models are built in `detectron2_reference`. Loading and decoding of
pictures is not measured. Importing this file imports neither torch nor Detectron2.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

OWN, REFERENCE = "this project", "Detectron2"
# Work that Mask R-CNN does not have: reading the image-text score from the backbone's map costs little, a second pass
# of a tower over the picture or over every proposal's crop does not.
VLM_MODES = {
    "off": "text classifier alone",
    "backbone": "and image-text score on the backbone's map",
    "frozen_copy": "and image-text score on a frozen copy's map (a second tower)",
    "crops": "and image-text score of crops (a tower on every proposal)",
}
PARTS = ("training", "inference", "vocabulary")


@dataclass(frozen=True)
class DetectorBenchmark:
    """What is measured.

    Attributes:
        tower: name in `detectron2_reference.TOWERS`.
        image_size: side of the square pictures, a multiple of 64 pixels: windows are a quarter of it, as published.
        heads: name in `detectron2_reference.HEADS`.
        batch_size: pictures of a step, and of one call at inference.
        words: of the vocabulary beside Detectron2, which has as many classes.
        vocabularies: numbers of words compared with each other, the first being the measure.
        modes: of `VLM_MODES`, beside Detectron2.
        relative_positions: give Detectron2's tower its relative positions, which ours does not have.
        device: "cpu" or "cuda".
        bf16: compute under bfloat16 autocast.
        repeats: of everything, in turn.
    """

    tower: str = "mini"
    image_size: int = 320
    heads: str = "small"
    batch_size: int = 2
    words: int = 80
    vocabularies: tuple[int, ...] = (80, 1203, 20_000)
    modes: tuple[str, ...] = tuple(VLM_MODES)
    relative_positions: bool = False
    device: str = "cpu"
    bf16: bool = False
    repeats: int = 5


@dataclass
class Timing:
    """Seconds of each repeat: of CPU time of all threads (nothing on a GPU), and of wall time (events on a GPU)."""

    name: str
    wall: list[float]
    cpu: list[float]

    @property
    def seconds(self) -> list[float]:
        """CPU time, which other load on the machine changes less; wall time where the CPU only waits."""
        return self.cpu or self.wall


@dataclass
class Work:
    """One thing to time: `run` between two readings of the clock, `prepare` before the first."""

    name: str
    run: Callable[[], None]
    prepare: Callable[[], None] = lambda: None


def time_in_turn(works: list[Work], repeats: int, device: str) -> list[Timing]:
    """Time everything once in each repeat, in the opposite order every second time, after one run to warm up."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    timings = [Timing(work.name, [], []) for work in works]
    for repeat in range(-1, repeats):
        order = list(zip(works, timings, strict=True))[:: -1 if repeat % 2 else 1]
        for work, timing in order:
            work.prepare()
            wait()
            wall, cpu = time.perf_counter(), time.process_time()
            work.run()
            wait()
            if repeat < 0:
                continue
            timing.wall.append(time.perf_counter() - wall)
            if device == "cpu":
                timing.cpu.append(time.process_time() - cpu)
    return timings


def check(benchmark: DetectorBenchmark) -> None:
    """Refuse what cannot be measured.

    Raises:
        ConfigError: an unknown name, a size that windows do not divide, or a count below 1.
    """
    import torch

    from ovd.engine.detectron2_reference import HEADS, TOWERS
    from pretrain.config import ConfigError

    for option, given, known in (
        ("--tower", [benchmark.tower], TOWERS),
        ("--heads", [benchmark.heads], HEADS),
        ("--modes", benchmark.modes, VLM_MODES),
        ("--device", [benchmark.device], ("cpu", "cuda")),
    ):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ConfigError(f"{option} {unknown[0]} is not known; choose from {', '.join(known)}")
    if benchmark.image_size < 64 or benchmark.image_size % 64:
        raise ConfigError(f"--image-size {benchmark.image_size} is not a multiple of 64 pixels, four windows; use one")
    for option, least in (("batch_size", 1), ("words", 1), ("repeats", 1)):
        if getattr(benchmark, option) < least:
            raise ConfigError(f"--{option.replace('_', '-')} is {getattr(benchmark, option)}; give at least {least}")
    if any(words < 1 for words in benchmark.vocabularies):
        raise ConfigError(f"--vocabularies {benchmark.vocabularies} has a number below 1; every vocabulary has words")
    if benchmark.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda and PyTorch sees no GPU; use --device cpu, or check the driver")


def compare_training(benchmark: DetectorBenchmark) -> list[Timing]:
    """Steps of Detectron2's trainer and model, then of ours with the text classifier alone."""
    from detectron2.engine import SimpleTrainer

    from ovd.engine import detectron2_reference as models
    from ovd.engine.step import DetectorTrainer

    scene = models.Scene(benchmark)
    own = scene.own("off")
    reference = models.Autocast(scene.reference(own), benchmark.bf16)
    steps = {
        REFERENCE: models.training_step(reference, scene.inputs, SimpleTrainer),
        OWN: models.training_step(own, scene.inputs, DetectorTrainer, dtype=scene.dtype),
    }
    return time_in_turn([Work(name, run) for name, run in steps.items()], benchmark.repeats, benchmark.device)


def compare_inference(benchmark: DetectorBenchmark) -> tuple[list[Timing], list[str]]:
    """Detectron2's inference, then ours in each mode; and a line on what each of the first two found."""
    from ovd.engine import detectron2_reference as models

    scene = models.Scene(benchmark)
    own = scene.own("off")
    reference = scene.reference(own)
    threshold = models.match_detections(own, reference, scene.inputs)
    notes = [f"Detectron2's score threshold: {threshold:g}"]
    for name, model in ((OWN, own), (REFERENCE, reference)):
        proposals, detections = models.count_regions(model, scene.inputs)
        notes.append(f"{name}: {proposals:g} proposals and {detections:g} detections a picture")
    detectors = {mode: own if mode == "off" else scene.own(mode) for mode in benchmark.modes}
    works = [Work(REFERENCE, scene.inference(reference))]
    works += [Work(f"{OWN}: {VLM_MODES[mode]}", scene.inference(model)) for mode, model in detectors.items()]
    return time_in_turn(works, benchmark.repeats, benchmark.device), notes


def compare_vocabularies(benchmark: DetectorBenchmark, mode: str) -> list[Timing]:
    """Inference of one detector with each number of words."""
    from ovd.engine import detectron2_reference as models

    scene = models.Scene(benchmark)
    own = scene.own(mode)
    run = scene.inference(own)
    works = [
        Work(f"{words:,} words", run, lambda words=words: own.set_text_embeddings(scene.words(words)))
        for words in benchmark.vocabularies
    ]
    return time_in_turn(works, benchmark.repeats, benchmark.device)


def to_markdown(title: str, timings: list[Timing]) -> str:
    """A table of medians (and ranges), and ratios of medians (and the range of the repeats' ratios) to the first."""
    clock = "CPU s" if timings[0].cpu else "s"
    lines = [f"| {title} | {clock} | ratio | wall s |", "|---|---|---|---|"]
    first = timings[0]
    for timing in timings:
        seconds, ratio = timing.seconds, "1"
        if timing is not first:
            each = [a / b for a, b in zip(seconds, first.seconds, strict=True)]
            middle = statistics.median(seconds) / statistics.median(first.seconds)
            ratio = f"**{middle:.2f}** ({min(each):.2f} to {max(each):.2f})"
        spread = f"{statistics.median(seconds):.3g} ({min(seconds):.3g} to {max(seconds):.3g})"
        lines.append(f"| {timing.name} | {spread} | {ratio} | {statistics.median(timing.wall):.3g} |")
    return "\n".join(lines) + "\n"


def add_detector_command(commands: argparse._SubParsersAction) -> None:
    """Options of `detector`."""
    default = DetectorBenchmark()
    parser = commands.add_parser("detector", help="training step and inference beside Detectron2's ViTDet Mask R-CNN")
    parser.add_argument("--tower", default=default.tower, help="mini, vit_ti, vit_s, vit_b or vit_l; patches of 16 px")
    parser.add_argument("--image-size", type=int, default=default.image_size, help="pixels, a multiple of 64")
    parser.add_argument("--heads", default=default.heads, help="small (the miniature's) or published (ViTDet's)")
    parser.add_argument("--batch-size", type=int, default=default.batch_size, help="pictures")
    parser.add_argument("--words", type=int, default=default.words, help="classes beside Detectron2")
    parser.add_argument(
        "--vocabularies", type=int, nargs="*", default=list(default.vocabularies), help="words, compared"
    )
    parser.add_argument("--modes", nargs="*", default=default.modes, help=f"of {', '.join(VLM_MODES)}")
    parser.add_argument("--relative-positions", action="store_true", help="in Detectron2's tower, as ViTDet has them")
    parser.add_argument("--device", default=default.device, help="cpu or cuda")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast, for both")
    parser.add_argument("--repeats", type=int, default=default.repeats, help="of everything, in turn")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--skip", nargs="*", default=[], choices=PARTS, help="parts to leave out")
    parser.set_defaults(run=run_detector)


def run_detector(options: argparse.Namespace) -> None:
    """Measure each part and print its table."""
    import torch

    torch.set_num_threads(max(1, options.threads))
    given = {name: getattr(options, name) for name in DetectorBenchmark.__dataclass_fields__}
    benchmark = DetectorBenchmark(
        **{**given, "vocabularies": tuple(options.vocabularies), "modes": tuple(options.modes)}
    )
    check(benchmark)
    print(_describe(benchmark))
    if "training" not in options.skip:
        print(to_markdown("training step", compare_training(benchmark)))
    if "inference" not in options.skip and benchmark.modes:
        timings, notes = compare_inference(benchmark)
        print(to_markdown("inference", timings) + "\n" + "; ".join(notes) + "\n")
    if "vocabulary" not in options.skip and benchmark.vocabularies:
        for mode in ("off", "backbone"):
            print(to_markdown(f"inference, {VLM_MODES[mode]}", compare_vocabularies(benchmark, mode)))


def _describe(benchmark: DetectorBenchmark) -> str:
    import torch

    device = torch.cuda.get_device_name() if benchmark.device == "cuda" else f"{platform.machine()} CPU"
    load = f", load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores" if hasattr(os, "getloadavg") else ""
    return (
        f"{device}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, "
        f"{'bfloat16' if benchmark.bf16 else 'float32'}{load}\n{benchmark.tower}, {benchmark.image_size} px, "
        f"{benchmark.heads} heads, batches of {benchmark.batch_size}, {benchmark.words} words, "
        f"{benchmark.repeats} repeats\n"
    )
