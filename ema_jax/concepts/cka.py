"""Debiased linear CKA: similarity of two representations of the same prompts.

For base against unlearned and layer against layer. It is not defined for two domains, whose
prompts are different ones. The biased form is near one for noise when prompts are fewer than
dimensions; this one is built on the unbiased HSIC estimator (Song et al., 2012) and has mean zero.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float


def cka(
    x: Float[np.ndarray, "N layers d"], y: Float[np.ndarray, "M layers e"]
) -> Float[np.ndarray, " layers"]:
    """Debiased CKA of two models on the same prompts, layer by layer; needs four prompts."""
    if len(x) != len(y):
        raise ValueError(f"CKA needs the same prompts on both sides: {len(x)} and {len(y)}")
    a, b = _centred_grams(x), _centred_grams(y)
    return _ratio(*(np.einsum("lnm,lnm->l", p, q) for p, q in ((a, b), (a, a), (b, b))))


def cka_layers(x: Float[np.ndarray, "N layers d"]) -> Float[np.ndarray, "layers layers"]:
    """Debiased CKA of every layer with every other on the same prompts."""
    grams = _centred_grams(x)
    flat = grams.reshape(len(grams), -1)
    products = flat @ flat.T
    own = np.diag(products)
    return _ratio(products, own[:, None], own[None])


def _ratio(between: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Undefined where a side does not vary over the prompts."""
    scale = np.sqrt(np.maximum(first, 0) * np.maximum(second, 0))
    return np.divide(between, scale, out=np.full(np.shape(between), np.nan), where=scale > 0)


@jax.jit
def _gram(x: Float[jax.Array, "N d"]) -> Float[jax.Array, "N N"]:
    centred = x - x.mean(axis=0)
    return jnp.matmul(centred, centred.T, precision=jax.lax.Precision.HIGHEST)


def _centred_grams(x: Float[np.ndarray, "N layers d"]) -> Float[np.ndarray, "layers N N"]:
    """U-centred Gram matrices: zero diagonal, rows that add to zero."""
    n = len(x)
    if n < 4:
        raise ValueError(f"debiased CKA needs four prompts, found {n}")
    grams = []
    for layer in range(x.shape[1]):
        k = np.array(_gram(jnp.asarray(x[:, layer], jnp.float32)), np.float64)
        # Rounding of prompts that all agree is not a signal.
        if np.trace(k) <= 1e-10 * n * float(np.square(x[0, layer].astype(np.float64)).sum()):
            k[:] = 0
        np.fill_diagonal(k, 0)
        rows = k.sum(axis=0) / (n - 2)
        k += k.sum() / ((n - 1) * (n - 2)) - rows[:, None] - rows[None]
        np.fill_diagonal(k, 0)
        grams.append(k)
    return np.stack(grams)
