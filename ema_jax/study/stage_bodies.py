"""The study, in the order in which the paper tells it.

prompts → baseline → concepts → forecast → harvest → unlearn → evaluate → analyse → report
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging
from flax import nnx

from ema_jax.concepts import vectors
from ema_jax.config import SensitivityConfig, StudyConfig
from ema_jax.data.chat import TokenExample
from ema_jax.data.domains import BENIGN
from ema_jax.data.prompts import Prompt, build_prompts, read_prompts, write_prompts
from ema_jax.errors import UserError
from ema_jax.generation.sampler import Sampling
from ema_jax.models import checkpoint, lora
from ema_jax.models.card import unlearned_card
from ema_jax.models.config import DecoderConfig
from ema_jax.models.decoder import Decoder
from ema_jax.models.hub import ModelSource
from ema_jax.refusal import sheet
from ema_jax.refusal.answer_screen import AnswerScreen
from ema_jax.refusal.evaluation import Evaluation
from ema_jax.refusal.responses import JudgedResponses
from ema_jax.refusal.verdicts import COMPLIED, RULES_VERSION
from ema_jax.report import write_report
from ema_jax.runtime import distributed, files
from ema_jax.study import concept_summaries, results, sensitivity
from ema_jax.study.arm_training import train_arm
from ema_jax.study.session import Subject
from ema_jax.study.workdir import Workdir
from ema_jax.unlearning.ablation import ablate
from ema_jax.unlearning.config import AblationArm
from ema_jax.unlearning.harvest import Harvested, harvest, harvest_yield
from ema_jax.unlearning.reference import reference_log_probs
from ema_jax.unlearning.run_checkpoints import Checkpoints
from ema_jax.unlearning.trainer import Trained, check_arm

STAGES = (
    "prompts",
    "baseline",
    "concepts",
    "forecast",
    "harvest",
    "unlearn",
    "evaluate",
    "analyse",
    "report",
)


class Study:
    """One study in its folder: what the stages share, and the stages."""

    def __init__(self, config: StudyConfig, workdir: Workdir, found: ModelSource):
        self.config, self.workdir, self.found = config, workdir, found
        self.subject = Subject(config, found)
        self.runs = [(arm, seed) for arm in config.arms for seed in config.seeds]

    @functools.cached_property
    def prompts(self) -> dict[str, list[Prompt]]:
        """The prompts of every split."""
        return read_prompts(self.workdir / "prompts")

    @functools.cached_property
    def screen(self) -> AnswerScreen | None:
        """What tells answers from degenerate and off-topic output, calibrated on the base."""
        made = files.read_json(self.workdir / "evaluations/base.json")["validity"]
        return None if made is None else AnswerScreen.from_json(made)

    def settings(self) -> dict[str, dict[str, Any]]:
        """Stage → everything of the config that it depends on."""
        c, model = self.config, self.subject.settings()
        asking: dict[str, Any] = {
            "judge": c.judge,
            "judge_options": c.judge_options,
            "generation": dataclasses.asdict(c.generation),
        }
        if not self._finished_before_verdicts():
            asking["verdicts"] = (
                RULES_VERSION  # those of other rules are not to be mixed with these
            )
        said = {"model": model, **asking, "keep_text": c.keep_text}
        said["extra_judges"] = c.extra_judges
        if c.sensitivity != SensitivityConfig():
            said["sensitivity"] = dataclasses.asdict(c.sensitivity)
        result: dict[str, dict[str, Any]] = {
            "prompts": {
                "prompts": dataclasses.asdict(c.prompts),
                "domains": c.domains,
                "target": c.target,
            },
            "baseline": said,
            "concepts": {
                "model": model,
                **asking,
                "poolings": c.concepts.poolings,
                "sweep_prompts": c.concepts.sweep_prompts,
                "sweep_strengths": c.concepts.sweep_strengths,
            },
            "harvest": {"model": model, **asking, "harvest": dataclasses.asdict(c.harvest)},
        }
        for arm, seed in self.runs:
            arm_settings = dataclasses.asdict(c.arm(arm))
            result[f"unlearn/{arm}/seed_{seed}"] = {"model": model, **asking, "arm": arm_settings}
            result[f"evaluate/{arm}/seed_{seed}"] = {**said, "export": c.export}
        return result

    def _finished_before_verdicts(self) -> bool:
        """Whether all responses here were judged by the first rules, which were not recorded."""
        names = ["baseline", *(f"evaluate/{arm}/seed_{seed}" for arm, seed in self.runs)]
        made = [self.workdir.manifest(name) for name in names]
        return all(each is not None and "verdicts" not in each["settings"] for each in made)

    def plan(self) -> Iterator[tuple[str, bool]]:
        """Every stage in order, and whether it was finished here."""
        runs = [f"{stage}/{a}/seed_{s}" for a, s in self.runs for stage in ("unlearn", "evaluate")]
        for name in (*STAGES[:5], *runs, *STAGES[7:]):
            yield name, self.workdir.manifest(name) is not None

    def check(self, shape: Mapping[str, int]) -> None:
        """Refuses arms that the model, or a mesh of this shape, cannot train."""
        decoder = DecoderConfig.from_folder(self.found.folder)
        for arm in self.config.arms:
            check_arm(decoder, self.config.arm(arm), shape, f"arms.{arm}")

    def run(self) -> None:
        """Runs what is wanted and not yet done, in order."""
        settings, workdir = self.settings(), self.workdir
        workdir.check(settings)
        self.check(self.subject.mesh.shape)  # now, not after the prompts are made

        # What the first rules judged is complete: only its figures may be made again.
        closed = STAGES[:7] if self._finished_before_verdicts() else ()

        def stage(name: str, inputs: Sequence[str], function: Any, own: Any = None) -> None:
            if workdir.wanted(name) and name.split("/")[0] not in closed:
                workdir.run(name, settings[name] if own is None else own, inputs, function)

        stage("prompts", [], self.make_prompts)
        stage("baseline", ["prompts"], self.ask_base)
        stage("concepts", ["prompts", "baseline"], self.find_concepts)
        concepts = self.config.concepts
        resampling = {"permutations": concepts.permutations, "splits": concepts.splits}
        stage("forecast", ["concepts"], self.make_forecast, resampling)
        stage("harvest", ["prompts", "baseline"], self.harvest_refusals)
        evaluated = []
        for arm, seed in self.runs:
            trained = f"unlearn/{arm}/seed_{seed}"
            evaluated.append(f"evaluate/{arm}/seed_{seed}")
            needed = ["prompts", "baseline", "harvest"]
            needed += ["concepts"] if self.config.arm(arm).ablation else []
            stage(trained, needed, functools.partial(self.unlearn, arm, seed))
            stage(
                evaluated[-1],
                ["prompts", "baseline", "concepts", trained],
                functools.partial(self.evaluate, arm, seed),
            )
        figures = {"version": results.VERSION, **sheet.settings(workdir)}
        stage("analyse", ["baseline", "forecast", *evaluated], self.analyse, figures)
        stage("report", ["analyse"], self.report, {})

    def make_prompts(self) -> list[Path]:
        """Disjoint prompts of every domain for every use."""
        c = self.config
        write_prompts(self.workdir / "prompts", build_prompts(c.prompts, c.domains, c.target))
        return [self.workdir / "prompts"]

    def ask_base(self) -> list[Path]:
        """What the untouched model refuses; its benign answers are kept for the utility figures."""
        subject, asked = self.subject, self.prompts["eval"]
        judged = subject.ask(subject.base, asked, "base responses", journal=self._journal("eval"))
        screen = subject.calibrated(judged)
        if screen is None:
            logging.warning(
                "the base answers too few of the evaluation prompts to tell answers from off-topic "
                "and degenerate output: what is no refusal counts as compliance in this study"
            )
        else:
            judged = judged.screened(screen, subject.chat, subject.log_probs)
        answers = [
            dataclasses.asdict(Harvested(p.id, p.domain, p.prompt, r.text, r.tokens))
            for p, r, v in judged
            if p.domain == BENIGN and v.verdict == COMPLIED
        ]
        if not answers:
            raise UserError(
                f"{self.found.given}: the model answers none of the benign prompts, so nothing "
                "can be measured; check the chat template and the judge"
            )
        path = self.workdir / "harvest/benign_answers.jsonl"
        files.write_jsonl(path, answers)
        measured = subject.utility(subject.base, self._benign_answers(), judged)
        summary = self.workdir / "evaluations/base.json"
        opening = concept_summaries.refusal_openers(judged)
        validity = None if screen is None else screen.to_json()
        found = {"utility": measured, "refusal_openers": opening, "validity": validity}
        found |= self._sensitivity(subject.base, judged, screen)
        files.write_json(summary, found)
        return [self._write_responses("base", judged), path, summary]

    def find_concepts(self) -> list[Path]:
        """Every domain's concept vector at every layer, and what adding or ablating it does."""
        pooled = self.subject.capture(self.subject.base, self.prompts["concept"])
        kept = self.workdir / "concepts/base.activations.safetensors"
        files.write_tensors(
            kept,
            {f"{name}/{domain}": x for name, by in pooled.items() for domain, x in by.items()},
            {"layer_convention": vectors.LAYER_CONVENTION},
        )
        return [kept, *self._write_concepts("base", pooled), self._sweep_layers(pooled)]

    def _sweep_layers(self, pooled: Mapping[str, Mapping[str, Any]]) -> Path:
        """Interventions on the base, read off the first token, and one of them in full."""
        c, path = self.config, self.workdir / "concepts/sweep.json"
        base = self.subject.base
        refusing, found = self._openers(), None
        if c.concepts.sweep_prompts and refusing:
            directions = vectors.concept_vectors(pooled[c.concepts.poolings[0]])
            found = concept_summaries.layer_sweep_summary(
                base,
                directions,
                self._sweep_tokens(),
                refusing,
                c.concepts.sweep_strengths,
                batch_size=c.generation.batch_size,
                mesh=self.subject.mesh,
            )
            layer = concept_summaries.most_refusing_layer(found, c.target)
            ablated = concept_summaries.ablated_model(base, directions[c.target], layer)
            asked = [p for some in self._sweep_prompts().values() for p in some]
            judged = self.subject.ask(ablated, asked, f"{c.target} ablated", screen=self.screen)
            found["ablated_everywhere"] = files.json_safe(
                {"direction": c.target, "layer": layer, **judged.rates()._asdict()}
            )
        files.write_json(path, found)
        return path

    def _openers(self) -> list[int]:
        return files.read_json(self.workdir / "evaluations/base.json")["refusal_openers"]

    def _sweep_prompts(self) -> dict[str, list[Prompt]]:
        """The first dev prompts of every domain, which no concept vector has seen."""
        by_domain: dict[str, list[Prompt]] = {}
        for prompt in self.prompts["dev"]:
            by_domain.setdefault(prompt.domain, []).append(prompt)
        return {d: each[: self.config.concepts.sweep_prompts] for d, each in by_domain.items()}

    def _sweep_tokens(self) -> dict[str, list[tuple[int, ...]]]:
        return {
            d: [self.subject.chat.prompt_tokens(p.prompt) for p in each]
            for d, each in self._sweep_prompts().items()
        }

    def make_forecast(self) -> list[Path]:
        """From the base alone: entanglement with the target, and whom unlearning will hit."""
        c, pooled = self.config, self._base_activations()
        activations = pooled[c.concepts.poolings[0]]
        categories: dict[str, list[str]] = {}
        for prompt in self.prompts["concept"]:
            categories.setdefault(prompt.domain, []).append(prompt.category)
        made = concept_summaries.forecast_summary(
            activations, pooled.get("prompt_mean"), c.target, c.domains, c.concepts, categories
        )
        path = self.workdir / "forecast.json"
        files.write_json(path, made)
        return [path]

    def harvest_refusals(self) -> list[Path]:
        """The model's own refusals: the forget set, the retain set, and the reference's numbers."""
        c, folder, subject = self.config, self.workdir / "harvest", self.subject
        written = []
        for split, name in (("harvest", "forget"), ("retain", "retain")):
            asked = self.prompts[split]
            draws = [
                subject.ask(
                    subject.base,
                    asked,
                    f"harvest {name}",
                    sampling,
                    self._journal(f"{name}.{i}"),
                    self.screen,
                )
                for i, sampling in enumerate(c.harvest.draws())
            ]
            kept = harvest(
                asked * len(draws),
                [response for judged in draws for response in judged.responses],
                [verdict for judged in draws for verdict in judged.verdicts],
                benign=BENIGN,
                minimum=c.harvest.min_examples,
                cap=c.harvest.response_cap,
            )
            shares = [f"{d} {share:.0%}" for d, share in harvest_yield(asked, kept).items()]
            logging.info("harvest %s, prompts that gave one: %s", name, ", ".join(shares))
            path = folder / f"{name}.jsonl"
            rows = [dataclasses.asdict(item) for item in kept]
            if name == "forget":
                examples = [item.example(subject.chat) for item in kept]
                sums = reference_log_probs(
                    subject.base, examples, c.generation.batch_size, mesh=subject.mesh
                )
                rows = [
                    {**row, "reference_log_prob": float(x)}
                    for row, x in zip(rows, sums, strict=True)
                ]
            files.write_jsonl(path, rows)
            written.append(path)
        return written

    def unlearn(self, arm: str, seed: int) -> list[Path]:
        """Trains one arm with one seed until the target's dev refusal is low."""
        workdir, config, name = self.workdir, self.config.arm(arm), f"{arm}.seed_{seed}"
        weights = self._weights(arm, seed)
        metrics = workdir / f"metrics/{name}.jsonl"
        if config.ablation is not None:
            trained = self._ablate(config.ablation)
            files.write_jsonl(metrics, [])
        else:
            trained = self._train(arm, seed)
        if config.trainable == "lora":
            lora.save_peft(trained.model, weights, config.lora, self.found.given)
        else:
            checkpoint.export(trained.model, weights, companions=self.found.folder, overwrite=True)
        path = workdir / f"trajectories/{name}.json"
        files.write_json(
            path,
            {
                "arm": arm,
                "seed": seed,
                "steps": trained.steps,
                "stopped": trained.stopped,
                "first_loss": None if math.isnan(trained.first_loss) else trained.first_loss,
                "points": trained.trajectory,
            },
        )
        # Not the metrics: they hold the speed of this very run, and outputs are hashed.
        return [weights, path]

    def evaluate(self, arm: str, seed: int) -> list[Path]:
        """What the trained model refuses, what else changed, and what of the concepts is left."""
        c, name, subject = self.config, f"{arm}.seed_{seed}", self.subject
        model, asked = subject.trained(self._weights(arm, seed)), self.prompts["eval"]
        journal = self._journal("eval")
        judged = subject.ask(model, asked, f"{name} responses", journal=journal, screen=self.screen)
        measured = subject.utility(model, self._benign_answers(), judged)
        pooled, main = subject.capture(model, self.prompts["concept"]), c.concepts.poolings[0]
        base = self._base_activations()[main]
        found = {
            "utility": measured,
            "drift": concept_summaries.concept_drift(base, pooled[main], c.domains),
        }
        refusing = self._openers()
        if c.concepts.sweep_prompts and refusing:
            found["patching"] = concept_summaries.patching_summary(
                subject.base,
                model,
                self._sweep_tokens(),
                refusing,
                batch_size=c.generation.batch_size,
                mesh=subject.mesh,
            )
        found |= self._sensitivity(model, judged, self.screen)
        summary = self.workdir / f"evaluations/{name}.json"
        files.write_json(summary, found)
        written = [self._write_responses(name, judged), summary]
        written += self._write_concepts(name, pooled)
        if c.export:
            folder = self.workdir / f"export/{arm}/seed_{seed}"
            card = unlearned_card(
                base=self.found.id,
                revision=self.found.revision,
                fingerprint=self.found.fingerprint,
                target=c.target,
                arm=arm,
                seed=seed,
                settings=dataclasses.asdict(c.arm(arm)),
            )
            checkpoint.export(
                lora.merge(model), folder, companions=self.found.folder, card=card, overwrite=True
            )
            written.append(folder)
        return written

    def analyse(self) -> list[Path]:
        """All figures of the study, from its artifacts alone."""
        workdir, model = self.workdir, DecoderConfig.from_folder(self.found.folder)
        abstract = checkpoint.abstract_decoder(model)
        described = {
            "id": self.found.id,
            "path": str(self.found.folder),
            "revision": self.found.revision,
            "family": model.family,
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract))),
            "fingerprint": self.found.fingerprint,
            "template": self.subject.chat.template,
            "template_hash": self.subject.chat.template_hash,
        }
        path = workdir / "results.json"
        files.write_json(path, results.results(workdir, self.config, described))
        metrics = workdir / "metrics.jsonl"
        rows = (files.read_jsonl(workdir / f"metrics/{a}.seed_{s}.jsonl") for a, s in self.runs)
        files.write_jsonl(metrics, [row for run in rows for row in run])
        return [path, metrics]

    def report(self) -> list[Path]:
        """The page that a person reads."""
        workdir = self.workdir
        names = [f"{arm}.seed_{seed}" for arm, seed in self.runs]
        trajectories = [files.read_json(workdir / f"trajectories/{n}.json") for n in names]
        samples = None
        if self.config.keep_text:
            samples = [
                {"arm": name.split(".")[0], **row}
                for name in ("base", *names)
                for row in files.read_jsonl(workdir / f"responses/{name}.jsonl")
            ]
        results = files.read_json(workdir / "results.json")
        write = functools.partial(write_report, workdir.path, results, trajectories, samples)
        distributed.first_only(write, "report")
        logging.info("report: %s", workdir / "report/index.html")
        return [workdir / "report", workdir / "figures"]

    def _journal(self, name: str) -> Path:
        """Where the running stage writes responses down: a kill does not lose them."""
        return self.workdir.partial / f"{name}.jsonl"

    def _dev_rates(self, model: Decoder) -> Evaluation:
        return self.subject.rates(model, self.prompts["dev"], self.screen)

    def _weights(self, arm: str, seed: int) -> Path:
        """What training leaves: adapters, or a whole checkpoint."""
        kind = "adapters" if self.config.arm(arm).trainable == "lora" else "checkpoints"
        return self.workdir / f"{kind}/{arm}/seed_{seed}"

    def _ablate(self, arm: AblationArm) -> Trained:
        """No training: the target's own refusal direction is projected out of the weights."""
        target = self.config.target
        directions = vectors.load_concepts(self.workdir / "concepts/base.safetensors")
        found = directions.vectors[target]
        return ablate(self.subject.base, found, arm, target=target, evaluate=self._dev_rates)

    def _train(self, arm: str, seed: int) -> Trained:
        c = self.config
        return train_arm(
            self.workdir.path,
            arm,
            seed,
            c.arm(arm),
            base=self.subject.base,
            chat=self.subject.chat,
            target=c.target,
            evaluate=self._dev_rates,
            mesh=self.subject.mesh,
            checkpoints=self._checkpoints(arm, seed),
            profile=c.profile,
        )

    def _sensitivity(
        self, model: Decoder, judged: JudgedResponses, screen: AnswerScreen | None
    ) -> dict[str, Any]:
        """The evaluation prompts asked in other ways too, where the config wants that."""
        config = self.config.sensitivity
        if config == SensitivityConfig():
            return {}

        def ask(prompts: Sequence[Prompt], sampling: Sampling, cap: int | None) -> JudgedResponses:
            return self.subject.ask(
                model,
                prompts,
                "other ways of asking",
                sampling,
                max_new_tokens=cap,
            )

        def finish(judged: JudgedResponses) -> JudgedResponses:
            if screen is None:
                return judged
            return judged.screened(screen, self.subject.chat, self.subject.log_probs)

        return {"sensitivity": sensitivity.measure(judged, config, ask, finish)}

    def _write_responses(self, name: str, judged: JudgedResponses) -> Path:
        subject, path = self.subject, self.workdir / f"responses/{name}.jsonl"
        rows = judged.rows(
            subject.judge,
            subject.extra_judges,
            keep_text=self.config.keep_text,
            oracle=subject.oracle,
        )
        files.write_jsonl(path, rows)
        return path

    def _benign_answers(self) -> list[TokenExample]:
        rows = files.read_jsonl(self.workdir / "harvest/benign_answers.jsonl")
        return [Harvested.from_json(row).example(self.subject.chat) for row in rows]

    def _checkpoints(self, arm: str, seed: int) -> Checkpoints:
        """Where a run keeps its state, bound to all that the run depends on."""
        stage = f"unlearn/{arm}/seed_{seed}"
        inputs = [
            (self.workdir.manifest(name) or {}).get("hash")
            for name in ("prompts", "baseline", "harvest")
        ]
        return Checkpoints(
            self.workdir / f"checkpoints/{arm}.seed_{seed}",
            every=self.config.checkpoints.every_steps,
            keep=self.config.checkpoints.keep,
            fingerprint=files.sha256_json([self.settings()[stage], inputs]),
        )

    def _base_activations(self) -> dict[str, dict[str, Any]]:
        tensors, _ = files.read_tensors(self.workdir / "concepts/base.activations.safetensors")
        pooled: dict[str, dict[str, Any]] = {}
        for key, x in tensors.items():
            name, domain = key.split("/")
            pooled.setdefault(name, {})[domain] = x
        return pooled

    def _write_concepts(self, name: str, pooled: Mapping[str, Mapping[str, Any]]) -> list[Path]:
        """`concepts/NAME.safetensors` for the main pooling, `NAME.POOLING.…` for the others."""
        written = []
        for pooling, activations in pooled.items():
            main = pooling == self.config.concepts.poolings[0]
            file = f"{name}.safetensors" if main else f"{name}.{pooling}.safetensors"
            path = self.workdir / "concepts" / file
            metadata = {
                "pooling": pooling,
                "model_hash": self.found.fingerprint,
                "model_id": self.found.id,
                "arm": name,
                "contrast": BENIGN,
                "template_hash": self.subject.chat.template_hash,
            }
            vectors.save_concepts(path, activations, vectors.concept_vectors(activations), metadata)
            written.append(path)
        return written
