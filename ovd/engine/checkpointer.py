"""Detectron2's training checkpoints, each complete or absent. The detector for users is written by `ovd.detector`."""

from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer

from pretrain.atomic import replacing, write_atomically


class AtomicCheckpointer(DetectionCheckpointer):
    """Writes beside the place and renames, so that a run killed while saving resumes from the checkpoint before."""

    def save(self, name: str, **kwargs: Any) -> None:
        """Write model, trainer and `kwargs` to `name`.pth and then make it the one to resume from."""
        if not self.save_dir or not self.save_to_disk:
            return
        state = {key: value.state_dict() for key, value in self.checkpointables.items()}
        with replacing(Path(self.save_dir) / f"{name}.pth") as temporary:
            torch.save({"model": self.model.state_dict(), **state, **kwargs}, temporary)
        self.tag_last_checkpoint(f"{name}.pth")

    def _load_file(self, filename: str) -> Any:
        """Weights of a .pth file; Detectron2 would unpickle a .pkl, which runs whatever its author put there."""
        if not filename.endswith(".pth"):
            raise ValueError(f"{filename} is no .pth file: give a checkpoint that training here wrote")
        return super()._load_file(filename)

    def _torch_load(self, f: str) -> Any:
        try:
            return torch.load(f, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many types for damaged archives and for what is not tensors
            raise ValueError(f"{f} is damaged or holds more than weights; resume from another checkpoint") from error

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the checkpoint to resume from."""
        write_atomically(Path(self.save_dir) / "last_checkpoint", last_filename_basename)
