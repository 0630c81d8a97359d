"""Decoding against transformers: greedy token by token, sampling by its logits processors."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats
from tiny_models import FAMILIES, VOCABULARY, load_torch
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ema_jax.data import batching
from ema_jax.errors import UserError
from ema_jax.generation import sampler
from ema_jax.generation.sampler import Sampling
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


def by_transformers(model, eos_ids, penalty=1.0) -> list[tuple[int, ...]]:
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
        repetition_penalty=penalty,
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


# With two rows, prompts take the places of responses that have ended.
@pytest.mark.parametrize(
    ("variant", "rows"), [*((family, 64) for family in FAMILIES), ("mistral_window", 2)]
)
def test_tokens_equal_those_of_transformers(tiny, variant, rows):
    model, reference = checkpoint.load(tiny(variant)), load_torch(tiny(variant))
    endless = by_transformers(reference, [VOCABULARY])  # an id that never comes
    # Ends that do come, one early and one late.
    eos_ids = (endless[0][4], endless[1][1])
    expected = by_transformers(reference, eos_ids)
    assert len({len(row) for row in expected}) > 1, "rows have to end at different steps"
    got = ours(model, eos_ids, batch_size=rows)
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


def test_the_shapes_of_accelerators_change_nothing(tiny, monkeypatch):
    model = checkpoint.load(tiny("qwen2"))
    expected = ours(model, (5, 6))
    for module in (sampler, batching):
        monkeypatch.setattr(module, "on_cpu", lambda mesh: False)
    assert ours(model, (5, 6)) == expected


def test_rows_that_have_ended_cost_nothing(tiny, monkeypatch):
    """Row-steps of 150 prompts, of which few have a long response, and the responses themselves."""
    monkeypatch.setattr(sampler, "_LARGE", 0)
    model = checkpoint.load(tiny("llama"))
    rng = np.random.default_rng(2)
    asked = [
        " ".join(map(str, rng.integers(0, VOCABULARY, rng.integers(2, 9)))) for _ in range(150)
    ]
    everything, steps = sampler.generate, []
    logits = Decoder.logits

    def counted(self, hidden):
        jax.debug.callback(lambda: steps.append(hidden.shape[0]))
        return logits(self, hidden)

    ends, options = tuple(range(0, VOCABULARY, 5)), {"max_new_tokens": 30}
    alone = dict(everything(model, chat(*ends), asked, batch_size=10, **options))
    monkeypatch.setattr(Decoder, "logits", counted)
    got = dict(everything(model, chat(*ends), asked, batch_size=65, **options))
    jax.effects_barrier()
    assert got == alone
    lengths = [len(response.tokens) for response in got.values()]
    assert max(lengths) == 30 > 2 * np.median(lengths)
    # Batches of 65 that wait for their longest response take 30 steps, three times.
    assert sum(steps) < 65 * 30 * 3 / 2
    skipped = dict(everything(model, chat(*ends), asked, batch_size=65, done={0, 7}, **options))
    assert skipped == {i: response for i, response in alone.items() if i not in {0, 7}}


def test_a_new_ring_begins_where_half_of_the_slots_would_be_empty():
    lengths = {0: 3, 1: 100, 2: 20, 3: 64, 4: 3}
    assert list(sampler._rings(lengths, 8)) == [[1, 3], [2, 0, 4]]
    assert list(sampler._rings(lengths, 200)) == [[1, 3, 2, 0, 4]]


def test_a_repetition_penalty_is_that_of_transformers(tiny):
    model, reference = checkpoint.load(tiny("qwen2")), load_torch(tiny("qwen2"))
    expected = by_transformers(reference, [VOCABULARY], penalty=1.5)
    assert expected != by_transformers(reference, [VOCABULARY])
    got = ours(model, (VOCABULARY,), sampling=Sampling(repetition_penalty=1.5))
    assert [got[i].tokens for i in range(len(LENGTHS))] == expected


def test_most_likely_is_the_argmax():
    logits = np.random.default_rng(0).integers(0, 9, size=(50, 40)).astype(np.float32)  # with ties
    logits[0], logits[1, :30] = -np.inf, -np.inf
    logits[2] = np.nan
    found = sampler.most_likely(jnp.asarray(logits))
    np.testing.assert_array_equal(found, logits.argmax(axis=-1))
    assert found.dtype == jnp.int32


@pytest.mark.parametrize(
    ("sampling", "processors"),
    [
        (Sampling(0.7), [TemperatureLogitsWarper(0.7)]),
        (Sampling(1.0, top_k=5), [TopKLogitsWarper(5)]),
        (Sampling(1.0, top_k=10**6), []),
        (Sampling(1.0, top_p=0.6), [TopPLogitsWarper(0.6)]),
        (Sampling(1.0, top_p=1e-6), [TopPLogitsWarper(1e-6)]),
        (
            Sampling(1.3, top_k=20, top_p=0.8),
            [TemperatureLogitsWarper(1.3), TopKLogitsWarper(20), TopPLogitsWarper(0.8)],
        ),
    ],
)
def test_what_is_ruled_out_is_what_transformers_rules_out(sampling, processors):
    logits = np.random.default_rng(1).normal(0, 2, (16, 50)).astype(np.float32)
    expected = torch.tensor(logits)
    for processor in processors:
        expected = processor(None, expected)
    np.testing.assert_allclose(sampler.warp(jnp.asarray(logits), sampling), expected, rtol=1e-6)


def test_a_draw_depends_on_seed_and_prompt_alone(tiny):
    model = checkpoint.load(tiny("qwen2"))
    drawn = ours(model, (VOCABULARY,), sampling=Sampling(1.0, seed=3))
    assert ours(model, (VOCABULARY,), sampling=Sampling(1.0, seed=3), batch_size=2) == drawn
    assert ours(model, (VOCABULARY,), sampling=Sampling(1.0, seed=4)) != drawn
    assert ours(model, (VOCABULARY,)) != drawn


def test_draws_have_the_models_probabilities(tiny):
    """First tokens of one prompt asked many times, by a chi-squared test."""
    model = checkpoint.load(tiny("qwen2"))
    asked = [prompts()[0]] * 4000
    options = {"max_new_tokens": 1, "batch_size": 1000, "sampling": Sampling(0.5, top_k=6)}
    drawn = [r.tokens[0] for _, r in sampler.generate(model, chat(VOCABULARY), asked, **options)]
    tokens = np.array([chat(0).prompt_tokens(asked[0])])
    hidden = model(tokens, np.ones(tokens.shape, bool)).hidden
    warped = sampler.warp(model.logits(hidden[:, -1]), options["sampling"])
    expected = 4000 * np.asarray(jax.nn.softmax(warped))[0]
    found = np.bincount(drawn, minlength=VOCABULARY)
    assert not found[expected == 0].any()
    likely = expected > 0
    assert stats.chisquare(found[likely], expected[likely], sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"repetition_penalty": 0}]
)
def test_sampling_out_of_range(bad):
    with pytest.raises(UserError, match=f"{next(iter(bad))} = .* is out of range"):
        Sampling(**bad)


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
