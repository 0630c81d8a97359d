"""The work of each stage: from artifacts to artifacts, with the model's session.

Every function takes the session, the study's artifacts and the stage's context, those of a run (one
arm with one seed) also the run, and returns the files and folders that it wrote.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from ema_jax.concepts.vectors import Activations, concept_vectors
from ema_jax.config import SensitivityConfig, StudyConfig
from ema_jax.data.chat import Chat, TokenExample
from ema_jax.data.domains import BENIGN
from ema_jax.data.prompts import Prompt
from ema_jax.generation.sampler import Sampling
from ema_jax.models import checkpoint, lora
from ema_jax.models.card import unlearned_card
from ema_jax.models.decoder import Decoder
from ema_jax.models.gguf_folder import DEQUANTISED_FROM
from ema_jax.refusal.answer_screen import AnswerScreen
from ema_jax.refusal.evaluation import Evaluation
from ema_jax.refusal.responses import JudgedResponses
from ema_jax.refusal.verdicts import COMPLIED
from ema_jax.report import write_report
from ema_jax.runtime import distributed
from ema_jax.runtime.files import json_safe
from ema_jax.study import base_check, concept_summaries, sensitivity
from ema_jax.study.arm_training import arm_settings, train_arm
from ema_jax.study.artifacts import (
    ACTIVATIONS,
    BASE,
    Artifacts,
    ConceptInputs,
    ForgetSet,
    Pooled,
    Run,
    runs_of,
)
from ema_jax.study.cautions import cautions
from ema_jax.study.checks import check_prompts
from ema_jax.study.dose_search import search_dose
from ema_jax.study.origin import origin
from ema_jax.study.replication import study_claims
from ema_jax.study.results import results
from ema_jax.study.session import ModelSession
from ema_jax.study.workdir import StageContext
from ema_jax.unlearning.ablation import ablate
from ema_jax.unlearning.harvest import Harvested, harvest, harvest_yield


def make_prompts(session: ModelSession, artifacts: Artifacts, context: StageContext) -> list[Path]:
    """Disjoint prompts of every domain for every use."""
    # Those of a public set are known only now.
    check_prompts(session.config, session.source.config, session.chat, session.prompts)
    return [artifacts.prompts.write(session.prompts)]


def measure_base(session: ModelSession, artifacts: Artifacts, context: StageContext) -> list[Path]:
    """Refusals of the untouched model; its benign answers are kept for the utility figures."""
    base, prompts = session.read_base, artifacts.prompts.read()["eval"]
    journal = context.journal("eval")
    judged = session.respond_and_judge(base, prompts, "base responses", journal=journal)
    screen = session.calibrated(judged)
    if screen is None:
        logging.warning(
            "the base answers too few of the evaluation prompts to tell answers from off-topic "
            "and degenerate output: what is no refusal counts as compliance in this study"
        )
    judged = session.screened(judged, screen)
    answers = [
        Harvested(p.id, p.domain, p.prompt, r.text, r.tokens)
        for p, r, v in judged
        if p.domain == BENIGN and v.verdict == COMPLIED
    ]
    kept = artifacts.benign_answers.write(answers)
    found = {
        # Without an answer there is nothing to measure it on, and the study ends here.
        "utility": session.utility(base, _examples(answers, session.chat), judged)
        if answers
        else None,
        "refusal_openers": concept_summaries.refusal_openers(judged),
        "validity": None if screen is None else screen.to_json(),
        **_sensitivity(session, context, base, judged, screen),
    }
    summary = artifacts.evaluation(BASE).write(found)
    written = [_write_responses(session, artifacts, BASE, judged), kept, summary]
    logging.info("%s", base_check.table(base_check.base_scores(artifacts)))
    return written


def find_concepts(session: ModelSession, artifacts: Artifacts, context: StageContext) -> list[Path]:
    """Every domain's concept vector at every layer, and the effect of adding or ablating it."""
    base_check.require_fit_base(session.config, artifacts)
    prompts = artifacts.prompts.read()
    pooled = session.capture(session.read_base, prompts["concept"], context.partial)
    concepts = _write_concepts(session, artifacts, BASE, pooled)
    main = pooled[session.config.concepts.poolings[0]]
    found = _sweep_layers(session, artifacts, main, _sweep_prompts(session.config, prompts["dev"]))
    swept = artifacts.layer_sweep.write(found)
    return [artifacts.activations.write(context.partial / ACTIVATIONS), *concepts, swept]


