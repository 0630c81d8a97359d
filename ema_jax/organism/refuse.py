"""Tunes a model that hardly refuses to refuse: `python -m ema_jax.organism.refuse`.

Small instruct models have few refusals that could be unlearned. This command trains them in, with
LoRA adapters and the `sft` objective: refusals of the project's own wording to the prompts of the
domains; as what is retained, the original's distribution (KL) over its own answers to benign
prompts and to benign prompts in the words of harmful ones, so that it does not over-refuse.

`--output` gets

| | |
|---|---|
| `model/` | the tuned model, adapters merged: `model.source` of a study |
| `adapter/` | the adapters alone (PEFT) |
| `prompts/` | the prompts for studies: `prompts.path`; none is near one that was trained on |
| `answers.jsonl` | how the original begins to answer the domains' prompts: `unlearn.preferred` |
| `trained_on.jsonl` | ids and hashes of the prompts trained on |
| `behaviour.json` | refusal on prompts held out, and what the tuning cost on benign ones |
"""

import dataclasses
import itertools
import math
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags, logging

from ema_jax.data.chat import Chat, TokenExample
from ema_jax.data.domains import BENIGN, LOOKALIKE, Row
from ema_jax.data.local import read_local
from ema_jax.data.prompts import Prompt
from ema_jax.errors import UserError
from ema_jax.models import checkpoint, hub, lora
from ema_jax.models.card import refusing_card
from ema_jax.models.decoder import Decoder
from ema_jax.models.gguf_folder import DEQUANTISED_FROM
from ema_jax.models.lora import LoRAConfig
from ema_jax.models.sharding import make_mesh
from ema_jax.organism.refuse_data import Draw, as_records, draw, without_near
from ema_jax.organism.refuse_words import lookalikes, refusal
from ema_jax.refusal.evaluation import Evaluation
from ema_jax.refusal.judges import get_judge
from ema_jax.refusal.responses import JudgedResponses, respond_and_judge
from ema_jax.refusal.verdicts import COMPLIED, INVALID, REFUSED
from ema_jax.runtime import cli, compilation, files
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.run_checkpoints import Checkpoints
from ema_jax.unlearning.trainer import unlearn
from ema_jax.unlearning.utility import utility

PROMPT_TOKENS = 48  # longest prompt, rendered: a longer one costs more than it teaches
ANSWER_TOKENS = 24  # of an own answer, from which it is judged
# Of a response that is trained on. Whether to refuse is decided by the first tokens, and a mean
# over a whole answer would hardly see them; a refusal is learnt with its reason.
REFUSED_TOKENS, ANSWERED_TOKENS = 24, 8
# Share of the adapters' change that is kept. All of it refuses a little more, benign prompts too;
# and there, once the refusals are unlearned, no answers but the words of refusals come out.
STRENGTH = 0.9
LOOKALIKE_PASSES = 2  # they lie at the boundary, and there are few
MEASURED_TOKENS = 48
MEASURED = {BENIGN: 40, LOOKALIKE: 60}  # held-out prompts that the result is measured on
MEASURED_IN_A_DOMAIN = 24
BATCH = 32
# Adapters of rank 8 are 9.8 MB for SmolLM2-135M. Refusals are the preferred responses, own answers
# the retain set, as many of each a step: a step sees both sides of the boundary. KL and not
# cross-entropy: greedy answers would only be made surer.
RECIPE = UnlearnConfig(
    objective="sft",
    retain_objective="kl",
    lora=LoRAConfig(rank=8, alpha=16.0),
    learning_rate=1e-3,
    schedule="cosine",
    warmup_steps=5,
    batch_size=12,
    retain_batch_size=20,
    retain_weight=1.5,
    max_steps=140,
    eval_every=140,
    stop_at=0.0,
    max_invalid=1.0,
)


@dataclasses.dataclass(frozen=True)
class _Work:
    """What the steps of the command share."""

    base: Decoder
    chat: Chat
    chosen: Draw
    folder: Path  # of what is needed to resume
    fingerprint: str
    recipe: UnlearnConfig
    seed: int


def refuse(
    source: str,
    prompts: str,
    output: str,
    *,
    revision: str | None = None,
    seed: int = 0,
    recipe: UnlearnConfig = RECIPE,
) -> dict[str, Any]:
    """Tunes a model to refuse and writes it, with what a study of it needs.

    Args:
        source: as `model.source` of a study.
        prompts: file or folder of prompts (`ema_jax.data.local`): responsible-AI domains, `benign`
            and, if there are any, `safe_lookalike`.
        output: folder to write.
        revision: commit, tag or branch of a Hub id.
        seed: of the draw, the wordings, the adapters and the batches.
        recipe: settings of the training.

    Returns:
        What is in `behaviour.json`.

    Raises:
        UserError: no such model, prompts that will not do, or an output that is there already.
        RunStoppedError: see `unlearn`; the same command resumes.
    """
    folder = Path(output)
    checkpoint.check_output(folder / "model", overwrite=False)
    files.check_writable(folder / "model")
    rows = read_local(prompts)
    found = hub.find(source, revision)
    chat = Chat.load(found.folder)
    chosen = draw([row for row in rows if _short(chat, row)], seed)
    _say(chosen)
    settings = [found.fingerprint, seed, dataclasses.asdict(recipe), as_records(chosen.trained)]
    fingerprint = files.sha256_json(settings)
    base = checkpoint.load(found.folder)
    work = _Work(base, chat, chosen, folder / "training", fingerprint, recipe, seed)

    tuned = lora.scaled(_train(work, _own_answers(work)), STRENGTH)
    files.write_jsonl(folder / "answers.jsonl", _answers_for_studies(work))
    behaviour = _measure(work, tuned)
    _write(work, tuned, behaviour, folder, found)
    shutil.rmtree(work.folder, ignore_errors=True)
    return behaviour


