"""Greedy decoding against transformers' `generate`, token by token."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, VOCABULARY, load_torch

from ema_jax.generation import sampler
from ema_jax.models import checkpoint
from ema_jax.models.decoder import Decoder
from ema_jax.models.sharding import make_mesh

CAP = 10
LENGTHS = (3, 9, 1, 6, 9)


def prompts() -> list[str]:
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, VOCABULARY, size) for size in LENGTHS]
    return [" ".join(map(str, row)) for row in rows]


def chat(*eos_ids: int) -> SimpleNamespace:
    """What the sampler asks of a chat, over prompts that are written as numbers."""
    return SimpleNamespace(
        prompt_tokens=lambda text: tuple(int(number) for number in text.split()),
        eos_ids=eos_ids,
        pad_id=eos_ids[0],
        decode=lambda ids: " ".join(map(str, ids)),
    )


def by_transformers(model, eos_ids) -> list[tuple[int, ...]]:
    """One left-padded batch of all prompts; rows are cut after their first end."""
    rows = [chat(0).prompt_tokens(text) for text in prompts()]
    width = max(LENGTHS)
    tokens = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    out = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=CAP,
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=list(eos_ids),
        pad_token_id=0,
    )
    found = []
    for row in out[:, width:].tolist():
        ends = [i for i, token in enumerate(row) if token in eos_ids]
        found.append(tuple(row[: ends[0] + 1] if ends else row))
    return found


def ours(model, eos_ids, **options) -> dict[int, sampler.Response]:
    options = {"max_new_tokens": CAP} | options
    return dict(sampler.generate(model, chat(*eos_ids), prompts(), **options))


@pytest.mark.parametrize("variant", [*FAMILIES, "mistral_window"])
def test_tokens_equal_those_of_transformers(tiny, variant):
    model, reference = checkpoint.load(tiny(variant)), load_torch(tiny(variant))
    endless = by_transformers(reference, [VOCABULARY])  # an id that never comes
    # Ends that do come, one early and one late.
    eos_ids = (endless[0][4], endless[1][1])
    expected = by_transformers(reference, eos_ids)
    assert len({len(row) for row in expected}) > 1, "rows have to end at different steps"
    got = ours(model, eos_ids)
    assert [got[i].tokens for i in range(len(LENGTHS))] == expected
    for response in got.values():
        assert response.finished == (response.tokens[-1] in eos_ids)
        assert response.text == " ".join(map(str, response.tokens))


def test_batch_size_and_mesh_change_nothing(tiny):
    folder = tiny("qwen2")
    # Two ends, as in the test above, so that its program serves here too.
    expected = ours(checkpoint.load(folder), (5, 6))
    assert ours(checkpoint.load(folder), (5, 6), batch_size=2) == expected
    mesh = make_mesh((2, 2, 2))
    assert ours(checkpoint.load(folder, mesh=mesh), (5, 6), mesh=mesh) == expected


def test_it_stops_once_every_row_has_ended(tiny, monkeypatch):
    model = checkpoint.load(tiny("llama"))
    steps = []
    logits = Decoder.logits

    def counted(self, hidden):
        jax.debug.callback(lambda: steps.append(1))
        return logits(self, hidden)

    monkeypatch.setattr(Decoder, "logits", counted)
    everything = tuple(range(VOCABULARY))
    got = ours(model, everything, max_new_tokens=CAP + 1)
    jax.effects_barrier()
    assert {len(response.tokens) for response in got.values()} == {1}
    assert len(steps) == 1, "the first token comes out of the prompt's own pass"


def test_no_prompts(tiny):
    model = checkpoint.load(tiny("llama"))
    assert list(sampler.generate(model, chat(0), [], max_new_tokens=2)) == []
