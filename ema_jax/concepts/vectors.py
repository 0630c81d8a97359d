"""Concept vectors: difference in means at every layer, their file, and other tools' layer numbers.

Activations come as `{domain: [prompts, L+1, d]}`, one pooled residual per prompt and layer, the
contrast set among the domains.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from ema_jax.data.domains import BENIGN
from ema_jax.errors import UserError
from ema_jax.runtime.files import read_tensors, write_tensors

MOST_RESAMPLED = 256
"""Prompts of a domain, at most, behind figures quadratic in prompts: resampling, probes, CKA."""

_ROWS_AT_ONCE = 64  # of all layers, which of a 70B model are 2.7 MB each

Activations = Mapping[str, Float[np.ndarray, "_ layers width"]]
LayerVectors = Mapping[str, Float[np.ndarray, "layers width"]]

LAYER_CONVENTION = (
    "residual_pre: index l = residual entering block l; 0 = embeddings; "
    "L = after the last block, before the final norm"
)

# Convention -> (shift from our index, our first layer it has, how many of our last it lacks).
_CONVENTIONS = {
    # Transformers returns its last hidden state after the final norm, so our layer L has no name.
    "hf_hidden_states": (0, 0, 1),
    "resid_pre": (0, 0, 1),
    "resid_post": (-1, 1, 0),
    "refusal_direction": (0, 0, 1),
    "repeng": (-1, 1, 0),
    # GGUF control vectors start at `direction.1`, which is added to the output of block 1.
    "llama_cpp": (-1, 2, 0),
}


def layer_index(layer: int, convention: str, num_layers: int) -> int:
    """Number of a layer in another tool.

    Here, layer l is the residual entering block l, with 0 the embeddings and L = `num_layers` the
    residual after the last block, before the final norm. Other conventions: `hf_hidden_states`
    (Transformers), `resid_pre` and `resid_post` (TransformerLens), `refusal_direction` (its
    `direction[l]`), `repeng` (its keys) and `llama_cpp` (its `direction.N` tensors); the last two
    name a block whose output they change.

    Raises:
      ValueError: for an unknown convention, or a layer that it cannot name.
    """
    if convention not in _CONVENTIONS:
        known = ", ".join(_CONVENTIONS)
        raise ValueError(f"unknown layer convention {convention!r}: use one of {known}")
    shift, first, lacking = _CONVENTIONS[convention]
    if not first <= layer <= num_layers - lacking:
        raise ValueError(
            f"layer {layer} of {num_layers} has no name in {convention}: "
            f"it covers our layers {first} to {num_layers - lacking}"
        )
    return layer + shift


def layers_as(
    vectors: Float[np.ndarray, "layers width"], convention: str
) -> dict[int, Float[np.ndarray, " width"]]:
    """Vectors by the layer numbers of another tool; layers that it cannot name are left out.

    Raises:
      ValueError: for an unknown convention.
    """
    last = len(vectors) - 1
    _, first, lacking = _CONVENTIONS.get(convention, (0, 0, 0))
    named = range(first, last - lacking + 1)
    return {layer_index(layer, convention, last): vectors[layer] for layer in named}


def means(activations: Activations) -> dict[str, Float[np.ndarray, "layers width"]]:
    """Mean pooled residual of each domain, summed in float64, as float32."""
    return {domain: mean.astype(np.float32) for domain, mean in _means64(activations).items()}


def concept_vectors(
    activations: Activations, contrast: str = BENIGN
) -> dict[str, Float[np.ndarray, "layers width"]]:
    """v_l(d): mean over the prompts of d minus mean over the contrast set, float32 `[L+1, d]`.

    Source: difference in means (Arditi et al., 2024), for every domain and layer at once. A layer
    where all prompts agree has zero vectors: layer 0 under last-token pooling, where every prompt
    ends in the same token of the chat template.

    Raises:
      UserError: if the contrast set is missing.
    """
    if contrast not in activations:
        raise UserError(
            f"concept vectors: no activations for the contrast set {contrast!r} "
            f"(there are {', '.join(activations)}): capture it too"
        )
    centre = _means64(activations)
    return {
        domain: (mean - centre[contrast]).astype(np.float32)
        for domain, mean in centre.items()
        if domain != contrast
    }


def sample(activations: Activations) -> dict[str, Float[np.ndarray, "_ layers width"]]:
    """At most `MOST_RESAMPLED` prompts of each domain, evenly spaced; not more are not copied."""

    def few(x: np.ndarray) -> np.ndarray:
        if len(x) <= MOST_RESAMPLED:
            return x
        return x[np.linspace(0, len(x) - 1, MOST_RESAMPLED).astype(int)]

    return {domain: few(x) for domain, x in activations.items()}


def matched_contrast(
    words: Mapping[str, Float[np.ndarray, "prompts width"]],
    domains: Sequence[str],
    contrast: str = BENIGN,
) -> tuple[Int[np.ndarray, " contrast"], tuple[int, ...]]:
    """Assigns the contrast prompts to the domains, to each those most similar to its own prompts.

    Args:
      words: a representation of every prompt to match by, preferably mean token embeddings.
      domains: in order.
      contrast: name of the contrast set.

    Returns:
      An order of the contrast prompts that puts those of each domain in a row, and how many each
      has; the numbers differ by one at most, and the matching is the best one for these numbers.
    """
    from scipy.optimize import linear_sum_assignment

    count = len(words[contrast])
    parts = tuple(len(x) for x in np.array_split(np.arange(count), len(domains)))
    centres = np.stack([words[d].mean(axis=0, dtype=np.float64) for d in domains])
    distance = np.square(words[contrast][:, None] - centres).sum(axis=-1)  # [contrast, D]
    _, place = linear_sum_assignment(np.repeat(distance, parts, axis=1))
    return np.argsort(np.repeat(np.arange(len(domains)), parts)[place], kind="stable"), parts


def matched_vectors(
    activations: Activations,
    order: Int[np.ndarray, " contrast"],
    parts: Sequence[int],
    contrast: str = BENIGN,
) -> dict[str, Float[np.ndarray, "layers width"]]:
    """Difference in means against contrast prompts of the domain's own; see `matched_contrast`."""
    own = np.split(activations[contrast][order], np.cumsum(parts)[:-1])
    domains = [d for d in activations if d != contrast]
    return {
        d: concept_vectors({d: activations[d], contrast: x}, contrast)[d]
        for d, x in zip(domains, own, strict=True)
    }


