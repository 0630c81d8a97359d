"""Control vectors in GGUF, as llama.cpp (`--control-vector`) and repeng read them."""

import os
import struct

import numpy as np
from jaxtyping import Float

from ema_jax.concepts.vectors import layers_as
from ema_jax.runtime.files import atomic_path

_ALIGNMENT = 32
_UINT32, _STRING, _F32 = 4, 8, 0
_VERSION = 3


def save_control_vector(
    path: str | os.PathLike, vectors: Float[np.ndarray, "layers width"], model_hint: str
) -> None:
    """Writes one domain's vectors as `direction.N`, float32, little-endian GGUF version 3.

    llama.cpp adds `direction.N`, from 1 on, to the output of block N. Our layers 0 and 1 (what
    enters blocks 0 and 1) have no name there and are left out.

    Args:
      path: of the file.
      vectors: `[L+1, d]` in our layer convention.
      model_hint: architecture that llama.cpp would warn about if it is another, as in `qwen2`.
    """
    directions = {
        f"direction.{n}": np.ascontiguousarray(v, "<f4")
        for n, v in layers_as(vectors, "llama_cpp").items()
    }
    fields = [
        _string("general.architecture") + struct.pack("<I", _STRING) + _string("controlvector"),
        _string("controlvector.model_hint") + struct.pack("<I", _STRING) + _string(model_hint),
        _string("controlvector.layer_count") + struct.pack("<II", _UINT32, len(directions)),
    ]
    header = b"GGUF" + struct.pack("<IQQ", _VERSION, len(directions), len(fields))
    header += b"".join(fields)
    offset = 0
    for name, v in directions.items():
        header += _string(name) + struct.pack("<IQIQ", 1, v.size, _F32, offset)
        offset += v.nbytes + _padding(v.nbytes)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(header + bytes(_padding(len(header))))
        for v in directions.values():
            file.write(v.tobytes() + bytes(_padding(v.nbytes)))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _padding(size: int) -> int:
    return -size % _ALIGNMENT
