import json

import numpy as np
import pytest
from scipy.linalg import subspace_angles
from scipy.spatial.distance import cosine as scipy_cosine_distance
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from ema_jax.concepts import entanglement as module
from ema_jax.concepts import resampling
from ema_jax.concepts.entanglement import MEASURES, Entanglement, all_pairs
from ema_jax.concepts.resampling import (
    Regroupings,
    centred_contrasts,
    gram_matrix,
    permutations_of,
    raw_contrasts,
)
from ema_jax.concepts.subspaces import subspaces
from ema_jax.concepts.transfer import probe_transfer
from ema_jax.concepts.vectors import concept_vectors, matched_contrast, matched_vectors
from ema_jax.errors import UserError

DOMAINS = ("cybersecurity", "safety", "toxicity", "bias", "privacy")


def unrelated(seed=0, n=24, layers=3, width=256, signal=0.0, domains=DOMAINS):
    """Domains with independent mean vectors of length `signal`, unit noise per dimension."""
    rng = np.random.default_rng(seed)
    return {
        d: (
            signal / np.sqrt(width) * rng.normal(size=(1, layers, width))
            + rng.normal(size=(n, layers, width))
        ).astype(np.float32)
        for d in (*domains, "benign")
    }


def entanglement(acts, target, domains, measures=("cosine", "cosine_centred"), **settings):
    """Two measures by default: what a test does not look at, it does not wait for."""
    return module.entanglement(acts, target, domains, measures=measures, **settings)


def direct_cosine(a, b):
    return np.array([1 - scipy_cosine_distance(x, y) for x, y in zip(a, b, strict=True)])


FEW = {"permutations": 10, "splits": 2, "bootstraps": 3}
COSINES = ("cosine", "cosine_centred", "cosine_own", "cosine_standardised")


def test_cosines_restated_with_scipy_and_sklearn():
    acts = unrelated(signal=4.0)
    mean = {d: x.astype(np.float64).mean(0) for d, x in acts.items()}
    grand = np.mean([mean[d] for d in DOMAINS], axis=0)
    c, b, none = (mean[d] for d in ("cybersecurity", "bias", "benign"))
    order, parts = matched_contrast({d: x[:, 0] for d, x in acts.items()}, DOMAINS)
    lexical = {d: x[:, :1] for d, x in acts.items()}
    found = entanglement(acts, "cybersecurity", DOMAINS, COSINES, lexical=lexical, **FEW)
    own = dict(zip(DOMAINS, np.split(acts["benign"][order], np.cumsum(parts)[:-1]), strict=True))
    own_c, own_b = (own[d].astype(np.float64).mean(0) for d in ("cybersecurity", "bias"))
    expected = {
        "cosine": direct_cosine(c - none, b - none),
        "cosine_centred": direct_cosine(c - grand, b - grand),
        "cosine_own": direct_cosine(c - own_c, b - own_b),
    }
    vectors = matched_vectors(acts, order, parts)
    np.testing.assert_allclose(
        expected["cosine_own"],
        direct_cosine(vectors["cybersecurity"], vectors["bias"]),
        atol=1e-5,
    )
    within = np.concatenate([acts[d] - mean[d] for d in (*DOMAINS, "benign")])
    freedom = len(within) / (len(within) - len(acts))
    clipped = []
    for layer in range(3):
        scaler = StandardScaler(with_mean=False).fit(within[:, layer])
        rows = {
            d: np.clip(scaler.transform(x[:, layer] - grand[layer]) / np.sqrt(freedom), -3, 3)
            for d, x in acts.items()
        }
        z = {d: x.mean(0) for d, x in rows.items()}
        difference = (z[d] - z["benign"] for d in ("cybersecurity", "bias"))
        clipped.append(1 - scipy_cosine_distance(*difference))
    expected["cosine_standardised"] = np.array(clipped)
    for name, values in expected.items():
        np.testing.assert_allclose(found.measures[name].observed["bias"], values, atol=2e-5)


