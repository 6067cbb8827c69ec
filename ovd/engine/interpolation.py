"""Weights between those of a detector before and after fine-tuning, as a detector folder of their own.

Source: Wortsman et al., "Robust fine-tuning of zero-shot models" (WiSE-FT, 2022): the mean of both often keeps what the
first knew and most of what the second learned. Nothing is trained or measured here.
"""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ovd.detector import IMAGE_TEXT, read_detector, save_detector
from ovd.detector_folder import read_prompting


def interpolate_states(before: dict[str, Tensor], after: dict[str, Tensor], weight: float) -> dict[str, Tensor]:
    """(1 - weight) * before + weight * after in float32; what is no floating-point number is that of `after`.

    Args:
        weight: 0 gives `before`, 1 gives `after`, to the bit.

    Raises:
        ValueError: a weight outside 0..1, or tensors that are not of the same names and shapes.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"interpolation is {weight}, but it lies in 0..1: 0 is the detector before, 1 that after")
    different = sorted(set(before) ^ set(after))
    different += [n for n in before if n in after and before[n].shape != after[n].shape]
    if different:
        raise ValueError(
            f"the detectors are not of one architecture ({len(different)} tensors differ, such as {different[0]}); "
            "interpolate a detector with what it was fine-tuned to"
        )
    if weight in (0, 1):
        return dict(after if weight else before)
    return {
        name: torch.lerp(before[name].float(), value.float(), weight) if value.is_floating_point() else value
        for name, value in after.items()
    }


def interpolate_detectors(
    before: str | Path, after: str | Path, weight: float, folder: str | Path, float16: bool = False
) -> Path:
    """Write the detector between two folders; settings and base words are those of `after`.

    Raises:
        ValueError: see `interpolate_states`; or the two stand on different image-text models.
    """
    first, one, _ = read_detector(before)
    second, two, base_names = read_detector(after)
    if not _same_text(one.model, two.model):
        raise ValueError(f"{before} and {after} stand on different image-text models; words mean other things to each")
    second.load_state_dict(interpolate_states(first.state_dict(), second.state_dict(), weight))
    image_text, architecture = Path(after) / IMAGE_TEXT, asdict(second.architecture)
    return save_detector(folder, second, image_text, architecture, base_names, float16, read_prompting(after))


def _same_text(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    """Whether two image-text models agree, be it that one was stored in half precision."""
    first, second = one.state_dict(), two.state_dict()
    return first.keys() == second.keys() and all(
        first[name].shape == value.shape and torch.equal(first[name].half(), value.half())
        for name, value in second.items()
    )
