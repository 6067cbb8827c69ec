"""Probabilities at another temperature, without the logits that they were made of.

The image-text score has its own scale (`vlm_scale`); which temperature is best is found in `ovd/sweep.py`.
"""

from torch import Tensor


def temper(probabilities: Tensor, temperature: float, independent: bool = False) -> Tensor:
    """Probabilities as if their logits had been divided by `temperature`.

    At 1 they come back as they are, to the bit. Probabilities that are 0 stay 0: the float32 softmax has lost classes
    whose logit is more than about 103 below the best.

    Args:
        probabilities: (R, 1 + C) rows of a softmax: p^(1/T), renormalised over the row.
        temperature: above 0.
        independent: they are sigmoids instead, each on its own.
    """
    if temperature == 1:
        return probabilities
    if independent:
        return (probabilities.float().logit() / temperature).sigmoid()
    return (probabilities.float().log() / temperature).softmax(dim=-1).nan_to_num(0.0)