def test_an_outlier_dimension_owns_the_raw_cosine_but_not_the_standardised_one():
    acts = unrelated(signal=2.0)
    plain = entanglement(acts, "safety", DOMAINS, measures=COSINES, **FEW)
    assert (plain.outlier_share["bias"] < 0.1).all()
    for d, x in acts.items():
        x[..., 7] = 50 * x[..., 7] + (500 if d != "benign" else 0)
    found = entanglement(acts, "safety", DOMAINS, measures=COSINES, **FEW)
    assert (found.cosine.observed["bias"] > 0.99).all()
    assert (found.measures["cosine_standardised"].observed["bias"] < 0.8).all()
    vector = concept_vectors(acts)["bias"].astype(float) ** 2
    np.testing.assert_allclose(found.outlier_share["bias"], vector[:, 7] / vector.sum(1), rtol=1e-5)
    assert (found.outlier_share["bias"] > 0.99).all()


def test_constant_dimensions_do_not_break_standardising():
    acts = unrelated(signal=2.0)
    for x in acts.values():
        x[..., 3] = 1.0
    found = entanglement(acts, "safety", DOMAINS, measures=("cosine_standardised",), **FEW)
    assert np.isfinite(found.measures["cosine_standardised"].observed["bias"]).all()


def test_targets_are_rows_of_one_table():
    acts = unrelated(signal=3.0, layers=2)
    pairs = all_pairs(acts, DOMAINS, **FEW)
    assert tuple(pairs.measures) == MEASURES
    for name, figures in pairs.measures.items():
        for x in (figures.observed, figures.null95, figures.ceiling):
            np.testing.assert_allclose(x, x.swapaxes(1, 2), atol=1e-6, err_msg=name)
            assert np.isfinite(x[:, 0, 1]).all(), name
        assert figures.observed.shape == (2, 5, 5)
        assert figures.ci95.shape == (2, 5, 5, 2)
    one = entanglement(acts, "bias", DOMAINS, MEASURES, **FEW)
    assert one.to_json() == pairs.towards("bias").to_json()
    np.testing.assert_array_equal(
        one.cosine.observed["safety"], pairs.measures["cosine"].observed[:, 3, 1]
    )


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_gram_path_equals_direct_path(offset):
    """Cosines from inner products against float64 means, label permutation by permutation."""
    rng = np.random.default_rng(3)
    sizes = np.array([9, 14, 11, 10])
    x = rng.normal(size=(sizes.sum(), 64)) + 0.3 * np.repeat(rng.normal(size=(4, 64)), sizes, 0)
    common = offset * rng.normal(size=64)
    x32 = (x + common).astype(np.float32)
    labels = np.repeat(np.arange(4), sizes)
    centred = x32 - x32[labels < 3].astype(np.float64).mean(0)
    gram = gram_matrix(centred.astype(np.float32))
    for contrasts in (raw_contrasts(3), centred_contrasts(3)):
        draws = permutations_of(rng, 6, np.arange(len(x)), labels, contrasts)
        found = draws.cosines(gram)
        for r in range(6):
            group_means = [x32[draws.labels[r] == g].astype(np.float64).mean(0) for g in range(4)]
            vectors = contrasts @ np.array(group_means)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            np.testing.assert_allclose(found[r], vectors @ vectors.T, atol=2e-5)


def test_chunks_do_not_change_the_cosines(monkeypatch):
    rng = np.random.default_rng(4)
    gram = gram_matrix(rng.normal(size=(12, 5)).astype(np.float32))
    draws = permutations_of(rng, 7, np.arange(12), np.repeat([0, 1, 2], 4), raw_contrasts(2))
    whole = draws.cosines(gram)
    monkeypatch.setattr("ema_jax.concepts.resampling._CHUNK_ELEMENTS", 100)
    np.testing.assert_allclose(draws.cosines(gram), whole, atol=1e-6)


def test_pairs_of_unlike_numbers_of_prompts_share_a_program():
    """Rows that count nothing change nothing, and a program takes seconds to compile on a GPU."""
    sizes = (9, 14, 11, 4, 3, 4)  # of three domains, and the contrast prompts of each
    rng = np.random.default_rng(6)
    layers = [rng.normal(size=(sum(sizes), 20)).astype(np.float32) for _ in range(2)]
    for kind, largest in (("raw", 14 + 11 + 11), ("own", 14 + 11 + 3 + 4)):
        before = resampling._regrouped_cosines._cache_size()
        resampling.calibrate(layers, sizes, [kind], **FEW, seed=0)
        assert resampling._regrouped_cosines._cache_size() == before + 1, kind
        draws = resampling._null_draws(rng, 7, kind, sizes)
        assert {len(drawn.rows) for drawn in draws.values()} == {largest}
        assert min(drawn.counts.sum() for drawn in draws.values()) < 7 * largest
    drawn = permutations_of(rng, 7, np.arange(12), np.repeat([0, 1, 2], 4), raw_contrasts(2))
    gram = gram_matrix(layers[0])
    np.testing.assert_allclose(drawn.padded(30).cosines(gram), drawn.cosines(gram), atol=1e-6)


