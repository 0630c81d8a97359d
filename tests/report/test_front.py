"""The first screen: a title that is right, what limits the study, large numbers, verdicts."""

import copy

import pytest
from report_fixtures import damage, example_results

from ema_jax.report import front


def test_title_says_what_the_figures_show():
    results = example_results()
    assert front.title(results).startswith("Refusals in cybersecurity unlearned in example-org/")
    for arm in ("npo", "npo_retain"):
        results["arms"][arm]["refusal"]["cybersecurity"]["ci95"] = [0.5, 0.95]
    assert "unlearning tried on" in front.title(results)
    results["arms"] = {"base": results["arms"]["base"]}
    assert front.title(results) == "Refusal of example-org/example-7b-instruct before unlearning"


def test_large_numbers_are_those_of_the_results():
    target, spill, contained, forecast = front.numbers(example_results())
    assert target.value == "93.0\u202f% → 8.0\u202f%"
    assert target.interval.startswith("95\u202f% CI [")
    assert (spill.value, spill.interval) == ("41.0 points", "95\u202f% CI [35.5, 46.5]")
    assert "safety" in spill.name
    assert "4 of 6" in spill.note
    assert (contained.value, contained.interval) == ("80.1\u202f%", "95\u202f% CI [71.0, 88.0]")
    assert (forecast.value, forecast.interval) == ("ρ = 0.83", "p = 0.058, n = 6 domains")


def test_large_numbers_say_of_how_many_and_how_much_is_damage():
    results = example_results()
    before, after = (results["arms"][arm]["refusal"]["cybersecurity"] for arm in ("base", "npo"))
    change = results["ema"]["npo"]["safety"]
    target, spill, contained, _ = front.numbers(results)
    assert f"of {before['valid']} → {after['valid']} valid responses" in target.note
    answered = f"{100 * after['shares']['complied']:.1f}\u202f% of all {after['total']}"
    assert target.note.endswith(f"{answered} answer")
    assert spill.note.startswith(f"npo, n = {change['n']} prompts; compliance there +")
    assert "by compliance 77.7" in contained.note
    del results["validity"]
    assert front.numbers(results)[0].note.endswith("count as compliance")


def test_no_arm_with_retain_data_stands_for_another():
    results = example_results()
    for arm in ("dpo_retain", "sft_retain"):
        for part in ("arms", "ema", "on_target", "containment"):
            results[part][arm] = copy.deepcopy(results[part]["npo_retain"])
    damage(results, "dpo_retain")
    results["containment"]["sft_retain"]["recovered"] = 0.5
    contained = front.numbers(results)[2]
    assert contained.value == "80.1\u202f%"
    assert contained.note.endswith("dpo_retain: target damaged; sft_retain: 50.0\u202f%")


def test_a_damaged_target_is_called_so_beside_its_number():
    results = example_results()
    damage(results, "npo")
    damage(results, "npo_retain")
    target, _, contained, _ = front.numbers(results)
    assert "damaged" in target.note
    assert "no containment" in contained.note


def test_a_baseline_has_one_number_and_missing_parts_have_none():
    results = example_results()
    only = {key: results[key] for key in ("schema", "model", "target", "domains")}
    only["arms"] = {"base": results["arms"]["base"]}
    (number,) = front.numbers(only)
    assert number.note.startswith("base, of ")
    del results["ema"], results["containment"], results["forecast"]
    assert len(front.numbers(results)) == 1


def test_only_the_embedded_model_has_its_badge():
    results = example_results()
    assert "embedded toy model, synthetic prompts" in front.badges(results)
    for entry in results["arms"].values():
        entry.pop("oracle", None)
    assert front.badges(results) == []
    results["provenance"]["seeds"] = [0]
    assert front.badges(results) == ["one seed"]


@pytest.mark.parametrize(
    ("holds", "word", "kind"),
    [(True, "holds", "yes"), (False, "does not hold", "no"), (None, "cannot be judged", "open")],
)
def test_every_claim_has_a_verdict(holds, word, kind):
    found = front.verdicts({"R2": {"holds": holds, "evidence": ["x"]}})
    assert [v.claim for v in found] == ["R1", "R2", "R3", "R4", "R5"]
    assert (found[1].word, found[1].kind, found[1].evidence) == (word, kind, ("x",))
    assert found[0].word == "cannot be judged"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({"npo": False}, ""),
        ({"npo": True, "npo_retain": False}, "in npo_retain (of 2 arms)"),
        ({"npo": False, "npo_retain": False}, "in any of 2 arms"),
        ({f"cell{i} npo": i > 3 for i in range(9)}, "in 4 of 9 arms"),
    ],
)
def test_a_verdict_says_where_the_claim_fails(rows, said):
    claim = {"holds": False, "evidence": [], "rows": rows}
    assert front.verdicts({"R1": claim})[0].where == said
    assert front.verdicts({"R1": claim | {"holds": None}})[0].where == ""
