"""One rule for JSON in every file that is read: what could not be written again is refused."""

import itertools
import json

import pyarrow
import pyarrow.parquet
import pytest

from ema_jax.concepts.store import ActivationStore
from ema_jax.data.local import read_local
from ema_jax.errors import UserError
from ema_jax.judge import read_rows
from ema_jax.models import orbax_folder, peft_config
from ema_jax.models.config import DecoderConfig
from ema_jax.models.gguf_folder import weights
from ema_jax.models.safetensors_files import WeightFiles
from ema_jax.refusal.endpoint.answer_cache import AnswerCache
from ema_jax.refusal.sheet import label_results
from ema_jax.study.manifest import read_manifest
from ema_jax.unlearning.preferred import preferred_responses

# Values that Python's own parser takes, or fails on with something else than a ValueError.
BAD = {
    "NaN": "NaN",
    "infinity": "-Infinity",
    "a number too large": "1e999",
    "thousands of digits": "9" * 5000,
    "hundreds of digits": "9" * 400,
    "a lone surrogate": '"\\ud800"',
    "the other half": '"a\\udc00b"',
    "arrays in arrays": "[" * 5000 + "]" * 5000,
    "objects in objects": '{"a":' * 5000 + "1" + "}" * 5000,
    "unclosed": "[" * 100_000,
    "a surrogate as a name": '{"\\ud800": 1}',
    "no JSON": "nul",
}