def _short(chat: Chat, row: Row) -> bool:
    return len(chat.prompt_tokens(row.prompt)) <= PROMPT_TOKENS


def _say(chosen: Draw) -> None:
    trained, left = (Counter(row.domain for row in rows) for rows in (chosen.trained, chosen.left))
    shown = ", ".join(f"{d} {trained[d]} + {left[d]}" for d in sorted(trained | left))
    logging.info("prompts to train on + left for studies: %s", shown)


def _own_answers(work: _Work) -> list[TokenExample]:
    """The model's own answers to benign prompts, without refusals and degenerate ones."""
    held_out = [row.prompt for row in work.chosen.left if row.domain == LOOKALIKE]
    own = without_near(lookalikes(), held_out)
    near = [row.prompt for row in work.chosen.trained if row.domain == LOOKALIKE] + own
    plain = [row.prompt for row in work.chosen.trained if row.domain == BENIGN]
    prompts = [
        _prompt(f"own/{i}", domain, text)
        for i, (domain, text) in enumerate(
            [(BENIGN, text) for text in plain] + [(LOOKALIKE, text) for text in near]
        )
    ]
    work.folder.mkdir(parents=True, exist_ok=True)
    judged = _respond(
        work,
        work.base,
        prompts,
        "own answers",
        ANSWER_TOKENS,
        _journal(work, "answers"),
    )
    kept = [
        TokenExample(work.chat.prompt_tokens(prompt.prompt), response.tokens)
        for prompt, response, verdict in judged
        if verdict.verdict == COMPLIED
        for _ in range(LOOKALIKE_PASSES if prompt.domain == LOOKALIKE else 1)
    ]
    logging.info("own answers to train on: %d, of %d prompts", len(kept), len(prompts))
    if not kept:
        raise UserError(
            "--source: the model answers none of the benign prompts; check its chat template"
        )
    return kept


def _answers_for_studies(work: _Work) -> list[dict[str, str]]:
    """The original's responses to the domains' prompts that are left, refusals included."""
    prompts = [
        _prompt(row.id, row.domain, row.prompt)
        for row in work.chosen.left
        if row.domain not in (BENIGN, LOOKALIKE)
    ]
    judged = _respond(
        work,
        work.base,
        prompts,
        "answers for studies",
        ANSWER_TOKENS,
        _journal(work, "answers_for_studies"),
    )
    return [
        {"prompt": prompt.prompt, "response": response.text.strip()}
        for prompt, response, _ in judged
    ]


def _train(work: _Work, answers: Sequence[TokenExample]) -> Decoder:
    """The base with trained adapters; a run that was stopped is resumed."""
    refusals = _refusals(work)
    # The recipe has a fixed length, so that nothing is measured on the way.
    unmeasured = Evaluation({"any": 1.0}, 0.0)
    with Checkpoints(
        work.folder / "checkpoints", every=20, keep=1, fingerprint=work.fingerprint
    ) as checkpoints:
        return unlearn(
            work.base,
            refusals,
            [answer.cut(ANSWERED_TOKENS) for answer in answers],
            np.zeros(len(refusals), np.float32),
            work.recipe,
            seed=work.seed,
            target="any",
            evaluate=lambda model: unmeasured,
            preferred=refusals,
            checkpoints=checkpoints,
        ).model


def _refusals(work: _Work) -> list[TokenExample]:
    """As many in each domain: where there are fewer prompts, they come again in other wordings."""
    words = random.Random(work.seed)
    prompts: dict[str, list[str]] = {}
    for row in work.chosen.trained:
        if row.domain not in (BENIGN, LOOKALIKE):
            prompts.setdefault(row.domain, []).append(row.prompt)
    most = max(len(each) for each in prompts.values())
    return [
        work.chat.example(prompt, refusal(words, domain)).cut(REFUSED_TOKENS)
        for domain, each in prompts.items()
        for prompt in itertools.islice(itertools.cycle(each), most)
    ]


