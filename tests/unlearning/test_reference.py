"""Log-probabilities of responses: with many in a row and a prompt shared, as of each by itself."""

import jax
import numpy as np
import pytest

from ema_jax.data.batching import pad_examples
from ema_jax.data.chat import TokenExample
from ema_jax.models import checkpoint
from ema_jax.models.sharding import make_mesh
from ema_jax.unlearning import reference
from ema_jax.unlearning.log_probs import token_log_probs
from ema_jax.unlearning.reference import response_log_probs


def drawn(room: int) -> list[TokenExample]:
    """Twelve responses to one prompt, which do not fit one row, and a few to others."""
    rng = np.random.default_rng(0)

    def ids(number: int) -> tuple[int, ...]:
        return tuple(rng.integers(1, 97, size=number).tolist())

    prompts = [ids(5), ids(1), ids(9)]
    asked = [prompts[0]] * 12 + [prompts[1], prompts[2]] * 3
    several = [TokenExample(prompt, ids(1 + i % 8)) for i, prompt in enumerate(asked)]
    odd = [TokenExample((), ids(4)), TokenExample((), ids(1)), TokenExample(prompts[0], ())]
    return [*several, *odd, TokenExample(ids(room - 6), ids(6))]


@pytest.mark.parametrize("variant", ["qwen2", "mistral_window"])
def test_a_shared_prompt_changes_nothing(tiny, monkeypatch, variant):
    monkeypatch.setattr(reference, "_LENGTH", 32)
    examples = drawn(32)
    model = checkpoint.load(tiny(variant))
    batch = pad_examples(examples, 32, len(examples))
    alone = np.asarray(jax.jit(token_log_probs)(model, batch.tokens, batch.mask))
    for mesh in (make_mesh(), make_mesh((2, 2, 2))):
        spread = checkpoint.load(tiny(variant), mesh=mesh)
        found = response_log_probs(spread, examples, mesh=mesh)
        for example, ours, row in zip(examples, found, alone, strict=True):
            first = max(len(example.prompt), 1) - 1
            expected = row[first : max(example.size - 1, first)]
            np.testing.assert_allclose(ours, expected, atol=1e-5, err_msg=str(example))
