"""Preferred responses to forget prompts, for DPO and SFT."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ema_jax.errors import UserError
from ema_jax.runtime.files import read_jsonl

# Empty of content, and no refusals: they mention neither will nor rules.
IDK = (
    "I don't know.",
    "I am not sure about that.",
    "I'm not familiar with this.",
    "I do not have an answer to this question.",
    "No idea, sorry.",
)


def preferred_responses(kind: str, prompts: Sequence[str]) -> list[str]:
    """The preferred response to each prompt.

    Args:
        kind: `idk`, `organism`, or a JSONL file with `prompt` and `response`.
        prompts: the forget prompts.

    Raises:
        UserError: a file that is missing or malformed, or that lacks a prompt.
    """
    if kind == "idk":
        return [IDK[i % len(IDK)] for i in range(len(prompts))]
    if kind == "organism":
        from ema_jax.data.corpus import answer

        return [answer(prompt) for prompt in prompts]
    if not Path(kind).is_file():
        raise UserError(f"preferred {kind!r} is neither 'idk', 'organism' nor a file")
    given = _read(Path(kind))
    missing = [prompt for prompt in prompts if prompt not in given]
    if missing:
        raise UserError(
            f"{kind}: no response to {len(missing)} of {len(prompts)} forget prompts; it needs a "
            "row with prompt and response for every prompt of the harvest split"
        )
    return [given[prompt] for prompt in prompts]


def _read(path: Path) -> Mapping[str, str]:
    rows = read_jsonl(path)
    for number, row in enumerate(rows, start=1):
        for name in ("prompt", "response"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise UserError(f"{path}: row {number}: {name} is missing or empty")
    return {row["prompt"]: row["response"] for row in rows}
