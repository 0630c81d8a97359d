"""Verdicts written as numbers."""

import numpy as np

NAMES = np.array(["complied", "refused", "invalid"])


def names(codes):
    """Verdicts from 0 complied, 1 refused, 2 invalid: a list, or a list of lists."""
    return NAMES[np.asarray(codes).astype(int)].tolist()
