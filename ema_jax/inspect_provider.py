"""The model provider `ema_jax` of Inspect: `inspect eval TASK --model ema_jax/DIR`.

Found by Inspect through the entry point of this package. Responses that Inspect asks for at the
same time are generated together.
"""

import asyncio
from pathlib import Path
from typing import Any, NamedTuple

from inspect_ai.model import (
    ChatMessage,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)

from ema_jax.data.chat import Chat
from ema_jax.errors import UserError
from ema_jax.generation.sampler import Response, Sampling, respond
from ema_jax.models import checkpoint, hub, lora

_GATHER_SECONDS = 0.1  # requests that come within it share a batch


class _Rendered(Chat):
    """A chat whose prompts are rendered already."""

    def render(self, prompt: str, response: str | None = None) -> str:
        """The prompt as it is."""
        return prompt


class _Request(NamedTuple):
    text: str
    max_new_tokens: int
    sampling: Sampling
    answer: "asyncio.Future[Response]"


class EmaJaxModel(ModelAPI):
    """A checkpoint folder, GGUF file or Hub id, with or without adapters."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        adapters: str | None = None,
        batch_size: int = 64,
        **unknown: Any,
    ):
        """Loads the model.

        Args:
            model_name: what `model.source` of a study takes.
            base_url, api_key: of remote providers; not used.
            config: Inspect's generation settings.
            adapters: a folder of PEFT adapters (`-M adapters=DIR`).
            batch_size: rows decoded at once.
            unknown: refused.
        """
        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        if unknown:
            raise UserError(f"ema_jax: unknown model arguments: {', '.join(unknown)}")
        source = hub.find(model_name)
        self._template = Chat.load(source.folder)
        self._chat = _Rendered.load(source.folder)
        model = checkpoint.load(source.folder)
        self._model = model if adapters is None else lora.load_peft(model, Path(adapters))
        self._batch_size = batch_size
        self._waiting: list[_Request] = []
        self._serving: asyncio.Task | None = None

    def max_connections(self) -> int:
        """Requests at once: as many as are decoded together."""
        return self._batch_size

    async def generate(
        self, input: list[ChatMessage], tools: Any, tool_choice: Any, config: GenerateConfig
    ) -> ModelOutput:
        """The response to a conversation; tools are refused."""
        if tools:
            raise UserError("ema_jax: models of this project call no tools")
        messages = [{"role": m.role, "content": m.text} for m in input]
        request = _Request(
            self._template.conversation(messages, opened=True),
            config.max_tokens or 256,
            Sampling(
                temperature=config.temperature or 0.0,
                top_k=config.top_k or 0,
                top_p=1.0 if config.top_p is None else config.top_p,
                seed=config.seed or 0,
            ),
            asyncio.get_running_loop().create_future(),
        )
        self._waiting.append(request)
        if self._serving is None or self._serving.done():
            self._serving = asyncio.create_task(self._serve())
        response = await request.answer
        reason: Any = "stop" if response.finished else "max_tokens"
        output = ModelOutput.from_content(self.model_name, response.text, stop_reason=reason)
        output.usage = ModelUsage(output_tokens=len(response.tokens))
        return output

    async def _serve(self) -> None:
        """Generates what waits, in batches of equal settings, until nothing does."""
        while self._waiting:
            await asyncio.sleep(_GATHER_SECONDS)
            first = self._waiting[0]
            same = [r for r in self._waiting if r[1:3] == first[1:3]]
            self._waiting = [r for r in self._waiting if r not in same]
            try:
                responses = await asyncio.to_thread(self._respond, same)
            except Exception as error:
                for request in same:
                    request.answer.set_exception(error)
                continue
            for request, response in zip(same, responses, strict=True):
                request.answer.set_result(response)

    def _respond(self, requests: list[_Request]) -> list[Response]:
        return respond(
            self._model,
            self._chat,
            [request.text for request in requests],
            max_new_tokens=requests[0].max_new_tokens,
            batch_size=self._batch_size,
            sampling=requests[0].sampling,
        )


@modelapi(name="ema_jax")
def ema_jax() -> type[ModelAPI]:
    """The provider, as Inspect's registry asks for it."""
    return EmaJaxModel
