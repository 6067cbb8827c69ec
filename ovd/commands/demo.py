"""Detect words in pictures, videos and cameras: `ovd-demo --input street.jpg --vocabulary "taxi, fire hydrant"`."""

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ovd.commands.quiet import quieten_libraries
from pretrain.commands.outcome import exit_status

FORMATS = ("json", "csv", "labelme", "yolo")
VOCABULARY = '"koala, taco", a .txt or .json file, lvis or coco, or a file of tools/embed_vocabulary.py'
EPILOG = """\
Pictures give <name>.png, videos <name>.mp4. --save adds, in the output folder:
  json     detections.json (COCO style; masks as run lengths), for a video <name>.jsonl with a line a frame
  csv      detections.csv, for a video <name>.csv: a line a detection
  labelme  labelme/<name>.json        yolo  yolo/<name>.txt and classes.txt (labels of frames: <name>_frames/)
Exit status: 0; 1 where something had to be left out, or nothing could be done; 2 for a mistake in the options.
"""


def share(text: str) -> float:
    """A number from 0 to 1, for argparse."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie in 0..1")
    return value


def at_least_one(text: str) -> int:
    """A whole number from 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def make_parser() -> argparse.ArgumentParser:
    """Every option."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", required=True, nargs="+", metavar="PATH", help="pictures, videos, folders, or 0 for a camera")
    add("--vocabulary", required=True, metavar="WORDS", help=VOCABULARY)
    add("--output", type=Path, default=Path("demo/detections"), help="folder (default: %(default)s)")
    add("--save", nargs="*", choices=FORMATS, default=["json"], help="besides the drawings (default: json)")
    add("--weights", default="mini", metavar="DIR", help="detector folder, or a name that ships (default: %(default)s)")
    add("--threshold", type=share, help="lowest score, 0..1 (default: 0.5 of calibrated scores, 0.3 of raw ones)")
    add("--raw-scores", action="store_true", help="the network's own scores even where there is a calibration")
    add("--max-detections", type=at_least_one, default=100, metavar="N", help="a picture (default: %(default)s)")
    add("--tile", type=at_least_one, metavar="PX", help="also look at tiles of this side, for small objects")
    add("--overlap", type=share, default=0.25, help="share of a tile (default: %(default)s)")
    add("--every", type=at_least_one, default=1, metavar="N", help="look at each N-th frame (default: %(default)s)")
    add("--max-frames", type=at_least_one, metavar="N", help="of a video or camera (default: all, until Ctrl-C)")
    add("--batch-size", type=at_least_one, default=4, metavar="N", help="pictures at once (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    add("--precision", choices=("auto", "float32", "bfloat16", "float16"), default="float32", help="(default: float32)")
    return parser


@contextlib.contextmanager
def notes() -> Iterator[None]:
    """Print warnings about words as one line each, without file names and source lines."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        quieten_libraries()
        warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
        yield


def load_detector(weights: str, device: str, precision: str) -> Any:
    """A detector from a folder, or one that ships, by what `weights` looks like."""
    quieten_libraries()
    from ovd.detector import OpenVocabularyDetector

    is_folder = Path(weights).is_dir() or "/" in weights
    load = OpenVocabularyDetector.from_checkpoint if is_folder else OpenVocabularyDetector.from_pretrained
    with notes():
        return load(weights, device, precision)


def run(options: argparse.Namespace) -> int:
    """Load, detect, print where the output went; the exit status is 1 when something had to be left out."""
    # Cheap checks first: a mistyped path should not have to wait for the network to load.
    from ovd.known_vocabularies import parse_vocabulary
    from ovd.sources import sort_sources
    from ovd.text.embedding_file import is_embedding_file, read_info

    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # a damaged video gets one sentence of ours
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    pictures, videos = sort_sources(options.input)
    vocabulary = options.vocabulary
    if is_embedding_file(vocabulary):
        read_info(vocabulary)
    else:
        with notes():
            vocabulary = parse_vocabulary(vocabulary)
    detector = load_detector(options.weights, options.device, options.precision)
    with notes():
        detector.set_vocabulary(vocabulary)
    predict = {
        "max_detections": options.max_detections, "calibrated": not options.raw_scores,
        "tile": options.tile, "overlap": options.overlap,
    }  # fmt: skip
    failed = _detect_pictures(detector, pictures, options, predict) if pictures else 0
    failed += _detect_videos(detector, videos, options, predict)
    return 1 if failed else 0


def _detect_pictures(detector: Any, pictures: list[Path], options: argparse.Namespace, predict: dict) -> int:
    from tqdm import tqdm

    from ovd.inference import detect_files

    def report(_: Path, reason: str) -> None:
        tqdm.write(f"left out: {reason}", file=sys.stderr)

    def bar(jobs):
        return tqdm(jobs, desc="detecting", unit="picture", disable=None if len(jobs) > 1 else True)

    summary = detect_files(
        detector, pictures, options.output, options.threshold, on_error=report, progress=bar, formats=options.save,
        batch_size=options.batch_size, **predict,
    )  # fmt: skip
    print(f"{summary.detections} detections in {len(summary.pictures)} pictures: {options.output}")
    _print_files(summary.files)
    if summary.failed:
        print(f"{len(summary.failed)} of {len(pictures)} pictures could not be read", file=sys.stderr)
    return len(summary.failed)


def _detect_videos(detector: Any, videos: list[Path | int], options: argparse.Namespace, predict: dict) -> int:
    from ovd.inference import output_names

    names = output_names([Path(f"camera_{video}") if isinstance(video, int) else video for video in videos])
    names = [name.removesuffix(".png") for name in names]
    return sum(_detect_video(detector, v, n, options, predict) for v, n in zip(videos, names, strict=True))


def _detect_video(detector: Any, source: Path | int, name: str, options: argparse.Namespace, predict: dict) -> int:
    """Returns 1 where the video had to be left out or ended before its end."""
    from tqdm import tqdm

    from ovd.video import VideoError, detect_video

    def bar(frames, total=None):
        return tqdm(frames, total=total, desc=str(source), unit="frame", disable=None)

    try:
        summary = detect_video(
            detector, source, options.output, name, every=options.every, max_frames=options.max_frames,
            formats=options.save, batch_size=1 if isinstance(source, int) else options.batch_size, progress=bar,
            threshold=options.threshold, **predict,
        )  # fmt: skip
    except VideoError as error:
        print(f"left out: {error}", file=sys.stderr)
        return 1
    print(f"{summary.detections} detections in {summary.looked_at} of {summary.frames} frames: {summary.video}")
    _print_files(summary.files)
    wanted = min(filter(None, (summary.expected, options.max_frames)), default=0)
    if summary.frames < wanted and not summary.interrupted:
        print(f"{source} ends early: {summary.frames} of {wanted} frames could be read", file=sys.stderr)
        return 1
    if summary.interrupted and not isinstance(source, int):
        raise KeyboardInterrupt
    return 0


def _print_files(files: dict[str, Path]) -> None:
    if "json" in files:
        print(f"boxes, masks and scores as COCO-style JSON: {files['json']}")
    for name in sorted(set(files) - {"json"}):
        print(f"{name}: {files[name]}")


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; what a user can mend is one sentence on stderr."""
    options = make_parser().parse_args(arguments)
    return exit_status(lambda: run(options), "interrupted; the annotated pictures and frames so far are complete")
