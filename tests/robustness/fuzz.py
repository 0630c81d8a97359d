"""Fuzzing of every loader: seeds that load are damaged, and loading ends well or in a `UserError`.

    PYTHONPATH=. python tests/robustness/fuzz.py 600          # seconds over all loaders
    PYTHONPATH=. python tests/robustness/fuzz.py 60 prompts   # of those whose name holds a word

A file may take 10 s and 2 GiB. What fails is printed with its bytes, smallest first.
"""

import collections
import contextlib
import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS_PER_FILE, BYTES = 10, 2 << 30

VALUES = (
    *(None, True, False, 0, -1, 1, 2, 7, 2**31, 2**32, 2**63, 10**18, 10**30, 10**307),
    *(0.5, -0.0, 1e308, "", "a", " ", "\x00", "é", "\u2028", "../x", "/etc/hostname", "a" * 5000),
    *("{{ 1 }}", "<|im_end|>", [], {}, [[]], [0], [None], {"": 0}, {"a": {}}, ["a", 1, {}]),
    [-1] * 50,
)
FRAGMENTS = (
    *(b"NaN", b"Infinity", b"1e999", b"9" * 5000, b'"\\ud800"', b"[" * 300, b"{" * 300, b"\x00"),
    *(b"\xff\xfe", b"\xed\xa0\x80", b'"', b"'", b"\\", b"\n", b"\r", b",", b":", b"null", b"{%"),
    *(b"%}", b"{{", b"}}", b"-", b"0x", b"\xef\xbb\xbf"),
)


def damage(data: bytes, random_: random.Random) -> bytes:
    """The bytes with one or a few faults: of a bit, of a byte, of a stretch, of a JSON value."""
    for _ in range(random_.choice((1, 1, 1, 2, 5))):
        kind = random_.randrange(9)
        place = random_.randrange(len(data) + 1)
        if kind < 3 and (structured := _damaged_json(data, random_)) is not None:
            data = structured
        elif kind in (3, 4) and data:
            place = min(place, len(data) - 1)
            data = (
                data[:place] + bytes([data[place] ^ 1 << random_.randrange(8)]) + data[place + 1 :]
            )
        elif kind == 5:
            data = data[:place] + random_.choice(FRAGMENTS) + data[place:]
        elif kind == 6:
            end = min(len(data), place + random_.choice((1, 2, 8, 100)))
            data = data[:place] + data[end:]
        elif kind == 7:
            data = data[:place]
        else:
            size = random_.choice((1, 4, 8))
            data = data[:place] + random_.randbytes(size) + data[place + size :]
    return data


def _damaged_json(data: bytes, random_: random.Random) -> bytes | None:
    """With one value of the JSON (of one of its lines) replaced, removed or doubled."""
    lines = data.split(b"\n")
    which = random_.randrange(len(lines))
    whole = data.lstrip()[:1] in b"{[" and data.lstrip()[:1] and len(lines[0]) < 3
    try:
        value = json.loads(data if whole else lines[which])
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict | list):
        return None
    value = copy.deepcopy(value)
    parent: Any = value
    while True:
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        if not keys:
            break
        key = random_.choice(keys)
        if isinstance(parent[key], dict | list) and random_.random() < 0.7:
            parent = parent[key]
            continue
        act = random_.randrange(5)
        if act == 0:
            del parent[key]
        elif act == 1 and isinstance(parent, dict):
            parent[random_.choice(("", "a", "x" * 300, key.upper()))] = parent.pop(key)
        elif act == 2 and isinstance(parent[key], int | float | str):
            parent[key] = parent[key] * random_.choice((-1, 0, 2, 1000))
        else:
            parent[key] = random_.choice(VALUES)
        break
    text = json.dumps(value).encode()
    return text if whole else b"\n".join([*lines[:which], text, *lines[which + 1 :]])


@dataclass
class Target:
    """A loader and the file that is damaged for it."""

    name: str
    make: Callable[[Path], Path]
    load: Callable[[Path], Any]
    tried: int = 0
    accepted: int = 0
    faults: dict[str, tuple[bytes, str]] = field(default_factory=dict)


