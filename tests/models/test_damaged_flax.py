"""Damaged Flax folders: one line, and nothing of Orbax's own threads beside it."""

import asyncio
import gc
import itertools
import shutil

import pytest

from ema_jax.errors import UserError
from ema_jax.models import checkpoint, orbax_folder

DAMAGE = {
    "removed": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "other bytes": lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
# Parts of the names of Orbax's files; one of each kind.
FILES = ("_METADATA", "manifest.ocdbt", "d/", "_sharding", "orbax.checkpoint")


@pytest.fixture(scope="module")
def flax(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flax") / "m"
    checkpoint.save_flax(checkpoint.load(tiny("qwen2")), folder)
    return folder


def refusal(folder):
    """What a load says that is refused; some faults do no harm."""
    try:
        checkpoint.load(folder)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("name", "damage"), itertools.product(FILES, DAMAGE))
def test_one_line_and_nothing_beside_it(flax, tmp_path, caplog, capfd, name, damage):
    folder = tmp_path / "m"
    shutil.copytree(flax, folder)
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    inside = [p for p in files if "parameters" in p.parts]
    found = [p for p in inside if name in str(p.relative_to(folder / "parameters"))]
    if not found:
        pytest.fail(f"Orbax has no {name} any more: {[str(p.relative_to(folder)) for p in files]}")
    for path in found:
        DAMAGE[damage](path)
    assert "\n" not in refusal(folder)
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]
    assert "Traceback" not in capfd.readouterr().err


def test_a_task_that_is_freed_later_is_not_reported_either(caplog):
    async def fail():
        raise ValueError("one")

    def both_fail():
        with orbax_folder.quietly():
            loop.run_until_complete(asyncio.sleep(0))
            loop.close()
            raise ValueError("another")

    loop = asyncio.new_event_loop()
    held = [loop.create_task(fail())]  # as a log record holds an error, and that its frames
    with pytest.raises(ValueError, match="another"):
        both_fail()
    assert held[0].done()
    held.clear()
    gc.collect()
    assert not caplog.records
