"""Detect words in pictures: `python tools/demo.py --input street.jpg --vocabulary "taxi, fire hydrant"`."""

import argparse
import contextlib
import logging
import sys
import warnings
from pathlib import Path

# Python puts this folder first on the path, where `pretrain.py` would pass for the package `pretrain`.
sys.path[0] = str(Path(__file__).resolve().parents[1])


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


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", required=True, nargs="+", metavar="PATH", help="pictures, or folders of pictures")
    parser.add_argument(
        "--vocabulary", required=True, metavar="WORDS", help='"koala, taco", or a .txt (a word a line) or .json file'
    )
    parser.add_argument("--output", type=Path, default=Path("demo/detections"), help="folder (default: %(default)s)")
    parser.add_argument(
        "--weights", default="mini", metavar="DIR", help="detector folder, or a name that ships (default: %(default)s)"
    )
    parser.add_argument("--threshold", type=share, default=0.3, help="lowest score, 0..1 (default: %(default)s)")
    parser.add_argument("--max-detections", type=at_least_one, default=100, help="a picture (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    return parser.parse_args(arguments)


@contextlib.contextmanager
def notes():
    """Print warnings about words as one line each, without file names and source lines."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
        yield


def run(options: argparse.Namespace) -> int:
    """Load, detect, print where the output went; the exit status is 1 when a picture had to be left out."""
    # Cheap checks first: a mistyped path should not have to wait for the network to load.
    from ovd.data.images import list_images
    from ovd.text.vocabulary import Vocabulary

    for path in options.input:
        list_images(path)
    with notes():
        vocabulary = Vocabulary.parse(options.vocabulary)

    from tqdm import tqdm

    # Remarks of PyTorch to the authors of libraries, not to users of this command.
    warnings.filterwarnings("ignore", message="torch.meshgrid", category=UserWarning)
    logging.getLogger("torch.fx").setLevel(logging.ERROR)
    from ovd.detector import OpenVocabularyDetector
    from ovd.inference import collect_images, detect_files
    from pretrain.engine.device import Device

    device = Device(options.device).torch_device
    is_folder = Path(options.weights).is_dir() or "/" in options.weights
    load = OpenVocabularyDetector.from_checkpoint if is_folder else OpenVocabularyDetector.from_pretrained
    detector = load(options.weights, device)
    with notes():
        detector.set_vocabulary(vocabulary)
    images = collect_images(options.input)

    def report(_: Path, reason: str) -> None:
        tqdm.write(f"left out: {reason}", file=sys.stderr)

    def bar(jobs):
        return tqdm(jobs, desc="detecting", unit="picture", disable=None if len(jobs) > 1 else True)

    summary = detect_files(
        detector, images, options.output, options.threshold, options.max_detections, on_error=report, progress=bar
    )
    print(f"{summary.detections} detections in {len(summary.pictures)} pictures: {options.output}")
    print(f"boxes, masks and scores as COCO-style JSON: {summary.results}")
    if summary.failed:
        print(f"{len(summary.failed)} of {len(images)} pictures could not be read", file=sys.stderr)
    return 1 if summary.failed else 0


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; what a user can mend is one sentence on stderr."""
    options = parse(arguments)
    try:
        return run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the annotated pictures so far are complete", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