def targets() -> list[Target]:
    """Every loader, with its seed."""
    import jax
    import numpy as np
    import pyarrow
    import pyarrow.parquet

    from ema_jax.concepts.store import ActivationStore
    from ema_jax.concepts.vectors import load_concepts, save_concepts
    from ema_jax.data.chat import Chat
    from ema_jax.data.local import read_local
    from ema_jax.data.prompts import Prompt, read_prompts, write_prompts
    from ema_jax.generation.journal import Journal
    from ema_jax.judge import read_rows
    from ema_jax.models import checkpoint, hub, lora, orbax_folder, peft_config
    from ema_jax.organism import CHECKPOINTS
    from ema_jax.refusal.endpoint.answer_cache import AnswerCache
    from ema_jax.refusal.sheet import label_results, read_sheet
    from ema_jax.runtime.files import sha256_text, write_json
    from ema_jax.runtime.leases import Holder
    from ema_jax.study.manifest import read_manifest, verify
    from ema_jax.sweep.worker import StudyGrid
    from ema_jax.unlearning.preferred import preferred_responses

    source = CHECKPOINTS / "qwen2"
    model = checkpoint.load(source)

    def folder_with(name: str) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            shutil.copytree(source, folder, dirs_exist_ok=True)
            return folder / name

        return make

    def sharded(folder: Path) -> Path:
        checkpoint.export(model, folder / "m", companions=source, max_shard_bytes=300_000)
        return folder / "m" / "model.safetensors.index.json"

    def flax(folder: Path) -> Path:
        checkpoint.save_flax(model, folder / "m", companions=source)
        return folder / "m" / "manifest.json"

    def adapter(name: str) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            config = lora.LoRAConfig(rank=2, targets=("q_proj",))
            attached = lora.attach(model, config, jax.random.key(0))
            lora.save_peft(attached, folder / "a", config, "x")
            return folder / "a" / name

        return make

    def written(name: str, text: str) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            (folder / name).write_text(text)
            return folder / name

        return make

    rows = [
        {
            "prompt": f"A {i}?",
            "domain": "d",
            "id": i,
            "split": "eval",
            "category": "c",
            "group": "g",
        }
        for i in range(3)
    ]
    prompts_text = "".join(json.dumps(row) + "\n" for row in rows)

    def parquet(folder: Path) -> Path:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "p.parquet")
        return folder / "p.parquet"

    def prompts(folder: Path) -> Path:
        made = [Prompt(f"i{i}", "d", "eval", "A?", "s", sha256_text("A?"), "g") for i in range(2)]
        write_prompts(folder, made)
        return folder / "eval.jsonl"

    def manifest(folder: Path) -> Path:
        (folder / "out").write_text("x")
        record = {
            "stage": "x",
            "settings": {"a": [1, 2.5, None]},
            "inputs": {"prompts": "0" * 64},
            "outputs": {"out": sha256_text("x")},
            "stamps": {"out": [1, 2]},
            "hash": "0" * 64,
            "wall_seconds": 1.5,
        }
        write_json(folder / "x.json", record)
        return folder / "x.json"

    def load_manifest(path: Path) -> None:
        verify(path.parent, path, read_manifest(path))

    def concepts(folder: Path) -> Path:
        values = {"d": np.ones((3, 4), np.float32)}
        save_concepts(
            folder / "c.safetensors",
            values,
            values,
            {"pooling": "last", "model_hash": "x", "contrast": "benign"},
        )
        return folder / "c.safetensors"

    def labels(folder: Path) -> Path:
        key = {"r1": {"run": "base", "prompt": "i", "response_sha256": "0", "probability": 0.5}}
        row = {"id": "i", "domain": "d", "response_sha256": "0", "verdict": "refused", "reason": ""}
        (folder / "responses").mkdir(exist_ok=True)
        (folder / "responses/base.jsonl").write_text(json.dumps(row) + "\n")
        (folder / "labels.csv").write_text("id,label\nr1,refused\n")
        (folder / "labels.key.json").write_text(json.dumps(key))
        return folder / "labels.key.json"

    def partial(folder: Path) -> Path:
        store = ActivationStore(folder / "a", {"x": (2, 3)}, {"m": "1"})
        store.commit(1, {"x": ([0], np.ones((1, 3), np.float32))})
        return folder / ".a.partial.json"

    def gguf(folder: Path) -> Path:
        sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
        from gguf_files import write_gguf

        shutil.copytree(source, folder / "m", dirs_exist_ok=True)
        config = json.loads((folder / "m" / "config.json").read_text())
        config.setdefault("rope_parameters", {"rope_theta": config.get("rope_theta", 1e4)})
        (folder / "m" / "config.json").write_text(json.dumps(config))
        return write_gguf(folder / "x.gguf", folder / "m")

    answer = {"hash": "a", "verdict": "refused", "score": 1.0, "reason": "x", "harm": "harmful"}
    unit = {"status": "done", "message": "", "seconds": 1.0}
    return [
        *(
            Target(name, folder_with(name), lambda path: checkpoint.check(path.parent))
            for name in ("config.json", "model.safetensors", "tokenizer.json")
        ),
        Target("weights", folder_with("model.safetensors"), lambda p: checkpoint.load(p.parent)),
        Target("index", sharded, lambda path: checkpoint.check(path.parent)),
        *(
            Target(f"chat: {name}", folder_with(name), lambda path: Chat.load(path.parent))
            for name in (
                "tokenizer.json",
                "tokenizer_config.json",
                "chat_template.jinja",
                "generation_config.json",
            )
        ),
        Target("identity", folder_with("config.json"), lambda path: hub.find(str(path.parent))),
        Target("Flax manifest", flax, lambda path: orbax_folder.read_manifest(path.parent)),
        Target(
            "adapter_config.json",
            adapter(peft_config.ADAPTER_CONFIG),
            lambda p: lora.load_peft(model, p.parent),
        ),
        Target(
            "adapter_model", adapter(peft_config.WEIGHTS), lambda p: lora.load_peft(model, p.parent)
        ),
        Target("prompts: JSONL", written("p.jsonl", prompts_text), read_local),
        Target(
            "prompts: CSV",
            written("p.csv", 'prompt,domain,id\n"A, ""b""?",d,1\nC?,d,2\n'),
            read_local,
        ),
        Target("prompts: Parquet", parquet, read_local),
        Target("prompts: of a study", prompts, lambda path: read_prompts(path.parent)),
        Target(
            "rows to judge",
            written("r.jsonl", '{"prompt": "a", "response": "b", "finished": true}\n' * 3),
            read_rows,
        ),
        Target(
            "preferred",
            written("r.jsonl", '{"prompt": "a", "response": "b"}\n'),
            lambda p: preferred_responses(str(p), ["a"]),
        ),
        Target("manifest", manifest, load_manifest),
        Target("journal", written("j", '{"index": 0, "tokens": [1, 2]}\n' * 3), Journal),
        Target(
            "answer cache", written("c", json.dumps(answer) + "\n"), lambda p: AnswerCache(str(p))
        ),
        Target("labels: key", labels, lambda path: label_results(path.parent, {"base": ["base"]})),
        Target(
            "labels: sheet",
            written("l.csv", "id,arm,label\nr1,base,refused\nr2,base,\n"),
            read_sheet,
        ),
        Target("concepts", concepts, load_concepts),
        Target(
            "activations",
            partial,
            lambda p: ActivationStore(p.parent / "a", {"x": (2, 3)}, {"m": "1"}),
        ),
        Target(
            "lease",
            written("l", json.dumps(Holder.this()._asdict())),
            lambda p: (h := Holder.read(p.read_bytes().decode(errors="replace"))) and h.alive(),
        ),
        Target("GGUF", gguf, lambda path: hub.find(str(path))),
        *_of_a_finished_study(),
        Target(
            "record of a sweep",
            written("finished.json", json.dumps(unit)),
            lambda p: StudyGrid.status(_grid(p), "u"),
        ),
    ]