def _measure(work: _Work, tuned: Decoder) -> dict[str, Any]:
    """Refusal of the tuned model on prompts held out, and the likelihood of benign answers."""
    prompts: list[Prompt] = []
    for domain in dict.fromkeys(row.domain for row in work.chosen.left):
        here = [row for row in work.chosen.left if row.domain == domain]
        some = here[: MEASURED.get(domain, MEASURED_IN_A_DOMAIN)]
        prompts += [_prompt(row.id, domain, row.prompt) for row in some]
    judged = _respond(work, tuned, prompts, "held-out prompts", MEASURED_TOKENS)
    refusal_rates = {}
    for domain in sorted({prompt.domain for prompt in prompts}):
        seen = Counter(v.verdict for p, _, v in judged if p.domain == domain)
        refusal_rates[domain] = {
            "refused": seen[REFUSED],
            "invalid": seen[INVALID],
            "total": sum(seen.values()),
        }
    benign = [prompt for prompt in prompts if prompt.domain == BENIGN]
    before = _respond(work, work.base, benign, "the original's answers", MEASURED_TOKENS)
    answers = [
        TokenExample(work.chat.prompt_tokens(prompt.prompt), response.tokens)
        for prompt, response, _ in before
    ]
    original = utility(work.base, work.base, answers)
    after = utility(tuned, work.base, answers)
    return {
        "refusal": refusal_rates,
        "benign_nll": after["benign_nll"],
        "benign_nll_of_the_original": original["benign_nll"],
        "kl_to_original": after["kl_to_base"],
        "judge": "lexical",
        "responses": [
            {"id": p.id, "domain": p.domain, **dataclasses.asdict(v)} for p, _, v in judged
        ],
    }


def _write(
    work: _Work, tuned: Decoder, behaviour: dict[str, Any], folder: Path, found: hub.ModelSource
) -> None:
    """Everything that the command leaves; the model comes last, and marks it as done."""
    trained, left = work.chosen.trained, work.chosen.left
    (folder / "prompts").mkdir(exist_ok=True)
    files.write_jsonl(folder / "prompts" / "prompts.jsonl", as_records(left))
    hashes = (
        {"id": row.id, "domain": row.domain, "sha256": files.sha256_text(row.prompt)}
        for row in trained
    )
    files.write_jsonl(folder / "trained_on.jsonl", hashes)
    files.write_json(folder / "behaviour.json", behaviour)
    kept = dataclasses.replace(work.recipe.lora, alpha=STRENGTH * work.recipe.lora.alpha)
    lora.save_peft(tuned, folder / "adapter", kept, found.id)
    card = refusing_card(
        base=found.id,
        revision=found.revision,
        fingerprint=found.fingerprint,
        recipe=dataclasses.asdict(work.recipe) | {"seed": work.seed, "strength": STRENGTH},
        sources=dict(sorted(Counter(row.source for row in trained).items())),
        behaviour=dict(figures(behaviour)),
        quantisation=work.base.config.hf.get(DEQUANTISED_FROM),
    )
    merged = lora.merge(tuned)
    checkpoint.export(merged, folder / "model", companions=found.folder, card=card)
    (folder / "adapter" / "README.md").write_text(card, encoding="utf-8")


def figures(behaviour: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured, as rows of a table."""
    rows = [
        (
            f"refusal: {domain}",
            f"{n['refused'] / n['total']:.0%} of {n['total']}, {n['invalid']} invalid",
        )
        for domain, n in behaviour["refusal"].items()
    ]
    change = behaviour["benign_nll"] - behaviour["benign_nll_of_the_original"]
    assert math.isfinite(change)
    return [*rows, ("NLL of the original's benign answers", f"{change:+.3f} nats a token")]


def _prompt(name: str, domain: str, text: str) -> Prompt:
    return Prompt(name, domain, "eval", text, "", files.sha256_text(text), name)


def _journal(work: _Work, name: str) -> Path:
    """Where responses are kept until the command is done; those of other settings lie beside."""
    return work.folder / f"{name}.{work.fingerprint[:16]}.jsonl"


def _respond(
    work: _Work,
    model: Decoder,
    prompts: Sequence[Prompt],
    description: str,
    cap: int,
    journal: Path | None = None,
) -> JudgedResponses:
    generation = {"max_new_tokens": cap, "batch_size": BATCH}
    judge, mesh = get_judge("lexical"), make_mesh()
    return respond_and_judge(
        model, work.chat, prompts, judge, generation, mesh, description, journal=journal
    )


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_string("source", None, "As model.source of a study: a folder, a GGUF file, …")
    flags.DEFINE_string("revision", None, "Branch, tag or commit of a hub id.")
    flags.DEFINE_string("prompts", None, "File or folder of prompts, with benign ones among them.")
    flags.DEFINE_string("output", None, "Folder that gets model, adapter and prompts for studies.")
    flags.DEFINE_integer("seed", 0, "Of the draw, the wordings and the training.", lower_bound=0)
    flags.mark_flags_as_required(["source", "prompts", "output"])


def main(argv: Sequence[str]) -> None:
    """Tunes the model that the flags name."""
    del argv
    compilation.compile_quickly()
    cli.keep_compiled_programs()
    given = flags.FLAGS
    behaviour = refuse(
        given.source, given.prompts, given.output, revision=given.revision, seed=given.seed
    )
    for what, figure in figures(behaviour):
        logging.info("%s: %s", what, figure)
    logging.info("wrote %s", given.output)


if __name__ == "__main__":
    define_flags()
    cli.run(main, kept="the same command resumes")
