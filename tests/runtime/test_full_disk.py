"""Every writer at a full disk: an error that the command turns into exit code 3, and no remains.

The largest size of a file that the process may write stands in for the disk.
"""

import resource

import jax
import numpy as np
import pytest

from ema_jax.concepts.gguf import save_control_vector
from ema_jax.concepts.store import ActivationStore
from ema_jax.models import checkpoint, lora
from ema_jax.runtime import disk, files
from ema_jax.runtime.append_log import AppendLog

LIMIT = 40_000
TEXT = "x" * (2 * LIMIT)


@pytest.fixture
def full():
    """A context in which no file may grow beyond `LIMIT` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


CONFIG = lora.LoRAConfig(rank=64)


def adapters(model):
    return lora.attach(model, CONFIG, jax.random.key(0))


WRITERS = {
    "text": lambda path, model: files.write_text(path, TEXT),
    "JSON": lambda path, model: files.write_json(path, {"a": TEXT}),
    "rows": lambda path, model: files.write_jsonl(path, [{"a": TEXT}]),
    "CSV": lambda path, model: files.write_csv(path, [{"a": TEXT}]),
    "tensors": lambda path, model: files.write_tensors(path, {"a": np.ones((LIMIT,))}, {}),
    "a log": lambda path, model: AppendLog(path).append({"a": TEXT}),
    "control vectors": lambda path, model: save_control_vector(
        path, np.ones((5, LIMIT), np.float32), "qwen2"
    ),
    "activations": lambda path, model: ActivationStore(path, {"a": (LIMIT,)}, {}),
    "adapters": lambda path, model: lora.save_peft(adapters(model), path, CONFIG, "base"),
    "a Hugging Face folder": lambda path, model: checkpoint.export(model, path),
    "a Flax folder": lambda path, model: checkpoint.save_flax(model, path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_told_as_one(tiny, tmp_path, full, writer):
    model, path = checkpoint.load(tiny("qwen2")), tmp_path / "out"
    full()
    with pytest.raises(OSError, match=r"File too large|requested and") as caught:
        WRITERS[writer](path, model)
    assert disk.full_disk(caught.value) in disk.FULL_DISK
    if writer not in ("a log", "activations"):  # which are continued
        assert not any(tmp_path.iterdir())


CAUSES = {
    "the system's": OSError(28, "No space left on device"),
    "as NumPy has it": OSError("40000 requested and 9920 written"),
    "of a quota": OSError(122, "Disk quota exceeded"),
    "as TensorStore has it": ValueError("RESOURCE_EXHAUSTED: write: [No space left on device]"),
    "as a group": ExceptionGroup("x", [ValueError("a"), OSError(28, "No space left on device")]),
}


def chained(cause, *, explicit):
    try:
        try:
            raise cause
        except type(cause) as inner:
            if explicit:
                raise RuntimeError("later") from inner
            raise RuntimeError("later")  # noqa: B904
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("cause", CAUSES)
def test_a_full_disk_is_seen_through_other_errors(cause):
    error = CAUSES[cause]
    assert disk.full_disk(error) in disk.FULL_DISK
    for explicit in (True, False):
        assert disk.full_disk(chained(error, explicit=explicit)) in disk.FULL_DISK


@pytest.mark.parametrize(
    "error",
    [OSError(5, "Input/output error"), ValueError("space"), ExceptionGroup("x", [KeyError()])],
)
def test_other_errors_are_no_full_disk(error):
    assert disk.full_disk(error) is None