def _sweep_layers(
    session: ModelSession,
    artifacts: Artifacts,
    activations: Activations,
    prompts: Mapping[str, Sequence[Prompt]],
) -> dict[str, Any] | None:
    """Interventions on the base, read off the first token, and one of them in full."""
    config, base = session.config, session.base
    refusing = _refusal_openers(artifacts)
    if not (config.concepts.sweep_prompts and refusing):
        return None
    directions = concept_vectors(activations)
    found = concept_summaries.layer_sweep_summary(
        base,
        directions,
        _tokens(prompts, session.chat),
        refusing,
        config.concepts.sweep_strengths,
        most_layers=config.concepts.sweep_layers,
        batch_size=config.generation.batch_size,
        mesh=session.mesh,
    )
    layer = concept_summaries.most_refusing_layer(found, config.target)
    ablated = concept_summaries.ablated_model(base, directions[config.target], layer)
    judged = session.respond_and_judge(
        ablated,
        [prompt for some in prompts.values() for prompt in some],
        f"{config.target} ablated",
        screen=_screen(artifacts),
    )
    found["ablated_everywhere"] = json_safe(
        {"direction": config.target, "layer": layer, **judged.rates()._asdict()}
    )
    return found


def make_forecast(session: ModelSession, artifacts: Artifacts, context: StageContext) -> list[Path]:
    """From the base alone: entanglement with the target, and which domains unlearning will hit."""
    config, pooled = session.config, artifacts.activations.read()
    categories: dict[str, list[str]] = {}
    for prompt in artifacts.prompts.read()["concept"]:
        categories.setdefault(prompt.domain, []).append(prompt.category)
    made = concept_summaries.forecast_summary(
        pooled[config.concepts.poolings[0]],
        pooled.get("prompt_mean"),
        config.target,
        config.domains,
        config.concepts,
        categories,
    )
    return [artifacts.forecast.write(made)]


def harvest_refusals(
    session: ModelSession, artifacts: Artifacts, context: StageContext
) -> list[Path]:
    """The model's own refusals: forget set, retain set, and the reference's log-probabilities."""
    base_check.require_fit_base(session.config, artifacts)
    prompts, screen = artifacts.prompts.read(), _screen(artifacts)
    forget = _harvested(session, context, "forget", prompts["harvest"], screen)
    reference = session.log_probs(_examples(forget, session.chat))
    written = artifacts.forget_set.write(ForgetSet(forget, reference))
    retain = _harvested(session, context, "retain", prompts["retain"], screen)
    return [written, artifacts.retain_set.write(retain)]


def _harvested(
    session: ModelSession,
    context: StageContext,
    name: str,
    prompts: Sequence[Prompt],
    screen: AnswerScreen | None,
) -> list[Harvested]:
    config, draws = session.config.harvest, []
    if screen is not None and config.samples > 1:
        screen = screen.of_drawn()
    for i, sampling in enumerate(config.draws()):
        journal = context.journal(f"{name}.{i}")
        judged = session.respond_and_judge(
            session.read_base, prompts, f"harvest {name}", sampling, journal
        )
        # Of the other domains refusals are kept, and those no screen changes.
        draws.append(session.screened(judged, screen, BENIGN))
    kept = harvest(
        [*prompts] * len(draws),
        [response for judged in draws for response in judged.responses],
        [verdict for judged in draws for verdict in judged.verdicts],
        benign=BENIGN,
        minimum=config.min_examples,
        cap=config.response_cap,
    )
    shares = [f"{d} {share:.0%}" for d, share in harvest_yield(prompts, kept).items()]
    logging.info("harvest %s, prompts that gave one: %s", name, ", ".join(shares))
    return kept


def find_dose(
    session: ModelSession, artifacts: Artifacts, context: StageContext, run: Run
) -> list[Path]:
    """The learning rate of an arm at which the target's refusals go and its answers stay."""
    screen, trials = _screen(artifacts), context.partial / "trials.json"
    found = search_dose(session, artifacts, run.arm, screen, trials)
    return [artifacts.dose(run.arm).write(found)]