def test_counts_are_multiplicities():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(9, 20)).astype(np.float32)
    labels, counts = np.repeat([0, 1, 2], 3), np.array([1, 2, 0, 1, 1, 1, 3, 0, 0])
    draws = Regroupings(np.arange(9), labels[None], counts[None], raw_contrasts(2))
    m = [np.repeat(x, counts * (labels == g), axis=0).mean(0) for g in range(3)]
    expected = 1 - scipy_cosine_distance(m[0] - m[2], m[1] - m[2])
    assert draws.cosines(gram_matrix(x))[0, 0, 1] == pytest.approx(expected, abs=1e-5)


def test_nulls_sit_where_theory_puts_them():
    """Unrelated domains: one half with a shared contrast set, -1/(D-1) after centring."""
    found = entanglement(
        unrelated(width=512), "safety", DOMAINS, measures=COSINES, permutations=200, splits=5
    )
    own = found.measures["cosine_own"]
    for d in found.cosine.observed:
        np.testing.assert_allclose(own.null_mean[d], 0, atol=0.02)
        np.testing.assert_allclose(own.observed[d], 0, atol=0.15)
        np.testing.assert_allclose(found.cosine.null_mean[d], 0.5, atol=0.02)
        np.testing.assert_allclose(found.cosine.observed[d], 0.5, atol=0.15)
        np.testing.assert_allclose(found.cosine_centred.null_mean[d], -1 / 4, atol=0.02)
        np.testing.assert_allclose(found.cosine_centred.observed[d], -1 / 4, atol=0.15)
        assert (found.cosine.null95[d] > found.cosine.null_mean[d]).all()
        low, high = found.cosine.null_interval[d].T
        assert (low < found.cosine.null_mean[d]).all()
        assert (high > found.cosine.null95[d]).all()


def test_null_with_unequal_groups():
    """Noise of a mean goes with 1/n: the shared contrast set's share of it sets the raw null."""
    acts = unrelated(width=512, n=40)
    acts["benign"] = acts["benign"][:10]
    found = entanglement(acts, "safety", DOMAINS, permutations=200, splits=5)
    expected = (1 / 10) / (1 / 10 + 1 / 40)
    np.testing.assert_allclose(found.cosine.null_mean["bias"], expected, atol=0.02)


def test_false_positive_rate_of_null95():
    exceeded: dict[str, list] = {}
    measures = [name for name in MEASURES if name != "subspace_overlap"]
    for seed in range(30):
        acts = unrelated(seed, n=10, layers=2, width=48)
        found = entanglement(
            acts,
            "safety",
            DOMAINS,
            measures=measures,
            permutations=99,
            splits=2,
            bootstraps=2,
            seed=seed,
        )
        for name, calibrated in found.measures.items():
            exceeded.setdefault(name, []).append(
                [calibrated.observed[d] > calibrated.null95[d] for d in calibrated.observed]
            )
    for name, values in exceeded.items():
        assert 0.005 < np.mean(values) < 0.11, name
    assert 0.02 < np.mean([*exceeded.values()]) < 0.09


