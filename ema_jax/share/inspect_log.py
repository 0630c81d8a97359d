"""A study's responses as a log of Inspect (`inspect_ai`), for its viewer and its readers."""

from pathlib import Path
from typing import Any

from ema_jax.errors import UserError
from ema_jax.runtime.files import atomic_path
from ema_jax.study.finished import read_asked, read_judged, read_results

_FORMATS: dict[str, Any] = {".eval": "eval", ".json": "json"}
_SCORES = {"refused": 1.0, "complied": 0.0, "invalid": float("nan")}


def write(workdir: Path, run: str, output: Path) -> int:
    """Writes one run's evaluation as an `.eval` log; returns the number of samples.

    A sample is an evaluation prompt with the response; its score is the judge's, with the verdict
    as the answer. Sample metadata holds domain, category and reason.

    Args:
        workdir: the study's folder.
        run: `base` or `ARM.seed_K`, as the files in `responses/` are named.
        output: the log to write; its name ends in `.eval` or `.json`.

    Raises:
        UserError: inspect_ai is absent, no such run, another ending, or a study without texts.
    """
    if output.suffix not in _FORMATS:
        raise UserError(f"--output: {output.name} ends in none of {', '.join(_FORMATS)}")
    try:
        from inspect_ai import log as inspect_logs
    except ImportError:
        raise UserError("--to=inspect needs inspect_ai: pip install inspect_ai") from None
    path = workdir / "responses" / f"{run}.jsonl"
    rows = read_judged(workdir, run)
    if not rows or "response" not in rows[0]:
        raise UserError(
            f"{path}: holds no texts; a log for Inspect needs a study run with keep_text = True"
        )
    rows = read_judged(workdir, run, text=True)
    asked = read_asked(workdir)
    if lacking := [row["id"] for row in rows if row["id"] not in asked]:
        raise UserError(f"{path}: {lacking[0]!r} is no prompt of prompts/eval.jsonl beside it")
    results = read_results(workdir)
    model = f"ema_jax/{results['model']['id']}"
    log = inspect_logs.EvalLog(
        status="success",
        eval=inspect_logs.EvalSpec(
            created=results["provenance"].get("created", "1970-01-01T00:00:00+00:00"),
            task=f"refusal: {results['target']} unlearned ({run})",
            dataset=inspect_logs.EvalDataset(name="eval", samples=len(rows)),
            model=model,
            config=inspect_logs.EvalConfig(),
            packages={"ema_jax": results["provenance"]["versions"].get("ema_jax", "")},
            metadata={"target": results["target"], "run": run},
        ),
        results=_summary(inspect_logs, rows),
        samples=[_sample(inspect_logs, row, asked[row["id"]]["prompt"], model) for row in rows],
    )
    with atomic_path(output) as temporary:
        inspect_logs.write_eval_log(log, str(temporary), format=_FORMATS[output.suffix])
    return len(rows)


def _summary(logs: Any, rows: list[dict[str, Any]]) -> Any:
    valid = [row for row in rows if row["verdict"] != "invalid"]
    refused = sum(row["verdict"] == "refused" for row in valid)
    metrics = {
        "refusal_rate": refused / len(valid) if valid else float("nan"),
        "invalid_share": 1 - len(valid) / len(rows),
    }
    score = logs.EvalScore(
        name="refusal",
        scorer=rows[0]["judge"],
        metrics={name: logs.EvalMetric(name=name, value=x) for name, x in metrics.items()},
    )
    return logs.EvalResults(total_samples=len(rows), completed_samples=len(rows), scores=[score])


def _sample(logs: Any, row: dict[str, Any], prompt: str, model: str) -> Any:
    from inspect_ai.model import ChatMessageAssistant, ChatMessageUser, ModelOutput
    from inspect_ai.scorer import Score

    reason: Any = "stop" if row["finished"] else "max_tokens"
    return logs.EvalSample(
        id=row["id"],
        epoch=1,
        input=prompt,
        target="",
        messages=[ChatMessageUser(content=prompt), ChatMessageAssistant(content=row["response"])],
        output=ModelOutput.from_content(model, row["response"], stop_reason=reason),
        scores={
            "refusal": Score(
                value=_SCORES[row["verdict"]],
                answer=row["verdict"],
                explanation=row["reason"],
                metadata={"judge": row["judge"], "score": row["score"]},
            )
        },
        metadata={key: row[key] for key in ("domain", "category", "harm") if row.get(key)},
    )
