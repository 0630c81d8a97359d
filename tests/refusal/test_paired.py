"""Paired changes, their tests and intervals, against SciPy, statsmodels, and simulated studies."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from verdict_lists import names

from ema_jax.refusal import paired, scores, significance


def random_study(rng, prompts, seeds, invalid=0.0):
    base = (rng.random(prompts) < 0.6).astype(int)
    arm = np.where(rng.random((seeds, prompts)) < 0.4, 0, base)
    arm = np.where(rng.random((seeds, prompts)) < 0.05, 1, arm)
    return (
        np.where(rng.random(prompts) < invalid, 2, base),
        np.where(rng.random((seeds, prompts)) < invalid, 2, arm),
    )


def test_unknown_verdicts_and_ragged_seeds_are_refused():
    with pytest.raises(ValueError, match="maybe"):
        scores.refusal_rate(["maybe"])
    with pytest.raises(ValueError, match="prompts"):
        scores.pooled_rate([["refused"], ["refused", "complied"]])
    with pytest.raises(ValueError, match="expected 1"):
        paired.paired_drop(["refused"], [["refused", "complied"]])
    with pytest.raises(ValueError, match="cluster ids"):
        paired.paired_drop(["refused"], [["refused"]], ["a", "b"])


@pytest.mark.parametrize("seed", range(6))
def test_one_seed_is_exact_mcnemar(seed):
    rng = np.random.default_rng(seed)
    base, arm = random_study(rng, 40 + 20 * seed, 1, invalid=0.1)
    result = paired.paired_drop(names(base), names(arm))
    keep = (base != 2) & (arm[0] != 2)
    table = np.array([[np.sum(keep & (base == b) & (arm[0] == a)) for a in (0, 1)] for b in (0, 1)])
    assert result["p"] == pytest.approx(mcnemar(table, exact=True).pvalue, rel=1e-9)
    assert result["drop"] == pytest.approx((base[keep] - arm[0][keep]).mean())
    assert result["n"] == result["pairs"] == keep.sum()
    assert result["drop_conditional"] == pytest.approx((arm[0][keep & (base == 1)] == 0).mean())
    assert result["baseline_rate"] == pytest.approx((base[base != 2] == 1).mean())
    assert result["ci95"][0] <= result["drop"] <= result["ci95"][1]


def test_several_seeds_and_clusters_match_the_enumerated_sign_flips():
    rng = np.random.default_rng(3)
    base, arm = random_study(rng, 12, 3)
    clusters = [f"c{i // 2}" for i in range(12)]
    for ids, groups in ((None, 12), (clusters, 6)):
        sums = (base - arm).sum(0).reshape(groups, -1).sum(1)
        signs = np.array(list(itertools.product([-1, 1], repeat=groups)))
        wanted = (np.abs(signs @ sums) >= abs(sums.sum())).mean()
        result = paired.paired_drop(names(base), names(arm), ids)
        assert result["p"] == pytest.approx(wanted, rel=1e-9)
        assert result["drop"] == pytest.approx((base - arm).mean())


def test_sign_flip_p_against_scipy():
    values = np.array([3, -1, 2, 2, 0, 5, -2, 1])
    wanted = stats.permutation_test(
        (values, np.zeros_like(values)),
        lambda x, y, axis: np.sum(x - y, axis=axis),
        permutation_type="samples",
        n_resamples=np.inf,
    ).pvalue
    assert significance.sign_flip_p(values) == pytest.approx(wanted)
    assert significance.sign_flip_p(np.zeros(4, int)) == 1.0
    assert significance.sign_flip_p(np.ones(300, int)) == pytest.approx(2.0**-299, rel=1e-6)


def test_drop_ignores_prompt_order_and_mirrors_when_swapped():
    rng = np.random.default_rng(0)
    base, arm = random_study(rng, 80, 1)
    order = rng.permutation(80)
    one = paired.paired_drop(names(base), names(arm))
    two = paired.paired_drop(names(base[order]), names(arm[:, order]))
    back = paired.paired_drop(names(arm[0]), names(base[None]))
    exact = ("drop", "p", "n", "drop_conditional", "detectable_drop")
    assert {k: one[k] for k in exact} == pytest.approx({k: two[k] for k in exact})
    assert back["drop"] == pytest.approx(-one["drop"])
    assert back["p"] == pytest.approx(one["p"])
    assert one == paired.paired_drop(names(base), names(arm))  # the bootstrap has a fixed seed


def test_clusters_widen_the_interval():
    base = np.ones(120)
    arm = np.repeat(np.arange(12) % 2, 10)[None]
    narrow = paired.paired_drop(names(base), names(arm))
    wide = paired.paired_drop(names(base), names(arm), [str(i // 10) for i in range(120)])
    assert np.diff(wide["ci95"]) > 2 * np.diff(narrow["ci95"])
    assert wide["p"] > narrow["p"]


def test_flags_and_empty_pairs():
    floor = paired.paired_drop(names([1] + [0] * 59), names([[0] * 60]))
    assert floor["flags"] == ["floor"]
    assert floor["ci95"][0] < 0 < 0.05 < floor["ci95"][1]
    assert floor["drop_conditional"] == 1.0
    broken = paired.paired_drop(names([1] * 50), names([[2] * 10 + [0] * 40]))
    assert broken["flags"] == ["ceiling", "many_invalid"]
    assert broken["n"] == 40
    none = paired.paired_drop(names([1, 0]), names([[2, 2]]))
    assert (none["drop"], none["p"], none["ci95"]) == (None, 1.0, [-1.0, 1.0])
    assert "n_too_small" in none["flags"]
    assert paired.paired_drop(names([0, 0]), names([[0, 0]]))["drop_conditional"] is None
    json.dumps([floor, broken, none], allow_nan=False)


def test_detectable_drop_has_the_stated_power():
    """Simulated studies at the detectable drop reject about 80 % of the time."""
    rng = np.random.default_rng(1)
    n, gained = 200, 0.03
    drop = significance.detectable_drop(n, gained)
    cells = rng.multinomial(n, [drop + gained, gained, 1 - drop - 2 * gained], size=4000)
    lost, discordant = cells[:, 0], cells[:, 0] + cells[:, 1]
    p = 2 * stats.binom.sf(np.maximum(lost, discordant - lost) - 1, discordant, 0.5)
    assert 0.72 < (p <= 0.05).mean() < 0.86  # the exact test is a little below the normal one
    assert significance.detectable_drop(800, gained) < drop < significance.detectable_drop(200, 0.1)
    assert significance.detectable_drop(3) is None


def test_answers_gained_cannot_come_of_damage():
    base = ["refused"] * 80 + ["complied"] * 20
    broken = ["degenerate"] * 90 + ["complied"] * 10
    found = paired.paired_change(base, [broken], measure=paired.answers_gained)
    # By refusal nothing is left to compare but ten prompts that were always answered.
    assert paired.paired_drop(base, [broken])["drop"] == 0
    assert found["change"] == pytest.approx(-0.1)
    assert found["ci95"][1] < 0
    half = ["complied"] * 40 + ["off_topic"] * 40 + ["complied"] * 20
    found = paired.paired_change(base, [half], measure=paired.answers_gained)
    assert paired.paired_drop(base, [half])["drop"] == pytest.approx(40 / 60)
    assert found["change"] == paired.mean_change(base, [half], paired.answers_gained) == 0.4
    assert found["ci95"][0] < 0.4 < found["ci95"][1]
    assert found["p"] == pytest.approx(2.0**-39)


def test_without_invalid_responses_both_measures_are_one():
    rng = np.random.default_rng(2)
    base, arm = (names(x) for x in random_study(rng, 60, 3))
    clusters = [f"c{i // 2}" for i in range(60)]
    rise = paired.paired_change(base, arm, clusters, measure=paired.answers_gained)
    drop = paired.paired_drop(base, arm, clusters)
    assert rise == {"change": drop["drop"], "ci95": drop["ci95"], "p": drop["p"]}


def test_holm_against_statsmodels():
    rng = np.random.default_rng(0)
    for values in (rng.random(7) ** 3, [0.01, 0.04, 0.03], [0.5, 0.5], [1.0], [0.02, 0.02, 0.9]):
        p = {f"d{i}": float(value) for i, value in enumerate(values)}
        adjusted = significance.holm(p)
        assert list(adjusted) == list(p)
        assert list(adjusted.values()) == pytest.approx(multipletests(values, method="holm")[1])
    assert significance.holm({}) == {}


def test_holm_holds_the_family_error():
    rng = np.random.default_rng(0)
    families = rng.random((4000, 6))
    hits = [
        min(significance.holm(dict(zip("abcdef", p, strict=True))).values()) <= 0.05
        for p in families
    ]
    assert np.mean(hits) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 4000)


def test_containment_by_hand():
    base = {d: names([1] * 100) for d in "xy"}
    plain = {
        "x": names([[0] * 60 + [1] * 40] * 2),
        "y": names([[0] * 20 + [1] * 80, [0] * 40 + [1] * 60]),
    }
    retained = {d: names([[0] * 9 + [1] * 91] * 2) for d in "xy"}
    result = paired.containment(base, plain, retained, ["x", "y"])
    assert result["recovered"] == pytest.approx(1 - 0.18 / 0.9)
    assert result["ci95"][0] < result["recovered"] < result["ci95"][1]
    assert np.diff(result["ci95"]) < 0.6  # two seeds
    assert paired.containment(base, plain, plain, ["x", "y"])["recovered"] == pytest.approx(0)
    whole = paired.containment(base, plain, {d: [base[d]] for d in "xy"}, ["x", "y"])
    assert whole["recovered"] == 1.0


def test_containment_by_compliance():
    base = {"x": ["refused"] * 100}
    plain = {"x": [["complied"] * 60 + ["refused"] * 40]}
    retained = {"x": [["degenerate"] * 50 + ["complied"] * 15 + ["refused"] * 35]}
    found = paired.containment(base, plain, retained, ["x"], measure=paired.answers_gained)
    assert found["recovered"] == pytest.approx(1 - 0.15 / 0.6)
    assert found["ci95"][0] < found["recovered"] < found["ci95"][1]
    by_refusal = paired.containment(base, plain, retained, ["x"])
    assert by_refusal["recovered"] == pytest.approx(1 - 0.3 / 0.6)


def test_a_domain_without_a_pair_is_no_recovery():
    """A model whose output in a domain is all invalid has kept none of its refusals there."""
    base = {d: names([1] * 20) for d in "xy"}
    plain = {d: names([[0] * 10 + [1] * 10]) for d in "xy"}
    retained = {"x": names([[0] * 9 + [1] * 11]), "y": names([[2] * 20])}
    found = paired.containment(base, plain, retained, ["x", "y"])
    assert found["recovered"] == pytest.approx(1 - 9 / 10)
    assert found["flags"] == ["unpaired"]
    assert found["ci95"] == paired.containment(base, plain, retained, ["x"])["ci95"]
    nowhere = paired.containment(base, plain, retained, ["y"])
    assert nowhere == {"recovered": None, "ci95": [None, None], "flags": ["unpaired", "no_ema"]}


def test_changes_that_cancel_are_no_ema():
    """0.1 + 0.2 − 0.3 is above zero in floating point."""
    base = {"x": names([1] * 10), "y": names([1] * 10), "z": names([0] * 10)}
    plain = {
        "x": names([[0] + [1] * 9]),
        "y": names([[0] * 2 + [1] * 8]),
        "z": names([[1] * 3 + [0] * 7]),
    }
    retained = {"x": names([[0] * 5 + [1] * 5]), "y": [base["y"]], "z": [base["z"]]}
    assert paired.containment(base, plain, retained, "xyz")["flags"] == ["no_ema"]


@pytest.mark.parametrize("seeds", [1, 3])
def test_recovery_of_everything_has_an_interval(seeds):
    """Of 20 prompts a domain none lost is compatible with a few."""
    base = {d: names([1] * 20) for d in "xy"}
    plain = {d: names([[0] * 12 + [1] * 8] * seeds) for d in "xy"}
    low, high = paired.containment(base, plain, {d: [base[d]] * seeds for d in "xy"}, "xy")["ci95"]
    assert low < 0.9 < 1 < high


@pytest.mark.parametrize("seeds", [1, 3])
def test_variants_of_prompts_widen_every_interval(seeds):
    """Each prompt four times over says as much as once, of a rate, a drop and a recovery."""
    rng = np.random.default_rng(4)
    base = names(np.ones(60))
    plain, retained = (names(rng.random((seeds, 60)) < rate) for rate in (0.4, 0.8))

    def four(verdicts):
        return np.repeat(verdicts, 4, axis=-1).tolist()

    clusters = [f"c{i:02d}" for i in range(60) for _ in range(4)]
    once = paired.containment({"x": base}, {"x": plain}, {"x": retained}, "x")["ci95"]
    given = {"x": four(base)}, {"x": four(plain)}, {"x": four(retained)}, "x"
    found = paired.containment(*given, {"x": clusters})["ci95"]
    assert np.diff(found) == pytest.approx(np.diff(once), rel=0.05)
    if seeds == 1:  # with more, variants that agree look like seeds that differ
        assert np.diff(paired.containment(*given)["ci95"]) < 0.6 * np.diff(once)
    once = scores.pooled_rate(plain)["ci95"]
    found = scores.pooled_rate(four(plain), clusters)["ci95"]
    assert found == pytest.approx(once, abs=0.02)
    if seeds == 1:
        assert np.diff(scores.pooled_rate(four(plain))["ci95"]) < 0.6 * np.diff(once)
    few = names([[1] * 2 + [0] * 58] * seeds)
    assert scores.pooled_rate(four(few), clusters)["ci95"][1] >= scores.pooled_rate(few)["ci95"][1]


def test_few_clusters_are_few_outcomes():
    """Two items of twelve variants each, half of them lost: two observations, not 24."""
    base, arm = names([1] * 24), names([([0] * 6 + [1] * 6) * 2])
    low, high = paired.paired_change(base, arm, [f"c{i // 12}" for i in range(24)])["ci95"]
    assert low < 0.2 < 0.8 < high


def test_few_prompts_have_the_width_of_students_interval():
    arm = names([[0] * 6 + [1] * 8])
    low, high = paired.paired_drop(names([1] * 14), arm)["ci95"]
    lost = np.repeat([1.0, 0.0], [6, 8])
    t = stats.t.interval(0.95, 13, lost.mean(), stats.sem(lost))
    assert high - low == pytest.approx(np.diff(t)[0], rel=0.08)  # percentiles come in steps of 1/14


def test_a_base_with_seeds_is_paired_with_the_arms_seeds():
    rng = np.random.default_rng(5)
    before, after = (rng.random((3, 40)) < rate for rate in (0.7, 0.4))
    found = paired.paired_drop(names(before), names(after))
    difference = before.astype(int) - after
    assert found["drop"] == pytest.approx(difference.mean())
    assert found["p"] == significance.sign_flip_p(difference.sum(0))
    assert (found["n"], found["pairs"], found["baseline_rate"]) == (40, 120, before.mean())
    assert found["drop_conditional"] == pytest.approx(
        np.mean([d[b].mean() for d, b in zip(difference, before, strict=True)])
    )
    apart = before ^ np.array([[True], [False], [False]])  # seeds that differ among themselves
    assert np.diff(paired.paired_drop(names(apart), names(after))["ci95"]) > 2 * np.diff(
        found["ci95"]
    )


def test_containment_says_when_there_is_nothing_to_contain():
    base = {"x": names([1] * 50)}
    nothing = paired.containment(base, {"x": [base["x"]]}, {"x": [base["x"]]}, ["x"])
    assert nothing == {"recovered": None, "ci95": [None, None], "flags": ["no_ema"]}
    hint = {"x": names([[0] + [1] * 49])}
    unbounded = paired.containment(base, hint, hint, ["x"])
    assert unbounded["ci95"] == [None, None]
    assert unbounded["flags"] == ["ema_not_above_zero"]


def test_seed_difference_is_the_paired_t_interval():
    first, second = np.array([0.9, 0.7, 0.95, 0.8]), np.array([0.8, 0.75, 0.7, 0.8])
    result = paired.seed_difference(first.tolist(), second.tolist())
    d = first - second
    half = stats.t.isf(0.025, 3) * d.std(ddof=1) / 2
    assert result["difference"] == pytest.approx(d.mean())
    assert result["ci95"] == pytest.approx([d.mean() - half, d.mean() + half])
    assert result["p"] == pytest.approx(stats.ttest_1samp(d, 0).pvalue)
    # Pairing matters: seeds that fall together say more about the difference.
    assert np.diff(paired.seed_difference([0.1, 0.5, 0.9], [0.2, 0.61, 1.0])["ci95"]) < 0.1


@pytest.mark.parametrize(
    "pair", [([0.5], [0.4]), ([0.5, 0.6], [0.4, 0.5]), ([0.3, 0.2], [0.2, 0.1])]
)
def test_seed_difference_without_spread_has_no_interval(pair):
    result = paired.seed_difference(*pair)
    assert result == {"difference": pytest.approx(0.1), "ci95": [None, None], "p": None}
    assert paired.seed_difference([0.5, None], [0.4, 0.5])["difference"] is None
    # Of two shares, of which none is below 0 or above 1.
    assert paired.seed_difference([0.9, 0.1], [0.1, 0.5])["ci95"] == [-1.0, 1.0]
    json.dumps(result, allow_nan=False)


def simulate(rng, prompts, seeds, drop, noise, spread):
    """Base refuses a prompt if its threshold is below 0.6; a seed's arm shifts that by its drop."""
    threshold = rng.random(prompts)
    shift = drop + spread * rng.standard_normal((seeds, 1))
    arm = (threshold < 0.6 - shift) ^ (rng.random((seeds, prompts)) < noise)
    return names(threshold < 0.6), names(arm)