@pytest.mark.parametrize("similarity", MEASURES)
def test_known_overlap_is_recovered_by_rank(similarity):
    overlap = {"safety": 0.9, "toxicity": 0.6, "bias": 0.3, "privacy": 0.0}
    rng = np.random.default_rng(6)
    axes = np.linalg.qr(rng.normal(size=(256, 6)))[0].T
    acts = {}
    for i, d in enumerate((*DOMAINS, "benign")):
        share = overlap.get(d, 1.0)
        # A probe that never errs ranks nothing.
        mean = (3 if similarity == "probe_transfer" else 8) * (
            share * axes[0] + np.sqrt(1 - share**2) * axes[i]
        )
        mean = mean * (d != "benign")
        acts[d] = (mean + rng.normal(size=(64, 2, 256))).astype(np.float32)
    found = entanglement(
        acts,
        "cybersecurity",
        DOMAINS,
        measures=(similarity,),
        permutations=100,
        splits=5,
        bootstraps=50,
    ).measures[similarity]
    for layer in range(2):
        measured = [found.observed[d][layer] for d in overlap]
        assert spearmanr(measured, list(overlap.values())).statistic == pytest.approx(1.0)
    assert (found.observed["safety"] > found.null95["safety"]).all()
    for d in overlap:
        assert (found.ci95[d][:, 0] < found.observed[d]).all()
        assert (found.observed[d] < found.ci95[d][:, 1]).all()
    assert (found.ci95["safety"][:, 0] > found.ci95["privacy"][:, 1]).all()


def test_two_samples_of_one_domain_reach_the_ceiling():
    """The raw ceiling is the expected cosine of equal concepts at these prompt counts."""
    rng = np.random.default_rng(7)
    width, signal, n = 1024, 4.0, 40
    mean = {"a": signal * np.linalg.qr(rng.normal(size=(width, 1)))[0].T}
    mean["b"] = mean["a"]
    acts = {
        d: (mean.get(d, 0) + rng.normal(size=(n, 4, width))).astype(np.float32)
        for d in ("a", "b", "benign")
    }
    found = entanglement(acts, "a", ("a", "b"), permutations=10, splits=30)
    noise = width / n
    expected = (signal**2 + noise) / (signal**2 + 2 * noise)
    np.testing.assert_allclose(found.cosine.ceiling["b"], expected, atol=0.04)
    np.testing.assert_allclose(found.cosine.observed["b"], found.cosine.ceiling["b"], atol=0.06)
    np.testing.assert_allclose(found.cosine.disattenuated["b"], 1, atol=0.08)


def test_centred_ceiling_is_the_reliability_of_the_centred_vector():
    width, signal, n = 1024, 6.0, 40
    acts = unrelated(8, n=n, layers=4, width=width, signal=signal)
    found = entanglement(acts, "safety", DOMAINS, permutations=10, splits=30)
    # Centring leaves (1 - 1/D) of both the signals' and the means' noise variance.
    expected = signal**2 / (signal**2 + width / n)
    for ceiling in found.cosine_centred.ceiling.values():
        np.testing.assert_allclose(ceiling, expected, atol=0.06)


def test_ceiling_rises_with_prompts_and_stays_below_one():
    few, many = (
        entanglement(
            unrelated(9, n=n, layers=2, signal=6.0), "safety", DOMAINS, permutations=10, splits=10
        )
        for n in (8, 64)
    )
    for name in ("cosine", "cosine_centred"):
        for d in few.cosine.observed:
            low, high = getattr(few, name).ceiling[d], getattr(many, name).ceiling[d]
            assert (low < 0.9).all()
            assert (low < high).all()
            assert (high < 1).all()


def test_interval_holds_the_observed_value_and_covers_its_expectation():
    """95 % intervals for the similarity at this number of prompts, over redrawn prompts."""
    rng = np.random.default_rng(10)
    width, n = 32, 30
    mean = {d: 0.4 * rng.normal(size=(1, 12, width)) for d in (*DOMAINS, "benign")}
    studies = []
    for _ in range(12):
        acts = {
            d: (m + rng.normal(size=(n, 12, width))).astype(np.float32) for d, m in mean.items()
        }
        studies.append(entanglement(acts, "safety", DOMAINS, permutations=2, splits=1))
    for name in ("cosine", "cosine_centred"):
        for d in studies[0].cosine.observed:
            observed = np.array([getattr(s, name).observed[d] for s in studies])
            low, high = np.moveaxis([getattr(s, name).ci95[d] for s in studies], -1, 0)
            assert ((low < observed) & (observed < high)).all()
    covered = [
        (getattr(s, name).ci95[d][:, 0] < expected) & (expected < getattr(s, name).ci95[d][:, 1])
        for name in ("cosine", "cosine_centred")
        for d in studies[0].cosine.observed
        for expected in [np.mean([getattr(s, name).observed[d] for s in studies], axis=0)]
        for s in studies
    ]
    assert 0.90 < np.mean(covered) < 0.995


