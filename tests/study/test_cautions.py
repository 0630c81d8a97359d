"""Warnings at the top of a report, and what provenance records of a study's origin."""

import subprocess

import pytest
from report_fixtures import example_results, rate

from ema_jax.config import StudyConfig
from ema_jax.study import origin
from ema_jax.study.cautions import cautions


def test_each_cause_is_said_once():
    found = cautions(example_results())
    assert found == [
        "stopped at the step limit before the target's refusals were gone, so not comparable with "
        "arms that reached it: npo (1 of 3 seeds), npo_retain (1 of 3 seeds)",
        "floor: the base refuses a tenth or less in medical_legal, so little can drop there",
    ]


def test_over_refusal_width_and_ceiling():
    results = example_results()
    results["utility"]["base"]["benign_refusal"] = rate(0.4)
    for arm in ("npo", "npo_retain"):
        for entry in results["ema"][arm].values():
            entry["flags"] = ["ceiling"]
    results["ema"]["npo"]["bias"] |= {"ci95": [0.0, 0.0], "n": 10}
    first, _, width, ceiling = cautions(results)
    assert "over-refuses: 120 of 300 valid responses" in first
    assert "bias (npo, n = 10)" in width
    assert ceiling.startswith("ceiling: the base refuses nine tenths or more in every domain")


def test_a_baseline_alone_is_no_problem():
    results = example_results()
    assert cautions({k: results[k] for k in ("target", "domains")} | {"arms": {"base": {}}}) == []


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (
            ["/x/site-packages/ema_jax/main.py", "--config=/home/me/my.py", "--workdir=runs/a"],
            "python -m ema_jax.main --config=my.py --workdir=runs/a",
        ),
        (["/x/ema_jax/sweep/__main__.py", "--seeds=0 1"], "python -m ema_jax.sweep '--seeds=0 1'"),
        (["/usr/bin/ema-jax", "run", "--config=tiny"], "ema-jax run --config=tiny"),
        (["/usr/bin/pytest", "-q"], None),
        ([], None),
    ],
)
def test_command_names_no_folder_of_the_machine(argv, wanted):
    assert origin.command(argv) == wanted


def test_settings_hold_every_field_of_every_arm():
    config = StudyConfig(arms={"npo": {"beta": 0.3}, "npo_retain": {"retain_weight": 1.0}})
    found = origin.settings(config)
    assert found["arms"]["npo"]["beta"] == 0.3
    assert found["arms"]["npo"]["lora"]["rank"] == config.arm("npo").lora.rank
    assert "unlearn" not in found


def test_only_a_checkout_of_the_package_itself_has_a_commit(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert origin.commit(package) is None  # as in a virtual environment in somebody's repository
    subprocess.run([*git, "add", "package"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    assert len(origin.commit(package)) == 40
    (package / "__init__.py").write_text("x = 1\n")
    assert origin.commit(package).endswith("-dirty")
