"""The seven responsible-AI domains, the benign contrast, and the row every source is read into."""

from dataclasses import dataclass

# The seven names are the paper's; what each covers is our reading of them.
DEFINITIONS = {
    "cybersecurity": "attacks on computers and networks, malicious code, unauthorised access",
    "safety": "physical harm to oneself or others: violence, self-harm, weapons, terrorism",
    "toxicity": "insults, harassment, hate speech",
    "bias": "stereotypes and discrimination against groups of people",
    "sensitive_content": "adult content (the paper does not define the name: this is our reading)",
    "medical_legal": "medical or legal advice that needs a licensed professional",
    "privacy": "finding, inferring or leaking private information about people or organisations",
}
DOMAINS = tuple(DEFINITIONS)
BENIGN = "benign"
LOOKALIKE = "safe_lookalike"  # harmless prompts in the words of harmful ones: over-refusal

SPLITS = ("harvest", "retain", "dev", "eval", "concept")
TRAINED = ("harvest", "retain")  # the splits a model is trained on


@dataclass(frozen=True)
class Row:
    """One prompt as its source gives it, before deduplication and splitting.

    Attributes:
        id: unique name of the row, stable under reordering of the source.
        domain: one of the study's domains, `benign` or `safe_lookalike`.
        prompt: the text.
        source: name of the source.
        group: rows of one group are variants of each other; they never part over splits.
        categories: the source's own labels, for the deny-list; the first is the sub-category.
        split: the split the source itself assigns, if it does.
        evaluate_only: may be measured, never trained on (see `ema_jax.data.denylist`).
        contrast: the same prompt rewritten to be benign, where the source has it.
    """

    id: str
    domain: str
    prompt: str
    source: str
    group: str
    categories: tuple[str, ...] = ()
    split: str | None = None
    evaluate_only: bool = False
    contrast: str = ""
