"""Write a module as an ONNX or a `torch.export` file, with a description of it inside and beside it.

This file knows nothing of detectors: see `ovd/export/files.py`.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.atomic import replacing, write_atomically

SUFFIXES = (".onnx", ".pt2")
DISTRIBUTION = "reclip-ovd"
_DESCRIPTION = "description.json"
_PROTOBUF_LIMIT = 2**31 - 2**24  # bytes, with room for the graph


def check_target(path: str | Path) -> Path:
    """The path, if its suffix names a format and what writes it is installed.

    Raises:
        ValueError: it does not, or it is not.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} does not end in {' or '.join(SUFFIXES)}, which names the format; name it so")
    if path.suffix == ".onnx":
        missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f"{path} cannot be written without {' and '.join(missing)}: pip install onnx onnxscript")
    return path


def write_program(
    path: str | Path,
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic: Mapping[str, Sequence[int]],
    description: Mapping[str, Any],
) -> Path:
    """Trace a module and write it; the file is complete or absent, and `<stem>.json` beside it has the description.

    Args:
        path: ends in .onnx or .pt2.
        module: in evaluation mode, on the CPU.
        inputs: example of each argument, in order; each dynamic side at least 2 and unlike others.
        outputs: names of what it returns.
        dynamic: which sides of which inputs may change.
        description: goes into the file: ONNX metadata (values that are no strings as JSON), or `description.json` in
            the archive.

    Raises:
        ValueError: another suffix, a missing package, or more weights than an ONNX file can hold.
    """
    path = check_target(path)
    size = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    if path.suffix == ".onnx" and size > _PROTOBUF_LIMIT:
        raise ValueError(f"{size / 2**30:.1f} GB of weights do not fit into an ONNX file (2 GB); write .pt2 instead")
    shapes = tuple({side: torch.export.Dim.DYNAMIC for side in dynamic.get(name, ())} for name in inputs)
    with torch.no_grad(), _quiet(), _plain_attention():
        program = torch.export.export(
            module,
            tuple(inputs.values()),
            dynamic_shapes=shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        if path.suffix == ".onnx":
            write_atomically(path, _onnx_bytes(program, list(inputs), list(outputs), description))
        else:
            for node in program.graph.nodes:
                node.meta.pop("stack_trace", None)  # paths of the machine that exported
            with replacing(path) as temporary, temporary.open("wb") as file:
                file.write(_archive(program, description))
    write_atomically(path.with_suffix(".json"), json.dumps(dict(description), indent=1, ensure_ascii=False) + "\n")
    return path


def _onnx_bytes(program, inputs: list[str], outputs: list[str], description: Mapping[str, Any]) -> bytes:
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    onnx_program = torch.onnx.export(
        program, dynamo=True, input_names=inputs, output_names=outputs, optimize=True, verbose=False
    )
    # Stack traces with the paths of the machine that exported.
    ClearMetadataAndDocStringPass()(onnx_program.model)
    texts = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in description.items()}
    onnx_program.model.metadata_props.update(texts)
    return onnx_program.model_proto.SerializeToString()


def _archive(program, description: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={_DESCRIPTION: json.dumps(dict(description), ensure_ascii=False)})
    return buffer.getvalue()


def read_description(path: str | Path) -> dict[str, Any]:
    """The description of a .pt2 file, from inside it; the program is not loaded.

    Raises:
        ValueError: it is not a file of `write_program`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith(f"/{_DESCRIPTION}"))
            return json.loads(archive.read(name))
    except (zipfile.BadZipFile, StopIteration) as error:
        raise ValueError(f"{path} is no .pt2 file with a description; write it with tools/export.py") from error


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of the names and values of all tensors of a module, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def project_version() -> str:
    """Version of the installed distribution; "unknown" where the code runs without being installed."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Without the fused kernel of `nn.MultiheadAttention`, which no other runtime has."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say to those who write operators for them."""
    loggers = [logging.getLogger(name) for name in ("torch.fx", "torch.export", "torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