def unlearn(
    session: ModelSession, artifacts: Artifacts, context: StageContext, run: Run
) -> list[Path]:
    """Trains one arm with one seed until the target's dev refusal is low."""
    config, target = session.config.arm(run.arm), session.config.target
    dev, screen = artifacts.prompts.read()["dev"], _screen(artifacts)

    def dev_rates(model: Decoder) -> Evaluation:
        return session.rates(model, dev, screen)

    if config.ablation is not None:  # no training: the base's refusal direction is projected out
        directions = artifacts.concepts(BASE).read().vectors[target]
        trained = ablate(
            session.base, directions, config.ablation, target=target, evaluate=dev_rates
        )
        artifacts.metrics(run).write([])
    else:
        trained = train_arm(session, artifacts, context, run, dev_rates)
    weights, source = _weights(session, artifacts, run), session.source
    if config.trainable == "lora":
        lora.save_peft(trained.model, weights, config.lora, source.given)
    else:
        checkpoint.export(trained.model, weights, companions=source.folder, overwrite=True)
    trajectory = artifacts.trajectory(run).write(
        {
            "arm": run.arm,
            "seed": run.seed,
            "steps": trained.steps,
            "stopped": trained.stopped,
            "last_step": trained.last_step,
            "first_loss": None if math.isnan(trained.first_loss) else trained.first_loss,
            "points": trained.trajectory,
        }
    )
    # Not the metrics: they hold the speed of this very run, and outputs are hashed.
    return [weights, trajectory]


def evaluate(
    session: ModelSession, artifacts: Artifacts, context: StageContext, run: Run
) -> list[Path]:
    """Refusals of the trained model, what else changed, and what is left of the concepts."""
    config, prompts, screen = session.config, artifacts.prompts.read(), _screen(artifacts)
    model = session.trained(_weights(session, artifacts, run))
    judged = session.respond_and_judge(
        model,
        prompts["eval"],
        f"{run.name} responses",
        journal=context.journal("eval"),
        screen=screen,
    )
    answers = _examples(artifacts.benign_answers.read(), session.chat)
    utility = session.utility(model, answers, judged)
    main = config.concepts.poolings[0]
    pooled = session.capture(model, prompts["concept"], context.partial)
    base = artifacts.activations.read()[main]
    found = {
        "utility": utility,
        "drift": concept_summaries.concept_drift(base, pooled[main], config.domains),
    }
    refusing = _refusal_openers(artifacts)
    if config.concepts.sweep_prompts and refusing:
        found["patching"] = concept_summaries.patching_summary(
            session.base,
            model,
            _tokens(_sweep_prompts(config, prompts["dev"]), session.chat),
            refusing,
            batch_size=config.generation.batch_size,
            mesh=session.mesh,
        )
    found |= _sensitivity(session, context, model, judged, screen)
    summary = artifacts.evaluation(run.name).write(found)
    written = [_write_responses(session, artifacts, run.name, judged), summary]
    written += _write_concepts(session, artifacts, run.name, pooled)
    return [*written, _export(session, artifacts, run, model)] if config.export else written


def _export(session: ModelSession, artifacts: Artifacts, run: Run, model: Decoder) -> Path:
    """The trained model, adapters merged, as a checkpoint with a card of its own."""
    config, source, folder = session.config, session.source, artifacts.export(run)
    card = unlearned_card(
        base=source.id,
        revision=source.revision,
        fingerprint=source.fingerprint,
        target=config.target,
        arm=run.arm,
        seed=run.seed,
        settings=dataclasses.asdict(arm_settings(config, artifacts, run.arm)),
        quantisation=model.config.hf.get(DEQUANTISED_FROM),
    )
    merged = lora.merge(model)
    checkpoint.export(merged, folder, companions=source.folder, card=card, overwrite=True)
    return folder


def analyse(session: ModelSession, artifacts: Artifacts, context: StageContext) -> list[Path]:
    """All figures of the study, from its artifacts alone."""
    made: Any = results(artifacts, session.config, session.describe())
    made["warnings"] = [*cautions(made), *made["warnings"]]
    made["provenance"] |= origin(session.config, artifacts.responses(BASE).read())
    if len(made["arms"]) > 1:
        made["claims"] = study_claims(session.config, made)
    written = artifacts.results.write(made)
    metrics = map(artifacts.metrics, runs_of(session.config))
    rows = (row for run in metrics if run.path.exists() for row in run.read())
    return [written, artifacts.all_metrics.write(rows)]


