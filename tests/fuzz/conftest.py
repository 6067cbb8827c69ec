"""Broken pictures made in code, few and reproducible hypothesis examples, and a place where memory is limited."""

import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
settings.register_profile(
    "fuzz",
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("fuzz")


def encode(mode: str, kind: str, size: tuple[int, int] = (9, 7), **options) -> bytes:
    """A small picture in a file."""
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, extra: bytes = b"") -> bytes:
    """A PNG whose header says what it likes."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def chunk(kind: bytes, content: bytes) -> bytes:
    """A part of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def tiff(width: int, height: int) -> bytes:
    """An uncompressed grey TIFF of 64 bytes of pixels that claims more."""
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + bytes(4 + 64)


def gif(width: int, height: int) -> bytes:
    """A GIF whose canvas and frame are as large as it says."""
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0)
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + frame + b"\x02\x02\x4c\x01\0;"


def readable_pictures() -> dict[str, bytes]:
    """Files that are odd and sound: 9 x 7 pixels, one of them turned."""
    found = {
        f"{mode}-{kind}": encode(mode, kind)
        for mode, kind in (
            ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("I;16", "PNG"), ("I;16", "TIFF"), ("I", "TIFF"), ("LA", "PNG"),
            ("1", "PNG"), ("1", "TIFF"), ("P", "PNG"), ("P", "GIF"), ("RGBA", "PNG"), ("RGBA", "WEBP"), ("LAB", "TIFF"),
            ("RGB", "AVIF"), ("RGB", "BMP"), ("RGB", "JPEG2000"), ("RGB", "PPM"), ("PA", "TIFF"),
        )
    }  # fmt: skip
    found["palette with one clear colour"] = encode("P", "PNG", transparency=0)
    found["palette with alpha"] = encode("P", "PNG", transparency=bytes(range(256)))
    frames = [Image.new("RGB", (9, 7), (i, 0, 0)) for i in range(3)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
        found[f"animated {kind}"] = buffer.getvalue()
    for kind in ("JPEG", "PNG", "WEBP"):
        found[f"EXIF of rubbish {kind}"] = encode("RGB", kind, exif=b"Exif\0\0II*\0" + b"\xff" * 40)
        found[f"colour profile of rubbish {kind}"] = encode("RGB", kind, icc_profile=b"\xff" * 500)
    return found


def refused_pictures() -> dict[str, bytes]:
    """Files that are no usable picture; some claim billions of pixels or expand to hundreds of megabytes."""
    bomb = zlib.compress(bytes(100_000_000))
    return {
        "empty": b"",
        "text": b"hello",
        "zeros": bytes(1000),
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "float TIFF": encode("F", "TIFF"),
        "PNG 60000 x 60000": png(60_000, 60_000),
        "PNG 2 billion x 2 billion": png(2**31 - 1, 2**31 - 1),
        "PNG 0 x 5": png(0, 5),
        "PNG text bomb": png(4, 4, chunk(b"zTXt", b"k\0\0" + bomb)),
        "PNG profile bomb": png(4, 4, chunk(b"iCCP", b"k\0\0" + bomb)),
        "GIF 65535 x 65535": gif(65535, 65535),
        "TIFF 100000 x 100000": tiff(100_000, 100_000),
        "TIFF 4 billion x 4 billion": tiff(2**32 - 1, 2**32 - 1),
        "WebP 16 million x 16 million": b"RIFF\x64\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff" * 6 + bytes(70),
        "PPM 100000 x 100000": b"P6 100000 100000 255\n",
        "PPM of endless digits": b"P6 " + b"9" * 5000 + b" 4 255\n",
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n",
    }


@pytest.fixture(scope="session")
def readable() -> dict[str, bytes]:
    """See `readable_pictures`."""
    return readable_pictures()


@pytest.fixture(scope="session")
def refused() -> dict[str, bytes]:
    """See `refused_pictures`."""
    return refused_pictures()


@pytest.fixture(scope="session")
def run_limited(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run a script in a process with 4 GB of address space, stopped after two minutes; returns what it printed."""

    def run(script: str, *arguments: str, gigabytes: float = 4) -> str:
        limit = int(gigabytes * 2**30)
        start = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))\n"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", start + script, *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run
