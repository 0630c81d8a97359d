"""A study's programs, lowered for given shapes: of training, evaluation and concepts."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ema_jax.compile_check.workload import Workload
from ema_jax.concepts import capture, interventions
from ema_jax.data.batching import Batch
from ema_jax.data.packing import Branched
from ema_jax.generation import sampler
from ema_jax.models import checkpoint, lora
from ema_jax.models.decoder import Decoder
from ema_jax.models.sharding import (
    batch_multiple,
    batch_rows,
    batch_sharding,
    parameter_shardings,
)
from ema_jax.unlearning import reference, utility
from ema_jax.unlearning import train_step as steps
from ema_jax.unlearning.optimizers import optimizer

_PROMPTS = 4  # one prompt pass fills a quarter of the rows that decode
_UTILITY_ROWS = 16


def lowered(work: Workload, mesh: Mesh, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Lowers programs by name: `(name, jax.stages.Lowered)` for any of `PROGRAMS`."""
    for name in names:
        yield name, PROGRAMS[name](work, mesh)


def _train(work: Workload, mesh: Mesh) -> Any:
    arm = work.arm
    model = nnx.eval_shape(lambda: _evaluated(work))
    graph, *states = nnx.split(model, steps.select_trainable(arm), ...)
    initial, frozen = (_placed(state, mesh) for state in states)
    setup = steps.TrainSetup(graph, arm.program, mesh, initial, frozen, arm.traced_settings)
    trained = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), states[0])
    opt_state = jax.eval_shape(optimizer(arm).init, trained)
    state = steps.TrainState(_placed(trained, mesh), _placed(opt_state, mesh))
    batch = work.step_batch(batch_multiple(mesh))
    rows = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh, axis=1)),
        batch.rows,
    )
    return steps.train_step.lower(setup, state, batch._replace(rows=rows))


def _capture(work: Workload, mesh: Mesh) -> Any:
    rows, tokens = batch_rows(work.prompt_rows, mesh), work.prompt_tokens
    graph, state = _split(work, mesh, _evaluated)
    return capture._pooled.lower(
        graph,
        state,
        *_prompts(rows, tokens, mesh),
        _rows((rows, work.poolings, tokens), jnp.float32, mesh),
        branches=False,
    )


def _decode(work: Workload, mesh: Mesh) -> Any:
    graph, state = _split(work, mesh, _evaluated)

    def decode(state: nnx.State, slots: Any, few: jax.Array, eos_ids: jax.Array) -> Any:
        # As one program, so that the weights count twice: stacked, and layer by layer.
        layers = sampler._layers(graph, state)
        outer = nnx.split(lora.detach(nnx.merge(graph, state)))
        fixed = {"sampling": sampler.GREEDY, "mesh": mesh}
        return sampler._advance(*outer, layers, slots, few, eos_ids, **fixed)

    numbers = (_whole((), jnp.int32, mesh), _whole((2,), jnp.int32, mesh))
    slots = _slots(work, mesh)
    return jax.jit(decode, donate_argnames="slots").lower(state, slots, *numbers)