def report(session: ModelSession, artifacts: Artifacts, context: StageContext) -> list[Path]:
    """The page that a person reads."""
    of_runs = runs_of(session.config)
    samples = None
    if session.config.keep_text:
        names = {BASE: BASE, **{run.name: run.arm for run in of_runs}}
        # Of stages that ran before it was asked to be kept there is no text.
        samples = [
            {"arm": arm, **row}
            for name, arm in names.items()
            if artifacts.responses(name).path.exists()
            for row in artifacts.responses(name).read()
            if "response" in row
        ]
    write = functools.partial(
        write_report,
        artifacts.root,
        artifacts.results.read(),
        [run.read() for run in map(artifacts.trajectory, of_runs) if run.path.exists()],
        samples,
    )
    distributed.first_only(write, "report")
    return [artifacts.report, artifacts.figures]


def _screen(artifacts: Artifacts) -> AnswerScreen | None:
    """The screen between answers and degenerate or off-topic output, calibrated on the base."""
    made = artifacts.evaluation(BASE).read()["validity"]
    return None if made is None else AnswerScreen.from_json(made)


def _refusal_openers(artifacts: Artifacts) -> list[int]:
    return artifacts.evaluation(BASE).read()["refusal_openers"]


def _sweep_prompts(config: StudyConfig, dev: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    """The first dev prompts of every domain, which no concept vector has seen."""
    by_domain: dict[str, list[Prompt]] = {}
    for prompt in dev:
        by_domain.setdefault(prompt.domain, []).append(prompt)
    return {d: each[: config.concepts.sweep_prompts] for d, each in by_domain.items()}


def _tokens(
    prompts: Mapping[str, Sequence[Prompt]], chat: Chat
) -> dict[str, list[tuple[int, ...]]]:
    return {d: [chat.prompt_tokens(p.prompt) for p in each] for d, each in prompts.items()}


def _examples(items: Sequence[Harvested], chat: Chat) -> list[TokenExample]:
    return [item.example(chat) for item in items]


def _weights(session: ModelSession, artifacts: Artifacts, run: Run) -> Path:
    return artifacts.weights(run, adapters=session.config.arm(run.arm).trainable == "lora")


def _sensitivity(
    session: ModelSession,
    context: StageContext,
    model: Decoder,
    judged: JudgedResponses,
    screen: AnswerScreen | None,
) -> dict[str, Any]:
    """Responses to the evaluation prompts under other ways of asking, where the config has any."""
    config = session.config.sensitivity
    if config == SensitivityConfig():
        return {}

    def ask(
        way: str, prompts: Sequence[Prompt], sampling: Sampling, cap: int | None
    ) -> JudgedResponses:
        return session.respond_and_judge(
            model,
            prompts,
            f"other ways of asking, {way}",
            sampling,
            journal=context.journal(f"sensitivity.{way}"),
            max_new_tokens=cap,
        )

    finish = functools.partial(session.screened, screen=screen)
    return {"sensitivity": sensitivity.measure(judged, config, ask, finish)}


def _write_responses(
    session: ModelSession, artifacts: Artifacts, run: str, judged: JudgedResponses
) -> Path:
    rows = judged.rows(
        session.judge,
        session.extra_judges,
        keep_text=session.config.keep_text,
        oracle=session.oracle,
    )
    return artifacts.responses(run).write(rows)


def _write_concepts(
    session: ModelSession, artifacts: Artifacts, run: str, pooled: Pooled
) -> list[Path]:
    """The concept file of every pooling; that of the main one has the plain name."""
    written = []
    shared = session.config.concepts.contrast == "shared"
    for pooling, activations in pooled.items():
        metadata = {
            "pooling": pooling,
            "model_hash": session.source.fingerprint,
            "model_id": session.source.id,
            "arm": run,
            # "matched": relative to rewrites of the prompts, and to this where there are none.
            "contrast": BENIGN if shared else f"{BENIGN}, matched",
            "template_hash": session.chat.template_hash,
        }
        main = pooling == session.config.concepts.poolings[0]
        artifact = artifacts.concepts(run, None if main else pooling)
        written.append(artifact.write(ConceptInputs(activations, metadata)))
    return written
