"""Order among numbers that are known to rounding only: signs, ranks and AUROC with such ties.

Kernels for other processors and other numbers of threads sum in another order. Values that are
equal in exact arithmetic then differ in their last bits, and their order would be the machine's.
Differences within rounding are ties here. They are found pair by pair: bins would have edges that
fall between two equal values, and so would groups of sorted ones.
"""

import numpy as np
from jaxtyping import Float

_ULPS = 8
_RELATIVE = 1e-9


def rounding(*values: np.ndarray) -> Float[np.ndarray, "*layers"]:
    """Eight units in the last place of the largest magnitude along the last axis of all values."""
    largest = np.max([np.abs(x).max(axis=-1, initial=0.0) for x in values], axis=0)
    return _ULPS * np.finfo(np.result_type(np.float32, *values)).eps * largest


def signs(difference: np.ndarray, noise: float | np.ndarray) -> np.ndarray:
    """-1, 0 or 1; 0 within the noise, NaN of NaN."""
    return np.where(np.abs(difference) <= noise, 0.0, np.sign(difference))


def auroc(
    positive: Float[np.ndarray, "*layers n"],
    negative: Float[np.ndarray, "*layers m"],
    noise: float | Float[np.ndarray, "*layers"] = 0.0,
) -> Float[np.ndarray, "*layers"]:
    """Share of pairs ranked correctly, ties counting half.

    Args:
      positive: scores that should be the higher ones.
      negative: scores that should be the lower ones.
      noise: how far rounding may move a score, where more than the scores' own size suggests:
        terms that cancelled in them. Scores no further apart than this, or than the rounding of
        the largest, are ties.

    Returns:
      NaN where either has no scores.
    """
    if not (positive.shape[-1] and negative.shape[-1]):
        return np.full(positive.shape[:-1], np.nan)
    tie = np.maximum(noise, rounding(positive, negative))[..., None, None]
    difference = positive[..., :, None] - negative[..., None, :]
    return (signs(difference, tie).mean(axis=(-2, -1)) + 1) / 2


def centred_ranks(values: Float[np.ndarray, "*R n"]) -> Float[np.ndarray, "*R n"]:
    """Mid-ranks less their mean, along the last axis; a billionth of the largest value is a tie.

    That is above what rounding leaves of a difference of two rates, which may be larger than
    the difference, and below a difference that one response makes.
    """
    tie = _RELATIVE * np.abs(values).max(axis=-1)[..., None, None]
    return signs(values[..., :, None] - values[..., None, :], tie).sum(axis=-1) / 2
