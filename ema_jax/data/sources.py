"""The public prompt sets: which of their categories belong to which domain, and their columns.

Categories are matched as complete strings in the named column. Salad-Data shows why: its columns
`2-category` and `3-category` reuse the same O-numbers for different things ("O3: Adult Content",
"O3: Enjoying someone else's Pain"). Reading fails on a label that a row here does not list, and
on a listed label that never occurs, so that a changed data set cannot change a study silently.

The assignment of categories to domains is this project's; the paper's prompt sets are not known.
`revision` is a commit of the data set as other public projects pin it; None where we found none:
the newest is then read, and the study's hash of the prompts shows a change.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ema_jax.data import labels, published
from ema_jax.data.domains import BENIGN


@dataclass(frozen=True)
class Source:
    """One public prompt set.

    Attributes:
        hub_id, config, split, revision: arguments of `datasets.load_dataset`; no id for a set that
            is read from its file alone.
        file: name of the published file, with the columns named here; `*` if it is in parts.
        flatten: from that file's records to rows, where it is no list of rows.
        prompt: column of the text (of a list, its first item).
        used: domain -> exact labels in the `category` column.
        licence, gated: as on the data set's card.
        category: column of the label; None takes every row for the one domain of `used`. A mapping
            of label to flag in that column makes the set multi-label: a prompt flagged for two
            domains belongs to neither.
        unused: the other labels that the column is known to hold.
        also: further columns of labels, for the deny-list.
        refine: domain -> (column, labels): rows of the domain must have one of them there too.
        keep: column -> value that rows must have.
        numbered: the category column holds 1-based numbers into this list of names.
        id: column of the row's id; None: the id is the hash of the prompt.
        group: column that variants of one prompt share; None: the id.
        contrast: column of the same prompt rewritten to be benign.
    """

    prompt: str
    used: Mapping[str, tuple[str, ...]]
    licence: str
    hub_id: str | None = None
    config: str | None = None
    split: str = "train"
    file: str | None = None
    flatten: Callable[[list[Mapping[str, Any]]], Iterable[Mapping[str, Any]]] | None = None
    gated: bool = False
    revision: str | None = None
    category: str | None = None
    unused: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    refine: Mapping[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    keep: Mapping[str, Any] = field(default_factory=dict)
    numbered: tuple[str, ...] = ()
    id: str | None = None
    group: str | None = None
    contrast: str | None = None


_JBB: dict[str, Any] = {
    "hub_id": "JailbreakBench/JBB-Behaviors",
    "config": "behaviors",
    "prompt": "Goal",
    "category": "Category",
    "id": "Index",
    "licence": "MIT",
    "revision": "886acc352a31533ffbcf4ef22c744658688086fc",
}
_OR_BENCH: dict[str, Any] = {
    "hub_id": "bench-llm/or-bench",
    "split": "train",
    "prompt": "prompt",
    "category": "category",
    "licence": "CC-BY-4.0",
    "revision": "e36d8bb6660908d7d605714326ee229ca9fd8e28",
}

SOURCES: dict[str, Source] = {
    "salad": Source(
        hub_id="OpenSafetyLab/Salad-Data",
        config="base_set",
        split="train",
        prompt="question",
        category="3-category",
        used=labels.SALAD_USED,
        unused=labels.SALAD_UNUSED,
        id="qid",
        licence="Apache-2.0",
    ),
    "air_bench": Source(
        hub_id="stanford-crfm/air-bench-2024",
        config="default",
        split="test",
        prompt="prompt",
        category="l2-name",
        used=labels.AIR_USED,
        unused=labels.AIR_UNUSED,
        also=("l3-name", "l4-name"),
        refine={"medical_legal": ("l4-name", ("Legal", "Medical/Pharmaceutical"))},
        # The set does not say which rows reword one prompt: the leaf is the safe cluster.
        group="cate-idx",
        licence="CC-BY-4.0",
    ),
    "wildguardmix": Source(
        hub_id="allenai/wildguardmix",
        config="wildguardtrain",
        split="train",
        prompt="prompt",
        category="subcategory",
        used=labels.WILDGUARD_USED,
        unused=labels.WILDGUARD_UNUSED,
        keep={"adversarial": False, "prompt_harm_label": "harmful"},
        licence="ODC-BY",
        gated=True,
        revision="d29c47c5ad310e0ef4a69f4ea73884566789641a",
    ),
    "sorry_bench": Source(
        hub_id="sorry-bench/sorry-bench-202503",
        config=None,
        split="train",
        prompt="turns",
        category="category",
        numbered=labels.SORRY_NAMES,
        used=labels.SORRY_USED,
        unused=tuple(
            name for name in labels.SORRY_NAMES if name not in sum(labels.SORRY_USED.values(), ())
        ),
        keep={"prompt_style": "base"},
        id="question_id",
        licence="SORRY-Bench dataset licence (custom)",
        gated=True,
    ),
    "beavertails": Source(
        hub_id="PKU-Alignment/BeaverTails",
        config=None,
        split="30k_train",
        prompt="prompt",
        category="category",
        used=labels.BEAVERTAILS_USED,
        unused=labels.BEAVERTAILS_UNUSED,
        # The labels describe question and answer together: safe answers carry none.
        keep={"is_safe": False},
        licence="CC-BY-NC-4.0",
        revision="8401fe609d288129cc684a9b3be6a93e41cfe678",
    ),
    "do_not_answer": Source(
        hub_id="LibrAI/do-not-answer",
        file="do_not_answer_en.csv",
        config=None,
        split="train",
        prompt="question",
        category="types_of_harm",
        used=labels.DO_NOT_ANSWER_USED,
        unused=labels.DO_NOT_ANSWER_UNUSED,
        id="id",
        licence="CC-BY-NC-SA-4.0 (README; the hub's tag says Apache-2.0)",
    ),
    "jailbreakbench": Source(
        split="harmful",
        file="harmful-behaviors.csv",
        used=labels.JBB_USED,
        unused=labels.JBB_UNUSED,
        **_JBB,
    ),
    "xstest": Source(
        hub_id="Paul/XSTest",
        file="xstest*prompts.csv",
        config=None,
        split="train",
        prompt="prompt",
        category="type",
        used=labels.XSTEST_USED,
        unused=labels.XSTEST_UNUSED,
        id="id",
        licence="CC-BY-4.0",
        revision="f600c994b256f12867dfa5b3eb3d545a3e62f8b5",
    ),
    # Over-refusal: the hard prompts look harmful and are not, so they are benign here.
    "or_bench": Source(config="or-bench-hard-1k", used={BENIGN: labels.OR_BENCH_ALL}, **_OR_BENCH),
    "or_bench_toxic": Source(
        config="or-bench-toxic",
        used=labels.OR_BENCH_USED,
        unused=("deception", "harmful", "illegal", "unethical"),
        **_OR_BENCH,
    ),
    "dolly": Source(
        hub_id="databricks/databricks-dolly-15k",
        file="databricks-dolly-15k.jsonl",
        config=None,
        split="train",
        prompt="instruction",
        category="category",
        used={
            BENIGN: ("open_qa", "general_qa", "brainstorming", "creative_writing", "classification")
        },
        unused=("closed_qa", "information_extraction", "summarization"),
        keep={"context": ""},
        licence="CC-BY-SA-3.0",
        revision="bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a",
    ),
    "alpaca": Source(
        hub_id="tatsu-lab/alpaca",
        file="alpaca_data.json",
        config=None,
        split="train",
        prompt="instruction",
        used={BENIGN: ()},
        keep={"input": ""},
        licence="CC-BY-NC-4.0",
        revision="dce01c9b08f87459cf36a430d809084718273017",
    ),
    # Question stems alone: benign wording of the target domains' subjects.
    "mmlu": Source(
        hub_id="cais/mmlu",
        config="all",
        split="test",
        prompt="question",
        category="subject",
        used={BENIGN: labels.MMLU_USED},
        unused=labels.MMLU_UNUSED,
        licence="MIT",
        revision="c30699e8356da336a370243923dbaf21066bb9fe",
    ),
    "jbb_benign": Source(
        split="benign", file="benign-behaviors.csv", used={BENIGN: labels.JBB_ALL}, **_JBB
    ),
    "harmbench": Source(
        file="harmbench_behaviors_text_all.csv",
        prompt="Behavior",
        category="SemanticCategory",
        used=labels.HARMBENCH_USED,
        unused=labels.HARMBENCH_UNUSED,
        keep={"FunctionalCategory": "standard"},  # the others need a text beside the prompt
        id="BehaviorID",
        licence="MIT",
    ),
    "ailuminate_demo": Source(
        file="airr_official_1.0_demo_en_us_prompt_set_release.csv",
        prompt="prompt_text",
        category="hazard",
        used=labels.AILUMINATE_USED,
        unused=labels.AILUMINATE_UNUSED,
        id="release_prompt_id",
        licence="CC-BY-4.0",
    ),
    "catqa": Source(
        file="catqa_english.json",
        flatten=published.questions,
        prompt="Question",
        category="Category",
        used=labels.CATQA_USED,
        unused=labels.CATQA_UNUSED,
        licence="Apache-2.0",
    ),
    "strongreject": Source(
        file="strongreject_dataset.csv",
        prompt="forbidden_prompt",
        category="category",
        used=labels.STRONGREJECT_USED,
        unused=labels.STRONGREJECT_UNUSED,
        licence="MIT",
    ),
    # One base prompt rewritten into five categories: concepts free of style and subject.
    "cast": Source(
        file="condition_multiple.json",
        flatten=published.contrasts,
        prompt="prompt",
        category="category",
        used=labels.CAST_USED,
        unused=labels.CAST_UNUSED,
        group="group",
        contrast="contrast",
        licence="Apache-2.0",
    ),
    "medsafetybench": Source(
        file="med_safety_demonstrations_category_*.csv",
        prompt="harmful_medical_request",
        used={"medical_legal": ()},
        licence="for research only (its README)",
    ),
    "coconot": Source(
        file="coconot_eval.jsonl",
        prompt="prompt",
        category="subcategory",
        used=labels.COCONOT_USED,
        unused=labels.COCONOT_UNUSED,
        keep={"category": "Requests with safety concerns"},
        id="id",
        licence="MIT (its repository)",
    ),
    # Over-refusal: answers to these are wanted.
    "coconot_contrast": Source(
        file="coconot_contrast_eval.jsonl",
        prompt="prompt",
        category="subcategory",
        used=labels.COCONOT_CONTRAST_USED,
        unused=labels.COCONOT_CONTRAST_UNUSED,
        id="id",
        licence="MIT (its repository)",
    ),
    # CyberSecEval's test for false refusals: cyber prompts that are benign.
    "cyberseceval_benign": Source(
        file="frr.json",
        prompt="mutated_prompt",
        used={BENIGN: ()},
        keep={"is_malicious": False},
        licence="MIT",
    ),
}
