"""What the command line was given as input, sorted into pictures, videos and cameras."""

from collections.abc import Iterable
from pathlib import Path

from ovd.data.images import SUFFIXES, ImageError

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")


def sort_sources(paths: Iterable[str | Path]) -> tuple[list[Path], list[Path | int]]:
    """Pictures, and videos and cameras, each once, in the order given (folders sorted by name).

    A number that is no file is a camera; a file is a video by the end of its name, else a picture.

    Raises:
        ImageError: a path does not exist, or a folder holds neither picture nor video.
    """
    pictures: dict[Path, Path] = {}
    videos: dict[Path | int, Path | int] = {}
    for path in map(Path, paths):
        if str(path).isdecimal() and not path.exists():
            videos.setdefault(int(str(path)), int(str(path)))
            continue
        if path.is_dir():
            known = SUFFIXES + VIDEO_SUFFIXES
            files = sorted(p for p in path.iterdir() if p.suffix.lower() in known and p.is_file())
            if not files:
                raise ImageError(f"folder {path} holds no picture and no video ({', '.join(s[1:] for s in known)})")
        elif path.is_file():
            files = [path]
        else:
            raise ImageError(f"{path}: no such picture or folder")
        for file in files:
            found = videos if file.suffix.lower() in VIDEO_SUFFIXES else pictures
            found.setdefault(file.resolve(), file)
    return list(pictures.values()), list(videos.values())