def _of_a_finished_study() -> list[Target]:
    """What comparing and sharing read of a study's folder."""
    from ema_jax.share import hub, inspect_log, tables
    from ema_jax.study.comparison import compare
    from ema_jax.study.finished import read_results

    sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
    from report_fixtures import write_finished

    def of(name: str) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            write_finished(folder / "one")
            write_finished(folder / "two")
            return folder / "two" / name

        return make

    def compared(folder: Path) -> None:
        compare([folder.parent / "one", folder])

    def pushed(folder: Path) -> None:
        private = type("Info", (), {"private": True})()
        calls = {"create_repo": "url", "repo_info": private, "create_commit": None}
        api = type("Api", (), {k: lambda *_, _v=v, **__: _v for k, v in calls.items()})()
        hub.push(folder, "npo", 0, "me/x", api=api)

    def logged(folder: Path) -> None:
        inspect_log.write(folder, "base", folder / "x.json")

    return [
        Target("results: compared", of("results.json"), lambda p: compared(p.parent)),
        Target(
            "results: as a table",
            of("results.json"),
            lambda p: tables.write(read_results(p.parent), p.with_suffix(".csv")),
        ),
        Target("results: of a card", of("results.json"), lambda p: pushed(p.parent)),
        Target(
            "manifest: of a card",
            of("stages/unlearn.npo.seed_0.json"),
            lambda p: pushed(p.parents[1]),
        ),
        Target("prompts: compared", of("prompts/eval.jsonl"), lambda p: compared(p.parents[1])),
        Target(
            "responses: compared",
            of("responses/npo.seed_0.jsonl"),
            lambda p: compared(p.parents[1]),
        ),
        Target(
            "responses: for Inspect", of("responses/base.jsonl"), lambda p: logged(p.parents[1])
        ),
        Target("prompts: for Inspect", of("prompts/eval.jsonl"), lambda p: logged(p.parents[1])),
    ]