def inside(path, bad):
    """A well-formed object around a value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"prompt": "a", "response": "b", "domain": "d", "x": {bad}}}')
    return path


READERS = {
    "config.json": lambda f, bad: (inside(f / "config.json", bad), DecoderConfig.from_folder(f)),
    "index": lambda f, bad: (
        inside(f / "model.safetensors.index.json", bad),
        WeightFiles.find(f),
    ),
    "adapter_config.json": lambda f, bad: (
        (f / peft_config.WEIGHTS).write_text(""),
        inside(f / "adapter_config.json", bad),
        peft_config.read(f),
    ),
    "Flax manifest": lambda f, bad: (
        inside(f / "manifest.json", bad),
        orbax_folder.read_manifest(f),
    ),
    "GGUF pointer": lambda f, bad: (inside(f / "gguf.json", bad), weights(f)),
    "stage manifest": lambda f, bad: read_manifest(inside(f / "x.json", bad)),
    "prompts": lambda f, bad: read_local(inside(f / "x.jsonl", bad)),
    "rows to judge": lambda f, bad: read_rows(inside(f / "x.jsonl", bad)),
    "preferred": lambda f, bad: preferred_responses(str(inside(f / "x.jsonl", bad)), ["a"]),
    "labels": lambda f, bad: (
        (f / "labels.csv").write_text("id,label\nr1,refused\n"),
        inside(f / "labels.key.json", bad),
        label_results(f, {}),
    ),
}


@pytest.mark.parametrize(("reader", "bad"), itertools.product(READERS, BAD))
def test_refused_in_one_line(tmp_path, reader, bad):
    with pytest.raises(UserError, match="not valid JSON") as caught:
        READERS[reader](tmp_path, BAD[bad])
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 500


@pytest.mark.parametrize("bad", BAD)
def test_an_answer_cache_with_it_is_none_or_skips_the_line(tmp_path, bad):
    path = inside(tmp_path / "x", BAD[bad])
    with pytest.raises(UserError, match="not a cache"):
        AnswerCache(str(path))
    line = f'{{"hash": "a", "verdict": "refused", "score": {BAD[bad]}, "reason": null}}\n'
    path.write_text(line)
    assert AnswerCache(str(path)).verdicts == {}


@pytest.mark.parametrize(
    "row",
    [
        {"hash": []},
        {"hash": {}, "verdict": "refused", "score": 1, "reason": "x"},
        {"hash": "a", "verdict": [], "score": 1, "reason": "x"},
        {"hash": "a", "verdict": "refused", "score": [], "reason": "x"},
        {"hash": "a", "verdict": "refused", "score": 1, "reason": {}},
        {"hash": "a", "verdict": "refused", "score": 1, "reason": "", "harm": []},
        {"hash": "a"},
    ],
)
def test_a_row_of_another_kind_in_an_answer_cache(tmp_path, row):
    (tmp_path / "x").write_text(json.dumps(row) + "\n")
    assert AnswerCache(str(tmp_path / "x")).verdicts == {}


@pytest.mark.parametrize(
    "key", ["[]", "3", "null", '{"r1": []}', '{"r1": {}}', '{"r1": {"run": 1}}', '{"r1": null}']
)
def test_a_damaged_key_of_labels(tmp_path, key):
    (tmp_path / "labels.csv").write_text("id,label\nr1,refused\n")
    (tmp_path / "labels.key.json").write_text(key)
    with pytest.raises(UserError, match=r"r1' is (none of|damaged)"):
        label_results(tmp_path, {})


@pytest.mark.parametrize("pointer", ["[]", "{}", '{"file": 3}', '{"file": null}', '"x"'])
def test_a_damaged_pointer_to_a_gguf_file(tmp_path, pointer):
    (tmp_path / "gguf.json").write_text(pointer)
    with pytest.raises(UserError, match="names no file"):
        weights(tmp_path)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"a"', "{}"])
def test_a_damaged_record_of_activations_begins_anew(tmp_path, content):
    path = tmp_path / "a.safetensors"
    (tmp_path / ".a.safetensors.partial.json").write_text(content)
    assert ActivationStore(path, {"x": (2, 3)}, {}).done == 0


COLUMNS = ("prompt", "domain", "id", "split", "source", "group", "category")
ROW = {"prompt": "A?", "domain": "d"}


@pytest.mark.parametrize(("column", "bad"), itertools.product(COLUMNS, BAD))
def test_every_column_of_a_prompt_file(tmp_path, column, bad):
    fields = {name: json.dumps(value) for name, value in ROW.items()} | {column: BAD[bad]}
    line = ", ".join(f'"{name}": {value}' for name, value in fields.items())
    (tmp_path / "x.jsonl").write_text(f"{{{line}}}")
    with pytest.raises(UserError, match=r"x\.jsonl:1: not valid JSON"):
        read_local(tmp_path / "x.jsonl")


HEADERS = {
    "an open quote": b'"prompt,domain\nA?,d\n',
    "an open quote at the end": b'prompt,"domain\nA?,d\n',
    "an open quote in the middle": b'prompt,"domain,id\nA?,d,1\n' * 3,
    "text after a quote": b'"prompt"x,domain\nA?,d\n',
    "a long open quote": b'"prompt,domain\n' + b"A?,d\n" * 50_000,
    "a null": b"prom\0pt,domain\nA?,d\n",
    "a column twice": b"prompt,prompt,domain\nA?,B?,d\n",
    "another column twice": b"prompt,domain,id,id\nA?,d,1,2\n",
    "other capitals": b"Prompt,Domain\nA?,d\n",
    "semicolons": b"prompt;domain\nA?;d\n",
    "UTF-16": "prompt,domain\nA?,d\n".encode("utf-16"),
    "nothing": b"",
    "only ends of lines": b"\n\n",
    "a long name": b"x" * 200_000 + b",prompt,domain\na,A?,d\n",
    "a null in a cell": b"prompt,domain\nA\0?,\0\n",
}


@pytest.mark.parametrize("header", HEADERS)
def test_headers_of_csv(tmp_path, header):
    (tmp_path / "x.csv").write_bytes(HEADERS[header])
    if header == "a null in a cell":
        read_local(tmp_path / "x.csv")
        return
    with pytest.raises(UserError, match=r"x\.csv:\d+: ") as caught:
        read_local(tmp_path / "x.csv")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def table(**columns):
    return pyarrow.table({"prompt": ["A?"], "domain": ["d"]} | columns)


def binary(*values):
    """Text that is no UTF-8, which other writers of Parquet allow."""
    return pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())


PARQUET = {
    "a column twice": lambda: pyarrow.Table.from_arrays(
        [pyarrow.array(["A?"])] * 3, names=["prompt", "domain", "prompt"]
    ),
    "an id twice": lambda: pyarrow.Table.from_arrays(
        [pyarrow.array(["A?"])] * 4, names=["prompt", "domain", "id", "id"]
    ),
    "no UTF-8 in an id": lambda: table(id=binary(b"\xff")),
    "no UTF-8 in a category": lambda: table(category=binary(b"\xed\xa0\x80")),
    "no UTF-8 in a prompt": lambda: pyarrow.table({"prompt": binary(b"\xff"), "domain": ["d"]}),
    "numbers": lambda: pyarrow.table({"prompt": [1.0], "domain": ["d"]}),
    "lists": lambda: table(category=[["a"]]),
    "NaN": lambda: table(id=[float("nan")]),
    "dates": lambda: table(id=pyarrow.array([10**18], pyarrow.timestamp("ns"))),
    "dates beyond Python's": lambda: table(id=pyarrow.array([2**62], pyarrow.timestamp("us"))),
    "durations beyond Python's": lambda: table(id=pyarrow.array([2**62], pyarrow.duration("s"))),
    "objects": lambda: table(group=[{"a": 1}]),
}


@pytest.mark.parametrize("case", PARQUET)
def test_tables_of_parquet(tmp_path, case):
    pyarrow.parquet.write_table(PARQUET[case](), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet: ") as caught:
        read_local(tmp_path / "x.parquet")
    assert "\n" not in str(caught.value)


def test_a_parquet_column_whose_name_is_no_utf8(tmp_path):
    pyarrow.parquet.write_table(table(naXe=["x"]), tmp_path / "x.parquet")
    data = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(data.replace(b"naXe", b"na\xffe"))
    with pytest.raises(UserError, match=r"UTF-8|not a readable") as caught:
        read_local(tmp_path / "x.parquet")
    assert "\n" not in str(caught.value)
