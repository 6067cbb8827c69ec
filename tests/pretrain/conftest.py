"""Fixtures for the pretraining half: tiny towers, a generated table of drawings, and runs made of them."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from pretrain.config import ImageTowerConfig, ModelConfig, PretrainConfig, TextTowerConfig, config_from_dict
from pretrain.modeling.clip import build_model

SHAPES = ("circle", "square", "triangle")
COLOURS = {"red": (220, 30, 30), "green": (20, 150, 40), "blue": (30, 60, 220), "yellow": (230, 210, 20)}


@pytest.fixture(autouse=True)
def _one_thread():
    """Several processes share the cores here; more threads than cores make tiny tensors slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model_config() -> ModelConfig:
    """Towers of about two million parameters that open_clip can rebuild by name (one register token, patch 16)."""
    return ModelConfig(
        image=ImageTowerConfig(timm_model="test_vit4", layer_scale=1.0),
        text=TextTowerConfig(width=32, heads=2, layers=2, context_length=16),
        embed_dim=32,
    )


@pytest.fixture
def model(model_config):
    """Seeded towers in evaluation mode, at their native size."""
    torch.manual_seed(0)
    return build_model(model_config).eval()


def draw_concept(shape: str, colour: tuple[int, int, int], size: int, margin: int) -> Image.Image:
    """One shape of one colour on a transparent square."""
    image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    pen, far = ImageDraw.Draw(image), size - 1 - margin
    if shape == "circle":
        pen.ellipse((margin, margin, far, far), fill=colour)
    elif shape == "square":
        pen.rectangle((margin, margin, far, far), fill=colour)
    else:
        pen.polygon([(margin, far), (far, far), (size // 2, margin)], fill=colour)
    return image


@pytest.fixture(scope="session")
def pairs_table(tmp_path_factory) -> Path:
    """A table of 12 concepts, 3 training drawings and 1 validation drawing of each, with images beside it."""
    root = tmp_path_factory.mktemp("pairs")
    rows = []
    for colour, rgb in COLOURS.items():
        for shape in SHAPES:
            for copy in range(4):
                name = f"{colour}_{shape}_{copy}.png"
                draw_concept(shape, rgb, size=48, margin=2 + 3 * copy).save(root / name)
                split = "val" if copy == 3 else "train"
                rows.append([name, f"{colour} {shape}", f"{shape}|shape", f"{colour}-{shape}", split])
    with (root / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "caption", "keywords", "concept", "split"], *rows])
    return root / "pairs.csv"


def _write_shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def write_shard() -> Callable[[Path, dict[str, bytes]], Path]:
    """A function that writes members by name as a tar file, and returns its path."""
    return _write_shard


@pytest.fixture(params=["no column", "empty captions", "folder", "shard", "shard with other JSON"])
def images_alone(request, tmp_path) -> tuple[str, dict]:
    """Twelve pictures without captions, in each form that there is: its name and the fields of `data` that read it."""
    place = tmp_path / "alone"
    names = [f"{colour}/{shape}.png" for colour in COLOURS for shape in SHAPES]
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        draw_concept(Path(name).stem, COLOURS[Path(name).parent.name], 48, 2).save(place / name)
    data = {"train_split": None, "unique_by": None}
    if request.param == "folder":
        return request.param, {**data, "table": str(place)}
    if request.param.startswith("shard"):
        members = {f"{number:04}.png": (place / name).read_bytes() for number, name in enumerate(names)}
        if request.param.endswith("JSON"):
            members |= {f"{number:04}.json": json.dumps({"label": 3}).encode() for number in range(len(names))}
        return request.param, {**data, "shards": str(_write_shard(tmp_path / "alone.tar", members))}
    header, end = ("image", "") if request.param == "no column" else ("image,caption", ", ")
    (place / "images.csv").write_text("\n".join([header, *(name + end for name in names)]) + "\n")
    return request.param, {**data, "table": str(place / "images.csv")}


def _run_config_maker(pairs_table: Path, root: Path) -> Callable[..., PretrainConfig]:
    def make(
        phases: list[dict] | None = None, output: str = "run", run: dict | None = None, **sections
    ) -> PretrainConfig:
        phase = {"image_size": 32, "context_length": 8, "batch_size": 12, "lr": 1e-3, "warmup_steps": 2}
        node = {
            "model": {
                "image": {"timm_model": "test_vit4", "layer_scale": 1.0},
                "text": {"width": 32, "heads": 2, "layers": 1, "context_length": 12},
                "embed_dim": 32,
            },
            "data": {"table": str(pairs_table), "unique_by": "concept", "preload": True, "workers": 0},
            "phases": [{**phase, **given} for given in phases or [{"steps": 4}]],
            "run": {
                "output": str(root / output),
                "device": "cpu",
                "log_every": 1,
                "checkpoint_every": 100,
                **(run or {}),
            },
        }
        for name, value in sections.items():
            node[name] = {**node.get(name, {}), **value} if isinstance(value, dict) else value
        return config_from_dict(node)

    return make


@pytest.fixture
def run_config(pairs_table, tmp_path) -> Callable[..., PretrainConfig]:
    """A function that makes a small CPU run: `run_config(phases=[…], output="name", run={…}, …)`."""
    return _run_config_maker(pairs_table, tmp_path)


@pytest.fixture(scope="module")
def module_run_config(pairs_table, tmp_path_factory) -> Callable[..., PretrainConfig]:
    """`run_config` for runs that the tests of a file share."""
    return _run_config_maker(pairs_table, tmp_path_factory.mktemp("runs"))