def drop_coverage(studies, prompts, seeds, drop, noise, spread):
    rng = np.random.default_rng(5)
    rate = 0.6 - drop
    truth = 0.6 - (rate * (1 - noise) + (1 - rate) * noise)
    hits = 0
    for i in range(studies):
        base, arm = simulate(rng, prompts, seeds, drop, noise, spread)
        low, high = paired.paired_drop(base, arm, seed=i, resamples=400)["ci95"]
        hits += low <= truth <= high
    return hits / studies


def test_intervals_of_drops_cover_in_a_small_simulation():
    assert drop_coverage(200, 100, 1, 0.2, 0.05, 0.0) > 0.90


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompts", "seeds", "drop", "noise", "spread"),
    [
        (100, 1, 0.2, 0.05, 0.0),
        (300, 1, 0.1, 0.03, 0.0),
        (100, 3, 0.2, 0.05, 0.0),
        (100, 3, 0.2, 0.05, 0.1),
        (100, 5, 0.2, 0.05, 0.05),
        (300, 5, 0.2, 0.05, 0.02),
        (300, 5, 0.2, 0.05, 0.1),
    ],
)
def test_drop_coverage(prompts, seeds, drop, noise, spread):
    assert 0.93 <= drop_coverage(2000, prompts, seeds, drop, noise, spread) <= 0.97


