"""What a session computes once."""

from typing import Any, cast

import numpy as np

from ema_jax.data.chat import TokenExample
from ema_jax.study import session as sessions
from ema_jax.study.session import ModelSession


def test_rates_score_each_response_once(monkeypatch):
    a, b, c = (TokenExample((1, 2), (n,)) for n in range(3))
    asked = []

    def log_probs(examples):
        asked.append(list(examples))
        return np.array([-float(x.response[0]) for x in examples], np.float32)

    session = ModelSession(cast(Any, None), cast(Any, None))
    monkeypatch.setattr(session, "log_probs", log_probs)
    assert session._known_log_probs([a, b, a]).tolist() == [0, -1, 0]
    assert session._known_log_probs([c, b]).tolist() == [-2, -1]
    assert session._known_log_probs([]).tolist() == []
    monkeypatch.setattr(sessions, "_MOST_KNOWN", 1)
    assert session._known_log_probs([a, c]).tolist() == [0, -2]
    assert asked == [[a, b], [c], [], [a, c]]