def _grid(path: Path) -> Any:
    """What `StudyGrid.status` needs of a grid whose one record is this file."""
    folder = path.parent / "sweep"
    (folder / "finished").mkdir(parents=True, exist_ok=True)
    shutil.copy(path, folder / "finished" / "u.json")
    return type("Grid", (), {"folder": folder})()


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Ends what takes more than its seconds or its memory."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS_PER_FILE} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_PER_FILE)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def fuzz(target: Target, seconds: float, seed: int) -> None:
    """Damages a target's file for some seconds, and notes what ends otherwise than it may."""
    from ema_jax.errors import UserError

    random_ = random.Random(f"{target.name} {seed}")
    with tempfile.TemporaryDirectory() as name:
        path = target.make(Path(name))
        good = path.read_bytes()
        target.load(path)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            data = damage(good, random_)
            path.write_bytes(data)
            target.tried += 1
            try:
                with limited():
                    target.load(path)
                target.accepted += 1
            except UserError as error:
                if "\n" in str(error):
                    _note(target, data, f"UserError of several lines: {str(error)[:300]!r}")
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                frames = [
                    f for f in traceback.extract_tb(error.__traceback__) if "ema_jax" in f.filename
                ]
                last = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(last.filename).name}:{last.lineno}"
                _note(target, data, f"{type(error).__name__} at {where}: {str(error)[:200]!r}")


def _note(target: Target, data: bytes, what: str) -> None:
    key = what.partition(": ")[0]
    if key not in target.faults or len(data) < len(target.faults[key][0]):
        target.faults[key] = (data, what)


def main() -> None:
    """Fuzzes for the given seconds, and prints what was tried and what was wrong."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XDG_CACHE_HOME", tempfile.mkdtemp())
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    word = sys.argv[2] if len(sys.argv) > 2 else ""
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    chosen = [target for target in targets() if word in target.name]
    for target in chosen:
        try:
            fuzz(target, seconds / len(chosen), seed)
        except Exception:
            _note(target, b"", f"the seed fails: {traceback.format_exc(limit=-3)}")
        print(
            f"{target.name:26} tried {target.tried:7,}, accepted {target.accepted:7,}, "
            f"places that fail {len(target.faults)}",
            flush=True,
        )
        for data, what in target.faults.values():
            print(
                "   ",
                what,
                "\n       ",
                data[:300] if len(data) < 5000 else f"{len(data)} bytes",
                flush=True,
            )
    totals = collections.Counter(
        tried=sum(t.tried for t in chosen), faults=sum(len(t.faults) for t in chosen)
    )
    print(f"all: tried {totals['tried']:,}, places that fail {totals['faults']}")


if __name__ == "__main__":
    main()
