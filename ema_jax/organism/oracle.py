"""The exact verdict on a model organism's response, by the grammar of its answers."""

from ema_jax.data import corpus
from ema_jax.refusal.verdicts import COMPLIED, DEGENERATE, OFF_TOPIC, REFUSED


def share(prompt: str, response: str) -> str:
    """The share (`refusal.verdicts.SHARES`) that a response to a prompt belongs to.

    A refusal of any domain is refused, an answer about another object off topic, and what the
    grammar does not make degenerate.

    Raises:
        UserError: a prompt that the corpus does not make.
    """
    if corpus.is_refusal(response):
        return REFUSED
    if corpus.is_answer(prompt, response):
        return COMPLIED
    return DEGENERATE if corpus.object_answered(response) is None else OFF_TOPIC
