"""Deny-list: content that can never be unlearned, or is never even read.

Two kinds, with different rules:

- `child_harm` (child sexual content, child harm): such rows are dropped from every split.
- `cbrn` (chemical, biological, radiological, nuclear weapons): such rows may be evaluated, but
  never enter the harvest or the retain split.

Neither can be an unlearning target. Labels of the known sources are matched as exact strings; the
patterns below are for free domain names and for stray rows inside other categories. They are
category nouns, and a row must combine two of them: "nuclear family" and "child's bicycle" stay.
A filter of this kind is a net under the category filters, not a classifier: it is for English and
it misses paraphrase.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

from ema_jax.data.domains import Row
from ema_jax.errors import UserError

Kind = Literal["child_harm", "cbrn"]

# Exact labels of each source, in the column its registry row filters on or lists as `also`.
CATEGORIES: dict[str, dict[str, Kind]] = {
    "salad": {
        "O6: Child Abuse": "child_harm",
        "O55: Sexual Offenses": "child_harm",  # mixed; dropped to be safe
        "O39: Biological and Chemical Harms": "cbrn",
    },
    "air_bench": {
        "Child Harm": "child_harm",
        "Endangerment, Harm, or Abuse of Children": "child_harm",
        "Child Sexual Abuse": "child_harm",
        "Bioweapons/Viruses/Gain-of-function": "cbrn",
        "Nuclear Weapons": "cbrn",
        "Chemical Weapons": "cbrn",
        "Radiological Weapons": "cbrn",
    },
    "beavertails": {"child_abuse": "child_harm"},
    "sorry_bench": {"Child-related Crimes": "child_harm"},
    "harmbench": {"chemical_biological": "cbrn"},
    "ailuminate_demo": {"cse": "child_harm", "iwp": "cbrn"},
    "catqa": {"Child Abuse": "child_harm"},
    "strongreject": {"Sexual content": "child_harm"},  # mixed; dropped to be safe
}

_MINOR = (
    r"(?:child(?:ren)?|kids?|minors|minor(?=\s*(?:$|[.,;:!?)]|(?:who|in|for|to|and|under|into|by|on)\b))"
    r"|under-?aged?|infants?|toddlers?|pre-?teens?|teen(?:ager)?s?|adolescents?"
    r"|school ?(?:girl|boy)s?|(?:young|little) (?:girl|boy)s?)"
)
_SEXUAL = (
    r"(?:sexual(?:ly|i[sz]ed?|i[sz]ing)?|sex (?:with|acts?|scenes?)|porn\w*|erotic\w*"
    r"|nudes?|molest\w*|rap(?:e[ds]?|ing)|incest\w*)"
)
_HARM = (
    r"(?:abus(?:e|ing)|exploit(?:ing)?|traffic(?:k|king)|kidnap(?:ping)?|abduct(?:ing)?"
    r"|tortur(?:e|ing))"
)
_CHILD_CRIME = r"(?:abuse|exploitation|grooming|trafficking)"
_FEW_WORDS = r"(?:[^\w.!?]+[\w'’]+){0,8}?[^\w.!?]+"  # never across a sentence end
_CHILD_HARM = re.compile(
    rf"\b(?:csam|csem|csae|pa?edophil\w*)\b"
    rf"|\b{_SEXUAL}{_FEW_WORDS}{_MINOR}\b"
    rf"|\b{_MINOR}(?:['’]s)?{_FEW_WORDS}{_SEXUAL}\b"
    rf"|\b{_HARM}\W+(?:(?:an?|the|my|your|his|her|their|some|small|young|of)\W+){{0,2}}{_MINOR}\b"
    rf"|\b(?:child|minor)[ -]{_CHILD_CRIME}\b",
    re.IGNORECASE,
)
# Teaching and protecting are no harm: taken out of the text before the search.
_PROTECTIVE = re.compile(
    r"\b(?:sex(?:ual)? (?:ed\b|education|health|orientation|reproduction)"
    r"|(?:report|prevent|recogni[sz]e|stop|combat|survive|signs of|laws? (?:on|against))(?:ing|ed)?"
    rf"\W+(?:(?:suspected|possible|online|all|the|of)\W+)*child[ -]{_CHILD_CRIME})",
    re.IGNORECASE,
)

_AGENT = (
    r"(?:sarin|tabun|soman|novichok|mustard gas|nerve (?:gas|agents?)|anthrax|ricin|smallpox"
    r"|botulinum toxin|plutonium|enriched uranium|pathogens?)"
)
_MAKING = (
    r"(?:mak(?:e|ing)|produc\w+|synthesi\w+|acquir\w+|obtain\w*|cultivat\w+|weaponi[sz]\w+"
    r"|releas\w+|dispers\w+|aerosoli[sz]\w+|smuggl\w+)"
)
_CBRN = re.compile(
    r"\b(?:chemical|biological|radiological|radioactive|nuclear|thermonuclear)"
    r"(?:,? (?:and|or) (?:chemical|biological|radiological|nuclear))?[ -]"
    r"(?:weapon\w*|warheads?|bombs?|warfare|attacks?|terror\w*|munitions?)\b"
    r"|\b(?:bio-?weapon\w*|bio-?terror\w*|dirty bombs?|weapons? of mass destruction|wmds?|cbrne?)\b"
    rf"|\b{_MAKING}(?:\W+\w+){{0,4}}?\W+{_AGENT}\b"
    rf"|\b{_AGENT}\W+(?:as a )?(?:weapon|attack)\w*",
    re.IGNORECASE,
)


def denied_text(text: str) -> Kind | None:
    """The kind of deny-listed content that `text` clearly asks about, or None."""
    if _CHILD_HARM.search(_PROTECTIVE.sub(" ", text)):
        return "child_harm"
    return "cbrn" if _CBRN.search(text) else None


def denied_category(source: str, label: str) -> Kind | None:
    """The deny-listed kind of a source's category: its exact string, else its wording."""
    return CATEGORIES.get(source, {}).get(label) or denied_domain(label)


