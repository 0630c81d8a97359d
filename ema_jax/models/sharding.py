"""The mesh `(data, fsdp, tensor)` and every partition spec, in one place.

`jax.jit` runs in its automatic mode: arrays are placed by these specs, and XLA carries the
shardings through the program.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from ema_jax.errors import UserError
from ema_jax.models.config import DecoderConfig

T = TypeVar("T")
Q = ParamSpec("Q")

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
VOCABULARY = ("tensor", "fsdp")

_COLUMN = {"kernel": P(None, "fsdp", "tensor"), "bias": P(None, "tensor")}
# Adapters are small, and whole along fsdp: split there, XLA gathers all rows' activations on every
# device to make their gradients.
_COLUMN |= {"lora_b": P(None, None, "tensor")}
_ROW = {"kernel": P(None, "tensor", "fsdp"), "lora_a": P(None, "tensor")}
_SPECS: dict[str, P | dict[str, P]] = {
    "embed": P(VOCABULARY),
    "head": P(None, VOCABULARY),
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), _COLUMN),
    **dict.fromkeys(("o_proj", "down_proj"), _ROW),
}


def make_mesh(shape: Sequence[int] | None = None) -> Mesh:
    """A mesh over the first devices; one of the sizes may be -1, for all devices left.

    By default it has one device, and those of all processes where there are several.

    Raises:
        UserError: not three sizes, more devices than there are, or, with several processes, not
            all of them.
    """
    if shape is None:
        shape = (1, -1, 1) if jax.process_count() > 1 else (1, 1, 1)
    sizes, available = list(shape), jax.device_count()
    if len(sizes) != 3 or sizes.count(-1) > 1 or any(n < 1 for n in sizes if n != -1):
        raise UserError(
            f"mesh {tuple(sizes)}: expected three positive sizes (data, fsdp, tensor), of which "
            "one may be -1"
        )
    if -1 in sizes:
        known = -sizes[0] * sizes[1] * sizes[2]
        sizes[sizes.index(-1)] = max(available // known, 1)
    needed = sizes[0] * sizes[1] * sizes[2]
    if needed > available:
        raise UserError(
            f"mesh {tuple(sizes)} (data, fsdp, tensor) needs {needed} devices and there are "
            f"{available}; set --config.mesh to sizes whose product is at most {available}"
        )
    if jax.process_count() > 1 and needed < available:
        raise UserError(
            f"mesh {tuple(sizes)} (data, fsdp, tensor): with several processes it has to take all "
            f"{available} devices; set one of the sizes of --config.mesh to -1"
        )
    return jax.make_mesh(tuple(sizes), AXES, (AxisType.Auto,) * 3, devices=jax.devices()[:needed])


def parameter_spec(path: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
    """Partition spec of one parameter; a dimension that its axes do not divide is not split."""
    table = next((_SPECS[part] for part in path if part in _SPECS), P())
    wanted: P = table.get(path[-1], P()) if isinstance(table, dict) else table
    padded = tuple(wanted) + (None,) * (len(shape) - len(wanted))
    spec = []
    for size, axes in zip(shape, padded, strict=True):
        names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
        parts = 1
        for name in names:
            parts *= mesh.shape[name]
        spec.append(axes if size % parts == 0 else None)
    return P(*spec)


def parameter_shardings(state: Any, mesh: Mesh) -> Any:
    """A tree like the state's, with a `NamedSharding` for every (abstract) array."""

    def sharding(path: tuple, leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        names = tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
        names = tuple(name for name in names if name != "value")
        return NamedSharding(mesh, parameter_spec(names, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, state)


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Sharding of a batch: rows, which lie along `axis`, over the data and fsdp axes."""
    return NamedSharding(mesh, P(*(None,) * axis, *BATCH))


def cache_sharding(num_kv_heads: int, mesh: Mesh) -> NamedSharding:
    """Sharding of keys and values `[B, K, …]`: rows as in a batch, heads over the tensor axis."""
    split = num_kv_heads % mesh.shape["tensor"] == 0
    return NamedSharding(mesh, P(*BATCH, "tensor" if split else None))


def product(
    x: Float[Array, "B ... I"],
    kernel: Float[Array, "I O"],
    multiply: Callable[[Array, Array], Array] = jnp.matmul,
) -> Float[Array, "B ... O"]:
    """`x @ kernel`, sending the smaller of the two over the fsdp axis.

    The axis splits rows and, for storage, kernels. Without constraints, XLA multiplies with the
    split kernel: it gathers all rows on every device and sums their products over the mesh. That
    is right for the few rows of a decode step, and several times too much traffic for a batch:
    there both sides (and so the gradient) stay split by rows, and the kernel is gathered.
    """
    results = math.prod(x.shape[:-1]) * kernel.shape[-1]
    if x.size + 2 * results < kernel.size:
        return _rows_over(multiply(_rows_over(x, None), kernel), None)
    return _rows_over(multiply(_rows_over(x, BATCH[0]), kernel), BATCH[0])


def vocabulary_product(
    x: Float[Array, "B ... D"], head: Float[Array, "D V"]
) -> Float[Array, "B ... V"]:
    """Logits in float32, split over the vocabulary as the head is.

    Only `x` and, in the backward pass, its gradient are sent over the fsdp axis: for a chunk of
    time both are small compared with the head or the logits. Where they are not, or where the axes
    do not divide the vocabulary, this is `product`.
    """
    mesh = jax.typeof(x).sharding.mesh
    parts = math.prod(mesh.shape.get(axis, 1) for axis in VOCABULARY)
    if head.shape[-1] % parts or 2 * x.size > head.size:
        return product(x, head, _float32_product)
    rows = _rows_over(_rows_over(x, BATCH[0]), "data")
    return _rows_over(_float32_product(rows, head), "data", VOCABULARY)


def _float32_product(x: Float[Array, "... D"], head: Float[Array, "D V"]) -> Float[Array, "... V"]:
    """`x @ head`, summed and returned in float32, whose backward products are as wide as these.

    JAX would keep the slopes of the results in float32 and so multiply float32 by float32: at half
    the speed or less, and of a head that has to be converted first. They are rounded to bfloat16
    where both factors are, as PyTorch does.
    """
    if x.dtype == head.dtype == jnp.bfloat16:
        return _bfloat16_product(x, head)
    return jnp.matmul(x, head, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _bfloat16_product(x: Float[Array, "... D"], head: Float[Array, "D V"]) -> Float[Array, "... V"]:
    return jnp.matmul(x, head, preferred_element_type=jnp.float32)


def _bfloat16_product_forward(x: Array, head: Array) -> tuple[Array, tuple[Array, Array]]:
    return _bfloat16_product(x, head), (x, head)


def _bfloat16_product_backward(factors: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    """Cotangents of both factors, summed in float32."""
    x, head = factors
    slope = slope.astype(jnp.bfloat16)
    wide = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    of_x, of_head = wide("...v,dv->...d", slope, head), wide("...v,...d->vd", slope, x).T
    return of_x.astype(x.dtype), of_head.astype(head.dtype)


_bfloat16_product.defvjp(_bfloat16_product_forward, _bfloat16_product_backward)


def _rows_over(x: Float[Array, "B ... F"], axes: Any, last: Any = P.UNCONSTRAINED) -> Any:
    """Constrains, inside a program on a mesh, the axes that split rows (and features)."""
    mesh = jax.typeof(x).sharding.mesh
    traced = isinstance(x, jax.core.Tracer)
    if mesh.axis_names != AXES or not traced or x.shape[0] % batch_multiple(mesh):
        return x
    spec = P(axes, *(P.UNCONSTRAINED,) * (x.ndim - 2), last)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def matmul_precision() -> str | None:
    """The precision of products that stands where this is called; None for the backend's own."""
    return jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]


def at_precision(rule: Callable[Q, T]) -> Callable[Concatenate[str | None, Q], T]:
    """`rule`, given a precision first: JAX traces rules of a gradient where no `exact` stands."""

    # Not `functools.wraps`: `jax.custom_vjp` counts the arguments of what is wrapped.
    def precisely(precision: str | None, *args: Q.args, **options: Q.kwargs) -> T:
        with jax.default_matmul_precision(precision):
            return rule(*args, **options)

    return precisely


def exact(method: Callable[Concatenate[Any, Q], T]) -> Callable[Concatenate[Any, Q], T]:
    """A method of a model whose products are as exact as the model's weights.

    By default those of float32 are not on accelerators: GPUs round factors to TF32, TPUs to
    bfloat16. `jax_default_matmul_precision` of one's own stands.
    """

    @functools.wraps(method)
    def exactly(model: Any, *args: Q.args, **options: Q.kwargs) -> T:
        narrow = model.embed[...].dtype != jnp.float32 or jax.default_backend() == "cpu"
        if narrow or matmul_precision() is not None:
            return method(model, *args, **options)
        with jax.default_matmul_precision("highest"):
            return method(model, *args, **options)

    return exactly


def on_cpu(mesh: Mesh) -> bool:
    """Whether the devices are CPUs, which compile quickly and compute slowly."""
    return mesh.devices.flat[0].platform == "cpu"


def batch_multiple(mesh: Mesh | AbstractMesh) -> int:
    """The number that divides the rows of every batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_rows(rows: int, mesh: Mesh) -> int:
    """`rows` (at least one), rounded up to a multiple that the mesh divides."""
    multiple = batch_multiple(mesh)
    return -(-max(rows, 1) // multiple) * multiple


def place_batch(batch: T, mesh: Mesh, axis: int = 0) -> T:
    """Lays a NumPy batch, which every process holds in full, out over the mesh by rows."""
    sharding = batch_sharding(mesh, axis)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch
    )


def host_array(x: jax.Array) -> np.ndarray:
    """The full array in NumPy, on every process; all processes have to call this."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def validate(
    config: DecoderConfig, shape: Mapping[str, int], batches: Mapping[str, int], parts: int = 1
) -> None:
    """Checks, before anything is compiled, that a mesh divides a model and its batches.

    Args:
        config: the architecture.
        shape: devices along each axis of the mesh.
        batches: name → rows of each kind of training batch.
        parts: number of equal parts of a batch that are processed one after another.

    Raises:
        UserError: heads or rows that an axis does not divide, with sizes that would work.
    """
    tensor = shape["tensor"]
    heads, groups = config.num_heads, config.num_kv_heads
    if heads % tensor or groups % tensor:
        fitting = [n for n in range(1, groups + 1) if heads % n == 0 and groups % n == 0]
        raise UserError(
            f"mesh: tensor = {tensor} does not divide {heads} heads and {groups} key-value heads; "
            f"use one of {', '.join(map(str, fitting))}"
        )
    multiple = shape["data"] * shape["fsdp"] * parts
    for name, rows in batches.items():
        if rows % multiple:
            into = "data · fsdp" + (" · accumulate" if parts > 1 else "")
            raise UserError(
                f"{name} = {rows} does not divide over the mesh ({into} = {multiple}); "
                f"use {-(-rows // multiple) * multiple}"
            )