def _prefill(work: Workload, mesh: Mesh) -> Any:
    rows, tokens = batch_rows(-(-work.decode_rows // _PROMPTS), mesh), work.prompt_tokens
    graph, state = _split(work, mesh, _evaluated)

    def prefill(state: nnx.State, layers: Any, slots: Any, *numbers: jax.Array) -> Any:
        return sampler._fill(graph, state, slots, *numbers, mesh=mesh)

    # The weights laid out for decoding are held meanwhile, and so counted.
    program = jax.jit(prefill, donate_argnames="slots", keep_unused=True)
    return program.lower(
        state,
        [_layer(state["blocks"], mesh)] * work.model.num_layers,
        _slots(work, mesh),
        *_prompts(rows, tokens, mesh),
        _whole((rows,), jnp.int32, mesh),
        _whole((rows, 2), jnp.uint32, mesh),
        _whole((rows,), jnp.int32, mesh),
    )


def _reference(work: Workload, mesh: Mesh) -> Any:
    rows, length = reference.pass_shape(work.train_tokens, mesh)
    listed = [_rows((batch_rows(rows, mesh), length), jnp.int32, mesh)] * len(Branched._fields)
    return reference._token_log_probs.lower(*_split(work, mesh, _evaluated), Branched(*listed))


def _utility(work: Workload, mesh: Mesh) -> Any:
    graph, state = _split(work, mesh, _evaluated)
    batch = _examples(_UTILITY_ROWS, work, mesh)
    if work.arm.trainable == "full":
        return utility._totals.lower(graph, state, *_split(work, mesh, _base), batch)

    def totals(state: nnx.State, batch: Batch) -> Any:
        # Base and adapted model share their arrays.
        base = nnx.split(lora.detach(nnx.merge(graph, state)))
        return utility._totals(graph, state, *base, batch)

    return jax.jit(totals).lower(state, batch)


def _sweep(work: Workload, mesh: Mesh) -> Any:
    rows, every = batch_rows(work.prompt_rows, mesh), work.model.num_layers + 1
    graph, state = _split(work, mesh, _base)
    change = _whole((every, work.candidates, work.model.hidden_size), jnp.float32, mesh)

    def sweep(state: nnx.State, add: jax.Array, remove: jax.Array, *batch: jax.Array) -> Any:
        candidates = interventions.Intervention(add, remove)
        # So many prompts at once leave no room for a second candidate.
        return interventions._sweep(graph, state, *batch, candidates, chunk=1)

    return jax.jit(sweep).lower(
        state,
        *(change, change),
        *_prompts(rows, work.prompt_tokens, mesh),
        _whole((work.model.vocab_size,), jnp.bool, mesh),
        _whole((every,), jnp.int32, mesh),
    )


PROGRAMS: Mapping[str, Callable[[Workload, Mesh], Any]] = {
    "train": _train,
    "capture": _capture,
    "decode": _decode,
    "prefill": _prefill,
    "reference": _reference,
    "utility": _utility,
    "sweep": _sweep,
}
"""Each of a study's programs of the whole model, by what it is for."""


def _base(work: Workload) -> Decoder:
    """The base model in its dtype, for tracing alone."""
    abstract = checkpoint.abstract_decoder(work.model)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, work.dtype), abstract)


def _evaluated(work: Workload) -> Decoder:
    """The model that the arm trains and its evaluation runs: with adapters, if it has any.

    The base is read by the same programs, with adapters that change nothing.
    """
    base, arm = _base(work), work.arm
    return lora.attach(base, arm.lora, jax.random.key(0)) if arm.trainable == "lora" else base


def _split(work: Workload, mesh: Mesh, build: Callable[[Workload], Decoder]) -> tuple[Any, Any]:
    """Structure of a model, and shapes of its parameters as they lie on the mesh."""
    graph, state = nnx.split(nnx.eval_shape(lambda: build(work)))
    return graph, _placed(state, mesh)


def _slots(work: Workload, mesh: Mesh) -> Any:
    """Rows that decode, empty."""
    rows, sizes = batch_rows(work.decode_rows, mesh), (work.slots, work.new_tokens, work.dtype)
    empty = jax.eval_shape(lambda: sampler._Slots.empty(work.model, rows, *sizes, seen=False))
    return _shaped(empty, empty.shardings(mesh))


def _layer(blocks: Any, mesh: Mesh) -> Any:
    """The shapes of one block, of those of all of them stacked."""

    def cut(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, P(*tuple(leaf.sharding.spec)[1:]))
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)

    return jax.tree.map(cut, blocks)


def _placed(state: Any, mesh: Mesh) -> Any:
    """Shapes of parameters, with the shardings that the study gives them."""
    return _shaped(state, parameter_shardings(state, mesh))


def _shaped(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def _prompts(rows: int, tokens: int, mesh: Mesh) -> tuple[Any, Any]:
    """Tokens and mask of prompts."""
    return _rows((rows, tokens), jnp.int32, mesh), _rows((rows, tokens), jnp.bool, mesh)


def _examples(rows: int, work: Workload, mesh: Mesh) -> Batch:
    """Prompts with responses, padded to the longest."""
    shape = (batch_rows(rows, mesh), work.train_tokens)
    return Batch(*(_rows(shape, dtype, mesh) for dtype in (jnp.int32, jnp.bool, jnp.bool)))


def _rows(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))


def _whole(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> Any:
    """An array that every device has."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))
