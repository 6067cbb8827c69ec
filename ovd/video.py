"""Detect in videos and cameras, frame by frame: an annotated video and results in files, never all frames in memory.

Reading and writing is OpenCV's; sound is not copied, and of an odd width or height the codec cuts one pixel off.
Frames between two that are looked at show the detections of the one before.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ovd.detections import Detections
from ovd.detector import OpenVocabularyDetector
from ovd.results_writer import Item, ResultsWriter
from ovd.visualization import distinct_colours, draw_detections
from pretrain.atomic import replacing

_USUAL_RATE = 25.0  # frames a second of a source that does not tell
_HIGHEST_RATE = 1000.0
_CODEC = "mp4v"  # the one that every build of OpenCV's wheel can write


class VideoError(ValueError):
    """A video or camera that cannot be used; the message names it and the reason."""


@dataclass
class VideoSummary:
    """What a run over one video did.

    Attributes:
        video: the annotated video.
        frames: read and written.
        expected: frames that the file promises; 0 where it does not say, as cameras do.
        looked_at: frames that went through the network.
        detections: in those frames.
        files: results by format.
        interrupted: ended by Ctrl-C; what was written until then is complete.
    """

    video: Path
    frames: int = 0
    expected: int = 0
    looked_at: int = 0
    detections: int = 0
    files: dict[str, Path] = field(default_factory=dict)
    interrupted: bool = False


def detect_video(
    detector: OpenVocabularyDetector,
    source: str | Path | int,
    output: str | Path,
    name: str | None = None,
    *,
    every: int = 1,
    max_frames: int | None = None,
    formats: Sequence[str] = ("json",),
    batch_size: int = 4,
    progress: Callable[..., Iterable] | None = None,
    **options: Any,
) -> VideoSummary:
    """Detect in a video, and write `<output>/<name>.mp4` and the files of `ResultsWriter`.

    Args:
        detector: with a vocabulary, which must stay the same meanwhile.
        source: a file, or the number of a camera, which is read until Ctrl-C or `max_frames`.
        output: folder; made when missing.
        name: of the files; None takes that of the source.
        every: look at each so many frames; all of them are written.
        max_frames: stop after so many; None goes on to the end.
        formats: some of `ovd.results_writer.FORMATS`, of the frames that were looked at.
        batch_size: most frames in memory; those of them to be looked at go through the network together.
        progress: wraps the frames for display, called with `total` (`tqdm`-like).
        options: of `OpenVocabularyDetector.predict`.

    Raises:
        ValueError: no vocabulary is set, or an argument is out of range.
        VideoError: the source cannot be read, or the video cannot be written.
    """
    if detector.vocabulary is None:
        raise ValueError("the detector has no vocabulary yet; call set_vocabulary first")
    if every < 1 or batch_size < 1 or (max_frames is not None and max_frames < 1):
        raise ValueError(f"every {every}, batch_size {batch_size} and max_frames {max_frames} must be at least 1")
    words, output = detector.vocabulary.words, Path(output)
    name = name or (f"camera_{source}" if isinstance(source, int) else Path(source).stem)
    target = output / f"{name}.mp4"
    if not isinstance(source, int) and target.resolve() == Path(source).resolve():
        raise ValueError(f"{target} is the video itself and would be overwritten; give another output folder")
    summary = VideoSummary(target)
    with _reading(source) as capture:
        first, rate, summary.expected = _open(capture, source)
        numbered = enumerate(islice(_frames(capture, first), max_frames))
        total = min(filter(None, (summary.expected, max_frames)), default=None)
        shown = progress(numbered, total=total) if progress else numbered
        with (
            ResultsWriter(output, words, formats, stem=name, frames=True) as writer,
            _writing(target, rate, first.shape[:2]) as write,
        ):
            summary.files = writer.paths
            job = _Job(detector, writer, write, str(source), rate, every, options)
            try:
                for group in _groups(shown, batch_size):
                    job.run(group)
            except KeyboardInterrupt:
                summary.interrupted = True
        summary.frames, summary.looked_at, summary.detections = job.frames, job.looked_at, writer.detections
    return summary


class _Job:
    """The frames of one video on their way from the source to the files."""

    def __init__(
        self,
        detector: OpenVocabularyDetector,
        writer: ResultsWriter,
        write: Callable[[np.ndarray], None],
        source: str,
        rate: float,
        every: int,
        options: dict[str, Any],
    ) -> None:
        self.detector, self.writer, self.write = detector, writer, write
        self.source, self.rate, self.every, self.options = source, rate, every, options
        self.colours = distinct_colours(writer.words)
        self.latest: Detections | None = None
        self.frames = self.looked_at = 0

    def run(self, group: list[tuple[int, np.ndarray]]) -> None:
        """Detect in the frames of a group whose turn it is, and write all of them."""
        chosen = [(number, pixels) for number, pixels in group if number % self.every == 0]
        found = {}
        if chosen:
            pictures = [pixels for _, pixels in chosen]
            answers = self.detector.predict(pictures, batch_size=len(pictures), **self.options)
            found = dict(zip((number for number, _ in chosen), answers, strict=True))
        for number, pixels in group:
            if number in found:
                self.latest = found[number]
                seconds = round(number / self.rate, 3)
                item = Item(self.source, f"{number:06d}", frame=number, seconds=seconds, pixels=pixels)
                self.writer.add(item, self.latest)
                self.looked_at += 1
            self.write(draw_detections(pixels, self.latest, colours=self.colours))
            self.frames += 1


def _groups(frames: Iterable[tuple[int, np.ndarray]], size: int) -> Iterator[list[tuple[int, np.ndarray]]]:
    iterator = iter(frames)
    while group := list(islice(iterator, size)):
        yield group


@contextmanager
def _reading(source: str | Path | int) -> Iterator[Any]:
    import cv2

    if not isinstance(source, int) and not Path(source).is_file():
        raise VideoError(f"{source}: no such video")
    capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
    try:
        yield capture
    finally:
        capture.release()


def _open(capture: Any, source: str | Path | int) -> tuple[np.ndarray, float, int]:
    """First frame, frames a second, and frames promised."""
    import cv2

    ok, frame = capture.read() if capture.isOpened() else (False, None)
    if not ok:
        what = f"camera {source}" if isinstance(source, int) else f"video {source}"
        why = "is it plugged in and free" if isinstance(source, int) else "is it complete, and of a kind FFmpeg knows"
        raise VideoError(f"{what} gives no frames; {why}?")
    rate, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    rate = rate if math.isfinite(rate) and 0 < rate <= _HIGHEST_RATE else _USUAL_RATE
    return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), rate, int(count) if 0 < count < 2**31 else 0


def _frames(capture: Any, first: np.ndarray) -> Iterator[np.ndarray]:
    """All frames as upright RGB."""
    import cv2

    yield first
    while True:
        ok, frame = capture.read()
        if not ok:
            return
        yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


@contextmanager
def _writing(path: Path, rate: float, size: tuple[int, int]) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that appends an RGB frame to a video, which is complete at the end of the block or absent."""
    import cv2

    height, width = size
    with replacing(path) as temporary:
        # OpenCV chooses the container by the suffix, which the temporary path must therefore have.
        part = temporary.with_name(temporary.name + path.suffix)
        writer = cv2.VideoWriter(str(part), cv2.VideoWriter_fourcc(*_CODEC), rate, (width, height))
        try:
            if not writer.isOpened():
                raise VideoError(f"{path} cannot be written as a video of {width} x {height} at {rate:g} frames/s")

            def write(frame: np.ndarray) -> None:
                if frame.shape[:2] != size:  # OpenCV would drop it without a word
                    frame = cv2.resize(frame, (width, height))
                writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))

            yield write
            writer.release()
            part.replace(temporary)
        finally:
            writer.release()
            part.unlink(missing_ok=True)
