"""`ovd-web`: serve the page with a picture and words in and detections out; without options on this machine only."""

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from ovd.commands.quiet import quieten_libraries


def _port(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{text} does not lie in 1..65535")
    return value


def _share_of_one(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie in 0..1")
    return value


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="ovd-web", description=__doc__)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets the network in (default: %(default)s)"
    )
    parser.add_argument("--port", type=_port, help="(default: the first free one from 7860)")
    parser.add_argument(
        "--weights", default="mini", metavar="DIR", help="detector folder, or a name that ships (default: %(default)s)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    parser.add_argument(
        "--threshold",
        type=_share_of_one,
        help="where the slider starts, 0..1 (default: 0.5 of calibrated scores, 0.3 of raw ones)",
    )
    parser.add_argument(
        "--share",
        action="store_true",
        help="also open a public address through gradio's servers, for whoever has it (default: off)",
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Load the detector, serve until interrupted."""
    quieten_libraries()
    try:
        from ovd.web.page import build_page, serve_page
    except ImportError as error:
        if error.name != "gradio":
            raise
        raise ValueError("the page needs gradio: pip install -e '.[web]'") from error
    from ovd.calibration import CALIBRATED_THRESHOLD, RAW_THRESHOLD
    from ovd.detector import OpenVocabularyDetector
    from ovd.web.finder import Finder
    from pretrain.engine.device import Device

    device = Device(options.device).torch_device
    is_folder = Path(options.weights).is_dir() or "/" in options.weights
    load = OpenVocabularyDetector.from_checkpoint if is_folder else OpenVocabularyDetector.from_pretrained
    detector = load(options.weights, device)
    threshold = options.threshold
    if threshold is None:
        threshold = RAW_THRESHOLD if detector.calibration is None else CALIBRATED_THRESHOLD
    page = build_page(Finder(detector), threshold)
    address = serve_page(page, options.host, options.port, options.share)
    if options.host not in ("127.0.0.1", "localhost", "::1"):
        print("note: the page has no password; everyone who reaches this address can use it", file=sys.stderr)
    print(f"the page is at {address} (Ctrl-C ends it)", flush=True)
    try:
        while page.is_running:
            time.sleep(0.2)
    finally:
        page.close(verbose=False)
    return 0


def _end(*_: object) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; what a user can mend is one sentence on stderr."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, _end)  # as Ctrl-C: the visitors' pictures are removed then too
    # A folder of this process and user alone; gradio's own is one in /tmp for all its programs, and stays.
    with tempfile.TemporaryDirectory(prefix="ovd-web-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            return run(options)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 0


if __name__ == "__main__":
    sys.exit(main())
