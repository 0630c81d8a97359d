"""Files and logs that other runs read again."""

import json
import math

import numpy as np
import pytest

from ema_jax.runtime.append_log import AppendLog
from ema_jax.runtime.files import json_safe


def test_json_safe_values_are_what_json_gives_back():
    value = {1: np.array([1.0, np.nan]), "a": [(np.float32(2), np.int64(3))], "b": None}
    safe = {"1": [1.0, None], "a": [[2.0, 3]], "b": None}
    assert json_safe(value) == safe == json.loads(json.dumps(json_safe(value), allow_nan=False))
    assert json_safe({"x": math.inf, "n": np.int32(2), "t": True}) == {"x": None, "n": 2, "t": True}


def test_a_log_survives_a_kill_at_any_byte(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    log, rows = AppendLog(path), [{"i": 0, "text": "é"}, {"i": 1}]
    for row in rows:
        log.append(row)
    data = path.read_bytes()
    for end in range(len(data) + 1):
        path.write_bytes(data[:end])
        before = list(AppendLog(path).rows.values())
        assert before == rows[: len(before)]
        AppendLog(path).append({"i": 2})
        read = AppendLog(path)
        assert list(read.rows.values()) == [*before, {"i": 2}]
        assert len(read.torn) <= 1
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.append({"x": math.nan})