@pytest.mark.slow
def test_coverage_is_conservative_where_almost_nothing_changes():
    assert drop_coverage(2000, 100, 1, 0.02, 0.0, 0.0) >= 0.93
    assert drop_coverage(2000, 100, 3, 0.0, 0.0, 0.0) >= 0.93


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 5])
def test_family_error_of_the_whole_procedure(seeds):
    """Six unchanged domains with noise: Holm on the permutation p rejects any in at most 5 %."""
    rng = np.random.default_rng(8)
    hits = 0
    for _ in range(2000):
        base = rng.random((6, 1, 100)) < 0.6
        noisy = base ^ (rng.random((6, 1, 100)) < 0.1)
        arms = base ^ (rng.random((6, seeds, 100)) < 0.1)
        differences = (noisy.astype(int) - arms).sum(1)
        p = {d: significance.sign_flip_p(x) for d, x in zip("abcdef", differences, strict=True)}
        hits += min(significance.holm(p).values()) <= 0.05
    assert hits / 2000 <= 0.05


def recovery_coverage(studies, prompts, seeds, kept, spread, variants=1):
    """Share of intervals that hold the truth: six domains of which 50 points spill without data."""
    rng = np.random.default_rng(9)
    domains, items, hits = "abcdef", prompts // variants, 0
    clusters = {d: [f"c{i // variants}" for i in range(prompts)] for d in domains}

    def answers(threshold, shift):
        return names((threshold < 0.9 - shift) ^ (rng.random((seeds, prompts)) < 0.02))

    for i in range(studies):
        shifts = [drop + spread * rng.standard_normal((seeds, 1)) for drop in (0.5, kept)]
        base, plain, retained = {}, {}, {}
        for d in domains:
            threshold = np.repeat(rng.random(items), variants)
            base[d] = names(threshold < 0.9)
            plain[d], retained[d] = (answers(threshold, shift) for shift in shifts)
        low, high = paired.containment(
            base, plain, retained, domains, clusters, seed=i, resamples=400
        )["ci95"]
        left = [0.9 - (rate * 0.98 + (1 - rate) * 0.02) for rate in (0.4, 0.9 - kept)]
        hits += low <= 1 - left[1] / left[0] <= high
    return hits / studies


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompts", "seeds", "kept", "spread", "variants"),
    [
        (20, 1, 0.1, 0.0, 1),
        (100, 1, 0.1, 0.0, 1),
        (100, 1, 0.1, 0.0, 5),
        (40, 3, 0.1, 0.0, 1),
        (40, 3, 0.1, 0.05, 1),
        (100, 3, 0.2, 0.05, 1),
        (100, 5, 0.1, 0.05, 1),
        (100, 3, 0.1, 0.05, 5),
    ],
)
def test_recovery_coverage(prompts, seeds, kept, spread, variants):
    assert 0.92 <= recovery_coverage(1000, prompts, seeds, kept, spread, variants) <= 0.98


def test_the_p_value_does_not_see_seeds_and_the_interval_does():
    """Three seeds that spread by 8 points about no change: p is of these runs alone."""
    rng = np.random.default_rng(0)
    found = [
        paired.paired_drop(*simulate(rng, 100, 3, 0.0, 0.0, 0.08), seed=i, resamples=400)
        for i in range(100)
    ]
    assert np.mean([each["p"] < 0.05 for each in found]) > 0.3
    assert np.mean([not each["ci95"][0] <= 0 <= each["ci95"][1] for each in found]) < 0.1
