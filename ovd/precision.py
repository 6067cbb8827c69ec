"""Where a detector runs and with which type of matrix products, from what a user asks for."""

import torch

from pretrain.engine.device import Device

PRECISIONS = ("float32", "bfloat16", "float16", "auto")


def find_device(name: str | torch.device) -> torch.device:
    """The device of a name; "auto" is a GPU where there is one.

    Raises:
        ValueError: there is no GPU.
    """
    if name == "auto" or str(name).startswith("cuda"):
        found = Device(str(name).partition(":")[0]).torch_device  # says in one sentence when there is no GPU
        return found if ":" not in str(name) else torch.device(name)
    return torch.device(name)


def find_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The type for autocast; None is float32 as it is.

    Raises:
        ValueError: no such precision, or not on this device.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; choose one of {', '.join(PRECISIONS)}")
    if precision == "float16" and device.type == "cpu":
        raise ValueError("precision is 'float16', which a CPU has no fast arithmetic for; take 'bfloat16'")
    if precision == "auto" and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)