def relative_to(
    x: Float[np.ndarray, "n layers width"],
    rewrites: Float[np.ndarray, "m layers width"],
    rewritten: Sequence[bool],
    contrast: Float[np.ndarray, "_ layers width"],
) -> Iterator[tuple[range, Float[np.ndarray, "_ layers width"]]]:
    """Activations with those of every prompt's benign rewrite in place of the contrast set's mean.

    x_i − c_i + mean(contrast): the difference in means against the contrast set is then the mean of
    x_i − c_i, the concept without the prompts' style and subject, and everything that is made of
    activations (nulls, ceilings, intervals, probes, erasure) is of that.

    Args:
      x: of one domain's prompts.
      rewrites: of the rewrites that there are, in the prompts' order.
      rewritten: whether a prompt has one. One without takes the mean of the others', and where none
        has one all stay as they are.
      contrast: of the contrast set.

    Yields:
      Rows of `x`, some at a time, and what takes their place.
    """
    has = np.array(rewritten, bool)
    place = np.cumsum(has) - 1
    if has.any():
        centre, mean = (each.mean(axis=0, dtype=np.float64) for each in (contrast, rewrites))
    for start in range(0, len(x), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        rows = x[part]
        if has.any():
            own = np.where(has[part, None, None], rewrites[place[part]], mean)
            rows = (rows - own + centre).astype(np.float32)
        yield range(start, start + len(rows)), rows


def pca_vectors(
    activations: Activations, contrast: str = BENIGN
) -> dict[str, Float[np.ndarray, "layers width"]]:
    """First principal direction of paired differences, as long as the mean difference along it.

    Prompt i of the domain is paired with prompt i of the contrast set. The differences are not
    centred: centring would take away the very direction that they share (RepE and repeng's
    `pca_center` avoid it in the same way). Signed so that the domain is on the positive side.
    """
    found = {}
    for domain in (d for d in activations if d != contrast):
        count = min(len(activations[domain]), len(activations[contrast]))
        difference = activations[domain][:count].astype(np.float64) - activations[contrast][:count]
        rows = difference.swapaxes(0, 1)  # [L+1, n, d]
        _, vectors = np.linalg.eigh(rows @ rows.swapaxes(1, 2))
        direction = np.einsum("ln,lnd->ld", vectors[..., -1], rows)
        length = np.linalg.norm(direction, axis=1, keepdims=True)
        direction = np.divide(direction, length, out=np.zeros_like(direction), where=length > 0)
        along = (rows.mean(axis=1) * direction).sum(axis=1, keepdims=True)
        found[domain] = (along * direction).astype(np.float32)
    return found


def _means64(activations: Activations) -> dict[str, np.ndarray]:
    return {domain: x.mean(axis=0, dtype=np.float64) for domain, x in activations.items()}


@dataclass(frozen=True)
class Concepts:
    """Contents of a concept file: means and vectors by domain `[L+1, d]`, and its metadata."""

    means: dict[str, np.ndarray]
    vectors: dict[str, np.ndarray]
    metadata: dict[str, str]

    def __repr__(self) -> str:
        layers = len(next(iter(self.vectors.values()))) - 1
        return f"Concepts({', '.join(self.vectors)}; layers 0 to {layers})"


_REQUIRED = ("pooling", "model_hash", "contrast")


def save_concepts(
    path: str | os.PathLike,
    activations_or_means: Mapping[str, np.ndarray],
    vectors: LayerVectors,
    metadata: Mapping[str, str],
) -> None:
    """Writes `mean/DOMAIN` and `vector/DOMAIN`, float32 `[L+1, d]`, as one safetensors file.

    `metadata` must hold `pooling`, `model_hash` and `contrast`, without which another tool cannot
    interpret the vectors; `layer_convention` is added, and from activations `prompts`, the
    number of prompts per domain as JSON.
    """
    missing = [key for key in _REQUIRED if key not in metadata]
    if missing:
        raise ValueError(f"concept metadata lacks {', '.join(missing)}")
    activations = {k: x for k, x in activations_or_means.items() if x.ndim == 3}
    centre = {**activations_or_means, **means(activations)}
    counts = {"prompts": json.dumps({k: len(x) for k, x in activations.items()})}
    tensors = {f"mean/{domain}": x for domain, x in centre.items()}
    tensors |= {f"vector/{domain}": x for domain, x in vectors.items()}
    write_tensors(
        path,
        {name: np.asarray(x, np.float32) for name, x in tensors.items()},
        (counts if activations else {}) | dict(metadata) | {"layer_convention": LAYER_CONVENTION},
    )


def load_concepts(path: str | os.PathLike) -> Concepts:
    """Reads a file of `save_concepts`.

    Raises:
      UserError: for a missing or unreadable file, one without concept tensors, or one whose
        layers are numbered otherwise.
    """
    tensors, metadata = read_tensors(path)
    kinds: dict[str, dict[str, np.ndarray]] = {"mean": {}, "vector": {}}
    for name, tensor in tensors.items():
        kind, _, domain = name.partition("/")
        if kind in kinds:
            kinds[kind][domain] = tensor
    if not kinds["mean"] or not kinds["vector"]:
        raise UserError(f"{path}: no mean/DOMAIN and vector/DOMAIN tensors: not a concept file")
    if metadata.get("layer_convention") != LAYER_CONVENTION:
        raise UserError(
            f"{path}: layer convention {metadata.get('layer_convention')!r}, expected "
            f"{LAYER_CONVENTION!r}: renumber its layers and save it again"
        )
    return Concepts(means=kinds["mean"], vectors=kinds["vector"], metadata=metadata)