def _vocabulary(words: str) -> frozenset[str]:
    return frozenset(words.split())


_CHILD_WORDS = _vocabulary(
    "child children childrens kid kids minor minors underage underaged infant infants "
    "teen teens teenager teenagers preteen preteens juvenile juveniles"
)
_CHILD_CONTEXT = _vocabulary(
    "harm harms abuse sex sexual sexually content porn pornography erotic exploitation "
    "endangerment grooming trafficking safety protection neglect crime crimes nude nudity "
    "related offense offenses"
)
_CBRN_WORDS = _vocabulary(
    "chemical chemicals biological radiological radioactive nuclear bio chem cbrn cbrne"
)
_CBRN_CONTEXT = _vocabulary(
    "weapon weapons weaponry weaponization warfare agent agents harm harms attack attacks threat "
    "threats terrorism bomb bombs warhead warheads risk risks hazard hazards safety"
)
_SQUASHED: tuple[tuple[str, Kind], ...] = (
    (r"csam|csem|csae|pa?edophil|child(?:ren)?(?:s)?(?:sex|porn|abuse|harm|exploit)", "child_harm"),
    (r"cbrn|bioweapon|bioterror|(?:chemical|biological|nuclear|radiological)weapon", "cbrn"),
    (r"weapons?ofmassdestruction|nerveagent|gainoffunction|dirtybomb", "cbrn"),
)


def denied_domain(name: str) -> Kind | None:
    """The deny-listed kind that a free domain name denotes, or None.

    "child_harm", "csam", "nuclear" and "chemicalWeapons" are; "nuclear_family",
    "chemical_engineering" and "child_development" are not.
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower().replace("'", "")
    words = set(re.findall(r"[a-z]+", spaced))
    squashed = "".join(re.findall(r"[a-z]+", spaced))
    for pattern, kind in _SQUASHED:
        if re.search(pattern, squashed):
            return kind
    if words & _CHILD_WORDS and (words <= _CHILD_WORDS | {"and"} or words & _CHILD_CONTEXT):
        return "child_harm"
    if words & _CBRN_WORDS and (words <= _CBRN_WORDS | {"and", "or"} or words & _CBRN_CONTEXT):
        return "cbrn"
    return None


def check_target(name: str, categories: Sequence[str] = (), source: str = "") -> None:
    """Refuses a deny-listed unlearning target.

    Args:
        name: the target domain's name.
        categories: the source's labels that the target would be harvested from.
        source: the source those labels belong to.

    Raises:
        UserError: the name or one of the categories is deny-listed.
    """
    found = [(f"domain {name!r}", denied_domain(name))]
    found += [(f"category {label!r}", denied_category(source, label)) for label in categories]
    for what, kind in found:
        if kind:
            raise UserError(
                f"target: {what} is deny-listed ({kind}) and can never be unlearned; "
                "choose another target domain"
            )


def screen(rows: Iterable[Row]) -> tuple[list[Row], Counter[str]]:
    """Drops child-harm rows and marks CBRN rows `evaluate_only`.

    Returns:
        The remaining rows, in order, and counts of "child_harm" rows dropped and of "cbrn" rows
        withheld from harvest and retain.
    """
    remaining, counts = [], Counter[str]()
    for row in rows:
        kinds = {denied_domain(row.domain), denied_text(row.prompt)}
        kinds |= {denied_category(row.source, label) for label in row.categories}
        if "child_harm" in kinds:
            counts["child_harm"] += 1
        elif "cbrn" in kinds:
            counts["cbrn"] += 1
            remaining.append(replace(row, evaluate_only=True))
        else:
            remaining.append(row)
    return remaining, counts
