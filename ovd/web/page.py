"""The page itself, in gradio: what is on it, and how it is served.

Nothing on it comes from or goes to another machine: no telemetry, no fonts from elsewhere, no pictures by address.
What a visitor may send is checked in `ovd.web.finder`. Pictures of visitors lie below GRADIO_TEMP_DIR, which is to be
set before this is imported (`ovd.web.cli` gives a folder of its own and removes it).
"""

import os
from pathlib import Path
from typing import Any

# Read by gradio when it is imported; a page for one's own pictures has nothing to report to anybody.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr

from ovd.web.finder import Finder, RequestError

EXAMPLES_FOLDER = Path(__file__).parent / "examples"
EXAMPLES = (
    ("coat_bell.jpg", "coat, bell, shark"),
    ("cake_telephone.jpg", "birthday cake, telephone"),
    ("bread_bear.jpg", "bread, bear, koala"),
)
QUEUE_LENGTH = 16  # waiting requests; whoever comes after them is told so at once
_KEPT_SECONDS = 1800  # how long pictures of visitors stay on the disk
_INTRODUCTION = """# Find your own words in your own pictures
Choose a picture, write what to look for, and the detector draws a box around everything that it takes for it."""


def build_page(finder: Finder, threshold: float = 0.3) -> gr.Blocks:
    """Lay out the page; `serve_page` shows it.

    Args:
        finder: answers the requests, one at a time.
        threshold: where the slider stands at first, 0..1.
    """
    with gr.Blocks(
        title="Open-vocabulary detection", analytics_enabled=False, delete_cache=(300, _KEPT_SECONDS)
    ) as page:
        gr.Markdown(f"{_INTRODUCTION}\n\n{finder.limits.sentence}")
        with gr.Row():
            with gr.Column():
                picture = _upload()
                words = gr.Textbox(
                    label="Words", placeholder="koala, taco, fire engine", info="Separated by commas, or one a line.",
                    lines=3, max_length=finder.limits.letters, elem_id="words",
                )  # fmt: skip
                slider = gr.Slider(0, 1, threshold, step=0.01, label="Lowest score shown", elem_id="threshold")
                button = gr.Button("Find", variant="primary", elem_id="find")
                gr.Examples(
                    [[str(EXAMPLES_FOLDER / name), text] for name, text in EXAMPLES], inputs=[picture, words],
                    cache_examples=False, api_visibility="private", elem_id="examples",
                )  # fmt: skip
            with gr.Column():
                drawn = gr.Image(label="Found", format="png", interactive=False, buttons=["download", "fullscreen"],
                                 elem_id="drawn")  # fmt: skip
                summary = gr.Markdown(elem_id="summary", container=True)
                table = gr.Dataframe(
                    headers=["word", "score", "x1", "y1", "x2", "y2"], datatype=["str"] + ["number"] * 5,
                    interactive=False, label="Boxes in pixels of the picture", elem_id="table",
                )  # fmt: skip

        def find(path: str | None, text: str, lowest: float) -> tuple[Any, Any, gr.Markdown]:
            try:
                answer = finder(path, text, lowest)
            except RequestError as error:
                # Only these sentences are for strangers; anything else is a fault, and its text stays on this side.
                raise gr.Error(str(error), duration=None, print_exception=False) from error
            return answer.picture, answer.rows, gr.Markdown(_plain(answer.summary))

        wiring = {"inputs": [picture, words, slider], "outputs": [drawn, table, summary]}
        gr.on([button.click, words.submit], find, **wiring, api_visibility="private", concurrency_limit=1)
    page.file_bytes = finder.limits.file_bytes
    page.queue(max_size=QUEUE_LENGTH, default_concurrency_limit=1, api_open=False)
    return page


def _upload() -> gr.Image:
    """The field for the visitor's picture: gives its path, and lets `finder` be the one that opens the file."""
    picture = gr.Image(
        label="Picture",
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        elem_id="picture",
        height=340,
    )
    fetch = picture.async_move_resource_to_block_cache

    async def only_uploads(address: Any) -> str | None:
        # gradio would fetch a picture by its address for a hand-made request.
        if address is not None and "://" in str(address):
            raise gr.Error("Pictures are taken from a file only.", print_exception=False)
        return await fetch(address)

    # gradio's own step would open the file with Pillow, before the limits and with messages that tell where it lies.
    picture.preprocess = lambda payload: None if payload is None else payload.path
    picture.async_move_resource_to_block_cache = only_uploads
    return picture


def _plain(text: str) -> str:
    """The text without Markdown's meaning: words come from visitors, and a link or picture in them is only text."""
    return "".join(f"&#{ord(letter)};" if letter in r"\`*_{}[]()<>#+-.!|&~$:/@" else letter for letter in text)


def serve_page(page: gr.Blocks, host: str = "127.0.0.1", port: int | None = None, share: bool = False) -> str:
    """Start serving the page in the background; `page.close()` ends it.

    Args:
        page: from `build_page`.
        host: address to listen on; the default is reached from this machine only.
        port: None takes the first free one from 7860.
        share: also open a public address through gradio's tunnel; visitors' pictures then pass its servers.

    Returns:
        The page's address, the public one when there is one.

    Raises:
        OSError: the port is taken, or the address is not this machine's.
    """
    # Fonts of the visitor's own system: the usual theme would send for its own.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    _, local, public = page.launch(
        server_name=host, server_port=port, share=share, theme=theme, prevent_thread_lock=True, quiet=True,
        max_file_size=page.file_bytes, allowed_paths=[], show_error=False, ssr_mode=False, mcp_server=False, pwa=False,
        enable_monitoring=False, footer_links=[], run_history=False, max_threads=8, state_session_capacity=1000,
        strict_cors=True,
    )  # fmt: skip
    return public or local
