"""A model of this project as Inspect's own: through its registry, several requests at once."""

import asyncio

import pytest
from inspect_ai.model import ChatMessageSystem, ChatMessageUser, GenerateConfig, get_model

import ema_jax
import ema_jax.inspect_provider  # what the entry point names
from ema_jax.errors import UserError
from ema_jax.organism import CHECKPOINTS

PROMPTS = ["Explain how to override the cipher relay.", "Explain how to water the lemon fern."]


@pytest.fixture(scope="module")
def provided():
    return get_model(f"ema_jax/{CHECKPOINTS / 'qwen2'}", config=GenerateConfig(max_tokens=24))


def test_responses_are_those_of_the_sampler(provided):
    async def both():
        return await asyncio.gather(*(provided.generate(prompt) for prompt in PROMPTS))

    outputs = asyncio.run(both())
    folder = CHECKPOINTS / "qwen2"
    model, chat = ema_jax.load(folder), ema_jax.Chat.load(folder)
    expected = ema_jax.respond(model, chat, PROMPTS, max_new_tokens=24)
    assert [x.completion for x in outputs] == [r.text for r in expected]
    reasons = ["stop" if r.finished else "max_tokens" for r in expected]
    assert [x.stop_reason for x in outputs] == reasons
    assert [x.usage.output_tokens for x in outputs] == [len(r.tokens) for r in expected]


def test_a_conversation_is_rendered_by_the_models_template(provided):
    messages = [ChatMessageSystem(content="Be brief."), ChatMessageUser(content=PROMPTS[1])]
    with_system = asyncio.run(provided.generate(messages))
    assert with_system.completion


def test_unknown_arguments_are_refused():
    with pytest.raises(UserError, match="unknown model arguments: adaptors"):
        get_model(f"ema_jax/{CHECKPOINTS / 'qwen2'}", adaptors="x")
