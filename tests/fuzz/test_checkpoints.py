"""Checkpoint folders and embedding files of strangers: nothing in them runs, and what is wrong is one sentence."""

import json
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from ovd.engine.checkpointer import AtomicCheckpointer
from ovd.modeling.detector_config import DetectorConfig
from ovd.text.embedding_file import read_info
from ovd.text.embeddings import read_matrix
from pretrain.engine.checkpoint import load_state
from pretrain.modeling.checkpoint import CheckpointError, load_checkpoint

KEPT = Path(__file__).resolve().parents[2] / "ovd/weights/mini/image_text"
DEEP = "[" * 100_000 + "]" * 100_000


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(KEPT, tmp_path / "checkpoint"))


def changed(path: str, value) -> str:
    config = json.loads((KEPT / "open_clip_config.json").read_text())
    place = config
    *above, last = path.split(".")
    for key in above:
        place = place[key]
    place[last] = value
    return json.dumps(config)


@pytest.mark.parametrize(
    "config",
    [
        "", "[]", "5", DEEP,
        changed("model_cfg", 5), changed("model_cfg.vision_cfg", []), changed("model_cfg.embed_dim", -7),
        changed("model_cfg.vision_cfg.timm_model_name", "vit_of_nobody"),
        changed("model_cfg.vision_cfg.timm_model_name", 5), changed("model_cfg.vision_cfg.image_size", 10**6),
        changed("model_cfg.text_cfg.width", 10**9), changed("model_cfg.text_cfg.width", 60_000),
        changed("model_cfg.text_cfg.width", "wide"), changed("model_cfg.text_cfg.layers", 10**7),
        changed("model_cfg.text_cfg.vocab_size", 10**7), changed("model_cfg.text_cfg.heads", 0),
        changed("model_cfg.text_cfg.tokenizer_kwargs", {"trust_remote_code": True}),
        changed("preprocess_cfg.mean", "x"), changed("preprocess_cfg.size", {}), changed("trained_image_size", 10**9),
        changed("trained_image_size", 96),
    ],
)  # fmt: skip
def test_a_configuration_of_nonsense_is_one_sentence(config, folder):
    (folder / "open_clip_config.json").write_text(config)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_pickle_in_place_of_weights_is_never_run(name, kind, folder, tmp_path):
    (folder / "open_clip_model.safetensors").unlink()
    content = {"weights": Payload(tmp_path / "ran"), "filling": bytes(8_000_000)}
    with (folder / name).open("wb") as file:
        pickle.dump(content, file) if kind == "pickle" else torch.save(content, file)
    with pytest.raises(CheckpointError):
        load_checkpoint(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("header", [b"", struct.pack("<Q", 2**60), struct.pack("<Q", 200_000) + DEEP.encode()])
def test_safetensors_that_lie_about_their_header_are_one_sentence(header, folder):
    (folder / "open_clip_model.safetensors").write_bytes(header + b" " * 8_000_000)
    with pytest.raises(CheckpointError):
        load_checkpoint(folder)


def test_resumable_states_never_run_code(tmp_path):
    torch.save({"step": Payload(tmp_path / "ran")}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError):
        load_state(tmp_path)
    for name in ("model.pth", "model.pkl", "model.pyth"):
        with (tmp_path / name).open("wb") as file:
            pickle.dump({"model": Payload(tmp_path / "ran")}, file)
        with pytest.raises(ValueError):
            AtomicCheckpointer(torch.nn.Linear(1, 1), str(tmp_path)).load(str(tmp_path / name))
    assert not (tmp_path / "ran").exists()


def npy(shape: str, kind: str = "<f4") -> bytes:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + bytes(64)


def test_matrices_of_strangers_are_numbers_or_one_sentence(tmp_path):
    path = tmp_path / "m.npy"
    np.save(path, np.array([[Payload(tmp_path / "ran")]], dtype=object), allow_pickle=True)
    objects = path.read_bytes()
    lies = [npy("(1000000000000,)"), npy("(-1, 4)"), npy("(1, 1)", "<c8"), npy("(1, 1)", "<M8[D]"), npy("(" * 5000)]
    others = [b"", b"PK\x03\x04" + bytes(50), pickle.dumps(Payload(tmp_path / "ran")), npy("(1, 2)")]
    for content in [objects, *lies, *others]:
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            read_matrix(path, 1, 1)
        assert "\n" not in str(caught.value)
    np.save(path, np.array([[np.nan]]))
    with pytest.raises(ValueError, match="not finite"):
        read_matrix(path, 1, 1)
    assert not (tmp_path / "ran").exists()


GOOD = {
    "words": ["a"], "synonyms": [["a"]], "use_synonyms": False, "templates": ["{}"], "dimension": 2,
    "fingerprint": "x", "tokenizer": "t", "format": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    "header",
    ["[]", "5", "", DEEP, '{"format": 1}']
    + [json.dumps({**GOOD, key: value}) for key in GOOD if key != "use_synonyms" for value in (5, [5], None, {}, [[]])
       if key not in ("fingerprint", "tokenizer")]
    + [json.dumps({**GOOD, "unknown": 1}), json.dumps({**GOOD, "synonyms": []})],
)  # fmt: skip
def test_headers_of_embedding_files_are_checked(header, tmp_path):
    path = tmp_path / "e.safetensors"
    save_file({"embeddings": np.ones((1, 2), np.float32)}, path, {"ovd_text_embeddings": header})
    with pytest.raises(ValueError) as caught:
        read_info(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [{"alpha": "x"}, {"anchor_sizes": 5}, {5: 5}, {"unknown": 1}, {"beta": None}])
def test_a_description_of_a_detector_of_wrong_types_is_one_sentence(values):
    with pytest.raises(ValueError):
        DetectorConfig.from_dict(values)
