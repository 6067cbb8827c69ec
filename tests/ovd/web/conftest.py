"""The real page in a process of its own, as `ovd-web` starts it, for the tests over HTTP and in a browser."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PATIENCE = 180  # seconds until the page counts as not coming up; it takes a few


@pytest.fixture(scope="session")
def page_address() -> Iterator[str]:
    """Address of the page with the kept weights; the process has ended, and removed its uploads, after the tests."""
    pytest.importorskip("gradio", reason="the page is an extra: pip install -e '.[web]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ovd.web.cli", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        lines: list[str] = []
        ready = threading.Event()

        def listen() -> None:
            for line in process.stdout:
                lines.append(line)
                if line.startswith("the page is at "):
                    ready.set()
            ready.set()

        threading.Thread(target=listen, daemon=True).start()
        try:
            came_up = ready.wait(PATIENCE) and process.poll() is None
            assert came_up, "the page did not come up:\n" + "".join(lines[-20:])
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
