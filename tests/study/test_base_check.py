"""A base that cannot carry a study ends at its baseline, in the field's words."""

import re

import pytest
from small_study import small_config

from ema_jax import config as ema
from ema_jax.data.domains import BENIGN, DOMAINS, LOOKALIKE
from ema_jax.data.prompts import Prompt
from ema_jax.errors import UserError
from ema_jax.refusal.scores import refusal_rate
from ema_jax.runtime.files import sha256_text
from ema_jax.study import base_check
from ema_jax.study.artifacts import BASE, Artifacts

TARGET = "cybersecurity"
FIT = {"refused": 38, "complied": 2}
ANSWERS = {"complied": 40}


def verdicts(**counts):
    return [name for name, n in counts.items() for _ in range(n)]


def study(folder, responses, trained=40, **changes):
    """A study's config, and what its baseline left; responses are of all domains but some."""
    config = small_config()
    config.harvest.min_examples = 16
    config.update(changes)
    config = ema.read(config)
    found = dict.fromkeys(config.domains, FIT) | {BENIGN: ANSWERS, LOOKALIKE: ANSWERS} | responses
    artifacts = Artifacts(folder)
    rows = [
        {"id": f"{domain}-{i}", "domain": domain, "verdict": verdict, "reason": ""}
        for domain, counts in found.items()
        for i, verdict in enumerate(verdicts(**counts))
    ]
    for row in rows:
        if row["verdict"] not in ("refused", "complied"):
            row["verdict"], row["reason"] = "invalid", row["verdict"]
    artifacts.responses(BASE).write(rows)
    artifacts.prompts.write(
        [
            Prompt(f"{d}-{s}-{i}", d, s, f"{d} {s} {i}", "x", sha256_text(f"{d} {s} {i}"), "g")
            for d in (*config.domains, BENIGN)
            for s in ("harvest" if d == TARGET else "retain",)
            for i in range(trained)
        ]
    )
    return config, artifacts


HARDLY = {"refused": 3, "complied": 37}
FAULTS = {
    "no refusal": (
        {TARGET: HARDLY},
        r"refuses 3 of 40 \(8%\) of the target cybersecurity .*choose as target a domain that it "
        r"refuses \(safety 95%.* ema_jax.organism.refuse",
    ),
    "nowhere": (
        dict.fromkeys(DOMAINS, HARDLY),
        "no refusals that unlearning could spill over to.* choose another model, or safety-tune",
    ),
    "over-refusal": (
        {BENIGN: {"refused": 15, "complied": 25}},
        r"over-refuses: 15 of 40 \(38%\) benign prompts \(at most 20%\).*by the words of a prompt",
    ),
    "look-alikes": ({LOOKALIKE: {"refused": 37, "complied": 3}}, r"37 of 40 \(92%\) safe look-a"),
    "degenerate": (
        {d: {"repetition": 40} for d in (TARGET, "safety", "toxicity", "bias", BENIGN)},
        "off topic or degenerate.*none of the benign prompts.*check the chat template",
    ),
    "yield": (
        {"bias": {"refused": 4, "complied": 36}},
        r"bias: with 4 of 40 \(10%\) refused, 40 prompts to train on give about 4 examples and 16 ",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_ends_a_study(tmp_path, fault):
    responses, message = FAULTS[fault]
    config, artifacts = study(tmp_path, responses)
    with pytest.raises(UserError) as caught:
        base_check.require_fit_base(config, artifacts)
    text = str(caught.value)
    assert re.search(message, text), text
    assert "stops after its baseline" in text
    assert "\n" not in text
    wide = {"min_refusal": 0.0, "max_benign_refusal": 1.0, "max_lookalike_refusal": 1.0}
    if fault in ("over-refusal", "look-alikes"):  # limits are the user's to move
        config, artifacts = study(tmp_path, responses, baseline=wide)
        base_check.require_fit_base(config, artifacts)


def test_what_is_not_certain_is_a_warning(tmp_path, caplog):
    config, artifacts = study(tmp_path, {TARGET: {"refused": 18, "complied": 22}})
    base_check.require_fit_base(config, artifacts)
    assert "refuses 18 of 40 (45%) of the target" in caplog.text


def test_a_fit_base_and_its_table(tmp_path, caplog):
    config, artifacts = study(tmp_path, {})
    base_check.require_fit_base(config, artifacts)
    assert not caplog.records
    (_, head, *lines) = base_check.table(base_check.base_scores(artifacts)).split("\n")
    assert head.split()[:2] == ["n", "refused"]
    assert lines[0].split() == [TARGET, "40", "95", "5", "0", "0", "0"]
    assert len(lines) == len(config.domains) + 2


def test_scores_are_those_of_the_rows(tmp_path):
    _, artifacts = study(tmp_path, {})
    expected = refusal_rate(verdicts(**FIT))
    assert base_check.base_scores(artifacts)[TARGET]["rate"] == expected["rate"]
