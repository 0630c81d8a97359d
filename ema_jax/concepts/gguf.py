"""Control vectors in GGUF, as llama.cpp (`--control-vector`) and repeng read them."""

import os

import numpy as np
from gguf import GGUFWriter
from jaxtyping import Float

from ema_jax.concepts.vectors import layers_as
from ema_jax.runtime.files import atomic_path


def save_control_vector(
    path: str | os.PathLike, vectors: Float[np.ndarray, "layers width"], model_hint: str
) -> None:
    """Writes one domain's vectors as `direction.N`, float32.

    llama.cpp adds `direction.N`, from 1 on, to the output of block N. Our layers 0 and 1 (the
    residual stream entering blocks 0 and 1) have no name there and are left out.

    Args:
      path: of the file.
      vectors: `[L+1, d]` in our layer convention.
      model_hint: architecture, such as `qwen2`; llama.cpp warns about a model of another one.
    """
    directions = layers_as(vectors, "llama_cpp")
    with atomic_path(path) as temporary:
        writer = GGUFWriter(temporary, "controlvector")
        writer.add_string("controlvector.model_hint", model_hint)
        writer.add_uint32("controlvector.layer_count", len(directions))
        for number, vector in directions.items():
            writer.add_tensor(f"direction.{number}", np.ascontiguousarray(vector, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
