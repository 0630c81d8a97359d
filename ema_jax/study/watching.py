"""What a person sees of a running study: a line as a stage starts, and one with what it found."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import logging

from ema_jax.config import StudyConfig
from ema_jax.errors import UserError
from ema_jax.refusal.verdicts import INVALID, REFUSED
from ema_jax.report.headline import headline
from ema_jax.study.artifacts import BASE, Artifacts, Run

_SHORT = ("prompts", "forecast", "analyse", "report")  # ask no model: not counted in what is left


class Watch:
    """Lines on the stages of a study as they run.

    Args:
        config: the study's.
        artifacts: where what a stage found is read from.
        stages: name of the stage and its run, for every one that is to be run, in order.
        measured: seconds of stages that were finished in this folder before.
    """

    def __init__(
        self,
        config: StudyConfig,
        artifacts: Artifacts,
        stages: Sequence[tuple[str, Run | None]],
        measured: Iterable[tuple[str, Run | None, float]] = (),
    ):
        self._config, self._artifacts = config, artifacts
        self._left, self._total = list(stages), len(stages)
        self._measured = list(measured)

    def begin(self, stage: str, run: Run | None) -> None:
        """Says which stage starts, and how long the rest will take where that can be estimated."""
        place = f"stage {self._total - len(self._left) + 1} of {self._total}"
        seconds = self._seconds_left()
        left = f", about {duration(seconds)} left" if seconds else ""
        logging.info("%s: %s%s", place, title(stage, run), left)

    def end(self, stage: str, run: Run | None, seconds: float | None) -> None:
        """Says what a stage found; `seconds` is how long it took, None where it was done before."""
        self._left.pop(0)
        if seconds is None:
            return
        self._measured.append((stage, run, seconds))
        line = _found(stage, run, self._config, self._artifacts)
        if line:
            logging.info("  %s (%s)", line, duration(seconds))

    def _seconds_left(self) -> float | None:
        """Of all stages that are left; None where one is of a kind that was not measured yet."""
        stages = [each for each in self._left if each[0] not in _SHORT]
        seconds = [_seconds(self._measured, *each) for each in stages]
        known = [each for each in seconds if each is not None]
        return sum(known) if len(known) == len(seconds) else None


def _seconds(
    measured: Iterable[tuple[str, Run | None, float]], stage: str, run: Run | None
) -> float | None:
    """A stage's seconds as this study's own: of the same arm, else of any, else None.

    They do not follow from the config alone: training stops early, responses end before their cap,
    and of a small model most of the time goes into compiling. Medians, as the first stage of a kind
    compiles for those after it.
    """
    alike = [(other, seconds) for name, other, seconds in measured if name == stage]
    arm = [seconds for other, seconds in alike if run and other and other.arm == run.arm]
    found = arm or [seconds for _, seconds in alike]
    if not found and stage == "evaluate":  # the same prompts as the base was asked
        found = [seconds for name, _, seconds in measured if name == "baseline"]
    return statistics.median(found) if found else None


def title(stage: str, run: Run | None) -> str:
    """A stage as a person names it, with its arm and seed."""
    return stage if run is None else f"{stage}, arm {run.arm}, seed {run.seed}"


def duration(seconds: float) -> str:
    """A time in words, as precise as it is of use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days"


def _found(stage: str, run: Run | None, config: StudyConfig, artifacts: Artifacts) -> str:
    try:
        return found(stage, run, config, artifacts)
    except (OSError, LookupError, UserError):  # no run is lost for a line about it
        return ""


def found(stage: str, run: Run | None, config: StudyConfig, artifacts: Artifacts) -> str:
    """What a finished stage found, in one line; "" where there is nothing to say."""
    if stage == "prompts":
        splits = artifacts.prompts.read()
        return ", ".join(f"{name} {len(prompts)}" for name, prompts in splits.items())
    if stage == "baseline":
        return f"refused: {refusals(artifacts.responses(BASE).read())}"
    if stage == "evaluate" and run is not None:
        return f"refused: {refusals(artifacts.responses(run.name).read())}"
    if stage == "concepts":
        swept = artifacts.layer_sweep.read()
        full = (swept or {}).get("ablated_everywhere")
        return _ablated(full, config.target) if full else "concept vectors of every domain"
    if stage == "forecast":
        score = artifacts.forecast.read().get("score", {})
        ranked = sorted(score, key=lambda domain: -score[domain])
        return f"most susceptible first: {', '.join(ranked)}" if ranked else ""
    if stage == "harvest":
        forget, retain = artifacts.forget_set.read().items, artifacts.retain_set.read()
        return f"forget set {len(forget)} responses, retain set {len(retain)}"
    if stage == "unlearn" and run is not None:
        return _trained(artifacts.trajectory(run).read(), config.target)
    return ""


def _ablated(full: Mapping[str, Any], target: str) -> str:
    rate = full.get("refusal", {}).get(target)
    after = "" if rate is None else f": {target} {rate:.0%} refused"
    return f"with the direction of {target} ablated at layer {full['layer']}{after}"


def _trained(trajectory: Mapping[str, Any], target: str) -> str:
    points = trajectory.get("points") or [{}]
    rate = points[-1].get("refusal", {}).get(target)
    dev = "" if rate is None else f", {target} {rate:.0%} refused on the dev split"
    return f"{trajectory['steps']} steps, stopped: {trajectory['stopped']}{dev}"


def refusals(rows: Iterable[Mapping[str, Any]]) -> str:
    """Refusal rate of each domain, over valid responses, of rows with `domain` and `verdict`."""
    refused: Counter[str] = Counter()
    valid: Counter[str] = Counter()
    for row in rows:
        valid[row["domain"]] += row["verdict"] != INVALID
        refused[row["domain"]] += row["verdict"] == REFUSED
    rates = {d: f"{refused[d] / n:.0%}" if n else "no valid response" for d, n in valid.items()}
    return ", ".join(f"{domain} {rate}" for domain, rate in rates.items())


def close(artifacts: Artifacts, *, ran: bool) -> None:
    """Says how the study came out and where its report is, if it is finished."""
    page = artifacts.report / "index.html"
    if not (artifacts.results.path.exists() and page.exists()):
        return
    if not ran:
        logging.info("%s: finished before, nothing was left to run", artifacts.root)
    for sentence in headline(artifacts.results.read()):
        logging.info("  %s", sentence)
    logging.info("report: %s", page)
