"""The page over HTTP, with requests that no browser would send: files and addresses it must not touch."""

import http.server
import itertools
import json
import threading
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[3]
_SESSIONS = (f"test{number}" for number in itertools.count())


def _request(address: str, path: str, words: object = "bell", threshold: object = 0.3, **file: str) -> dict:
    """What the page answers to a hand-made request that says the picture lies at `path`."""
    session = next(_SESSIONS)
    functions = httpx.get(f"{address}/config").json()["dependencies"]
    number = next(function["id"] for function in functions if function["api_name"] == "find")
    picture = {"path": path, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}, **file}
    body = {"data": [picture, words, threshold], "fn_index": number, "session_hash": session}
    joined = httpx.post(f"{address}/gradio_api/queue/join", json=body, timeout=30)
    assert joined.status_code == 200, joined.text
    with httpx.stream("GET", f"{address}/gradio_api/queue/data?session_hash={session}", timeout=60) as stream:
        for line in stream.iter_lines():
            event = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
            if event.get("msg") == "process_completed":
                return event
    raise AssertionError("the page closed the connection without an answer")


def _upload(address: str, content: bytes, name: str = "a.png") -> httpx.Response:
    return httpx.post(f"{address}/gradio_api/upload", files={"files": (name, content)}, timeout=60)


@pytest.mark.parametrize("path", ["/etc/passwd", str(ROOT / "assets/novel_words.png"), "../../etc/passwd", "words.txt"])
def test_a_request_cannot_name_a_file_of_the_server(page_address: str, path: str) -> None:
    answer = _request(page_address, path)
    assert not answer["success"]
    assert answer["output"] == {"error": None}  # nothing told, not even whether the file exists
    assert httpx.get(f"{page_address}/gradio_api/file={path}").status_code in (403, 404)


def test_a_picture_is_not_fetched_from_an_address(page_address: str) -> None:
    asked = []

    class Note(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

    with http.server.HTTPServer(("127.0.0.1", 0), Note) as elsewhere:
        threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{elsewhere.server_port}/a.png"
        answers = [_request(page_address, address), _request(page_address, "a.png", url=address)]
        elsewhere.shutdown()
    assert not any(answer["success"] for answer in answers) and asked == []
    assert answers[0]["output"]["error"] == "Pictures are taken from a file only."


def test_an_upload_beyond_the_limit_is_refused(page_address: str) -> None:
    assert _upload(page_address, b"x" * (20 * 2**20 + 1)).status_code == 413


def test_a_bad_upload_gets_the_sentence_and_not_the_path(page_address: str) -> None:
    path = _upload(page_address, b"not a picture").json()[0]
    error = _request(page_address, path)["output"]["error"]
    assert error.startswith("This file cannot be read as a picture") and path not in error


def test_values_of_other_kinds_do_no_harm(page_address: str) -> None:
    example = (ROOT / "ovd/web/examples/coat_bell.jpg").read_bytes()
    path = _upload(page_address, example, "a.jpg").json()[0]
    for words in (["a"], {"a": 1}, 7):  # taken as text
        assert "error" not in _request(page_address, path, words)["output"]
    for words, threshold in (("bell", "high"), ("bell", None), ("bell", 7), (None, 0.3), ("", 0.3)):
        assert not _request(page_address, path, words, threshold)["success"], (words, threshold)
    assert _request(page_address, path)["success"]


def test_nothing_but_the_page_is_offered(page_address: str) -> None:
    assert httpx.get(f"{page_address}/gradio_api/info").json() == {"named_endpoints": {}, "unnamed_endpoints": {}}
    assert httpx.get(f"{page_address}/monitoring").status_code == 403
    config = httpx.get(f"{page_address}/config").json()
    assert config["analytics_enabled"] is False and config["run_history"] is False and config["stylesheets"] == []