def test_layers_where_all_prompts_agree_are_undefined_not_noise():
    acts = unrelated(signal=6.0)
    token = np.random.default_rng(11).normal(size=256).astype(np.float32)
    for x in acts.values():
        x[:, 0] = token
    found = entanglement(acts, "safety", DOMAINS, permutations=10, splits=2)
    for name in ("cosine", "cosine_centred"):
        calibrated = getattr(found, name)
        for figure in (
            *("observed", "null95", "null_mean", "ceiling", "disattenuated", "ci95"),
            "null_interval",
        ):
            values = getattr(calibrated, figure)["bias"]
            assert np.isnan(values[0]).all(), figure
            assert np.isfinite(values[1:]).all(), figure
    value = found.to_json()
    assert value["cosine"]["bias"][0] is None
    assert value["ci95"]["bias"][0] == [None, None]
    json.dumps(value, allow_nan=False)


def test_invariant_to_prompt_order_scale_and_common_offset():
    acts = unrelated(signal=3.0)
    rng = np.random.default_rng(12)
    base = entanglement(acts, "safety", DOMAINS, permutations=300, splits=30)
    shuffled = {d: x[rng.permutation(len(x))] for d, x in acts.items()}
    moved = {d: 2 * x + 5 for d, x in acts.items()}
    for changed, redrawn in ((shuffled, 0.03), (moved, 1e-4)):
        found = entanglement(changed, "safety", DOMAINS, permutations=300, splits=30)
        for name in ("cosine", "cosine_centred"):
            for figure, tolerance in {
                "observed": 1e-5,
                "null95": redrawn,
                "null_mean": redrawn,
                "ceiling": redrawn,
            }.items():
                np.testing.assert_allclose(
                    getattr(getattr(found, name), figure)["bias"],
                    getattr(getattr(base, name), figure)["bias"],
                    atol=tolerance,
                )


def test_duplicated_layers_get_equal_figures_and_seeds_reproduce():
    acts = {d: np.repeat(x, 2, axis=1) for d, x in unrelated(layers=2, signal=3.0).items()}
    found = entanglement(acts, "safety", DOMAINS, permutations=20, splits=5).to_json()
    for figure in ("cosine", "null95", "null95_centred", "ceiling", "ceiling_centred"):
        for values in found[figure].values():
            assert values[0] == values[1] != values[2] == values[3]
    assert entanglement(acts, "safety", DOMAINS, permutations=20, splits=5).to_json() == found
    other = entanglement(acts, "safety", DOMAINS, permutations=20, splits=5, seed=1).to_json()
    assert other["null95"] != found["null95"]
    assert other["cosine"] == found["cosine"]


def test_json_round_trip_and_lexical_baseline():
    acts = unrelated(signal=3.0)
    lexical = {d: x[:, :1] for d, x in unrelated(1, signal=3.0).items()}
    found = entanglement(acts, "safety", DOMAINS, permutations=10, splits=2, lexical=lexical)
    words = entanglement(lexical, "safety", DOMAINS, permutations=10, splits=2)
    for name in ("cosine", "cosine_centred"):
        expected = words.measures[name].observed["bias"][0]
        assert found.lexical_baseline[name]["bias"] == pytest.approx(expected, abs=1e-5)
    value = json.loads(json.dumps(found.to_json(), allow_nan=False))
    back = Entanglement.from_json(value)
    assert back.to_json() == value
    assert back.num_layers == 2
    assert value["layers"] == [0, 1, 2]
    assert set(value["cosine"]) == set(DOMAINS) - {"safety"}
    np.testing.assert_allclose(back.cosine.ci95["bias"], found.cosine.ci95["bias"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("benign"), "no activations for 'benign'"),
        (lambda a: a.pop("bias"), "no activations for 'bias'"),
        (lambda a: a.update(bias=a["bias"][:3]), "'bias' has 3 prompts"),
        (lambda a: a["privacy"].__setitem__((0, 1, 2), np.inf), "'privacy' hold NaN"),
    ],
)
def test_bad_activations_are_one_clear_line(change, message):
    acts = unrelated(layers=2, width=4)
    change(acts)
    with pytest.raises(UserError, match=message) as error:
        entanglement(acts, "safety", DOMAINS)
    assert "\n" not in str(error.value)


def test_target_has_to_be_one_of_the_domains():
    with pytest.raises(UserError, match="target 'chemistry'"):
        entanglement(unrelated(layers=1, width=4), "chemistry", DOMAINS)


def test_contrast_prompts_go_to_the_domains_they_are_like():
    rng = np.random.default_rng(0)
    centres = 9 * rng.normal(size=(3, 8))
    words = {d: c + rng.normal(size=(5, 8)) for d, c in zip("abc", centres, strict=True)}
    belongs = rng.permuted(np.repeat([0, 1, 2], [3, 3, 2]))
    words["benign"] = centres[belongs] + rng.normal(size=(8, 8))
    order, parts = matched_contrast(words, "abc")
    assert parts == (3, 3, 2)
    assert belongs[order].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


def test_probe_transfer_restated_with_sklearn():
    """Fold by fold, over the same random halves."""
    rng = np.random.default_rng(1)
    sizes = (9, 12, 10)
    x = rng.normal(size=(sum(sizes), 6)).astype(np.float32)
    x[:21] += 0.7 * rng.normal(size=6).astype(np.float32)
    found = probe_transfer([x], sizes, permutations=2, splits=1, bootstraps=2, seed=4)
    again = np.random.default_rng(4)
    again.permuted(np.tile(np.arange(31), (2, 1)), axis=1)
    starts = np.cumsum((0, *sizes))
    groups = [
        x[again.permuted(np.tile(np.arange(a, a + n), (1, 1)), axis=1)[0]]
        for a, n in zip(starts, sizes, strict=False)
    ]
    halves = [(g[: len(g) // 2], g[len(g) // 2 :]) for g in groups]
    scores = np.zeros((2, 2))
    for fit in (0, 1):
        for a in (0, 1):
            probe = halves[a][fit].mean(0) - halves[2][fit].mean(0)
            for b in (0, 1):
                held, none = halves[b][1 - fit], halves[2][1 - fit]
                truth = np.repeat([1, 0], [len(held), len(none)])
                scores[a, b] += roc_auc_score(truth, np.concatenate([held, none]) @ probe) / 2
    expected = (scores[0, 1] + scores[1, 0]) / 2
    assert found.observed[0, 0, 1] == pytest.approx(expected, abs=1e-6)
    ceiling = np.sqrt(scores[0, 0] * scores[1, 1])
    assert found.ceiling[0, 0, 1] == pytest.approx(ceiling, abs=1e-6)


def test_overlap_is_that_of_scipys_principal_angles():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 12, 30))
    bases = [np.linalg.svd(x)[2][:3].T for x in (a, b)]
    expected = np.square(np.cos(subspace_angles(*bases))).mean()
    x = np.concatenate([a, b, np.zeros((4, 30))]).astype(np.float32)
    found = subspaces([x], (12, 12, 4), k=3, splits=5, bootstraps=5, seed=0)
    assert found.observed[0, 0, 1] == pytest.approx(expected, abs=1e-5)
    assert found.null_mean[0, 0, 1] == pytest.approx(3 / 30, abs=0.02)
    low, high = found.null_interval[0, 0, 1]
    assert 0 <= low < found.null_mean[0, 0, 1] < high
    np.testing.assert_allclose(found.observed[0, 0, 0], 1, atol=1e-6)


def test_subspaces_of_equal_and_of_unrelated_domains():
    rng = np.random.default_rng(3)
    bases = 6 * rng.normal(size=(2, 4, 200)) / np.sqrt(200)

    def rows(basis):
        return rng.normal(size=(40, 4)) * 2 @ basis + rng.normal(size=(40, 200)) / np.sqrt(200)

    x = np.concatenate([rows(bases[0]), rows(bases[0]), rows(bases[1]), np.zeros((5, 200))])
    found = subspaces([x.astype(np.float32)], (40, 40, 40, 5), splits=10, bootstraps=40, seed=0)
    assert found.observed[0, 0, 1] > 0.95 * found.ceiling[0, 0, 1]
    assert found.observed[0, 0, 2] < 0.1
    low, high = found.ci95[0, 0, 1]
    assert low < found.observed[0, 0, 1] < high
