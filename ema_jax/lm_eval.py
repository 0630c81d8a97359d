"""Tasks of lm-evaluation-harness on this package's decoder.

python -m ema_jax.lm_eval run --model=ema_jax --model_args=source=CHECKPOINT --tasks=hellaswag

The arguments are those of lm_eval (`pip install -e '.[eval]'` in a clone); `--model_args` are the
parameters of `Scorer.load` and `Scorer`, such as `adapter=FOLDER` for a PEFT adapter. As a library,
`Scorer` serves the three request types of lm_eval, and `register` adds it to lm_eval's models.
Contexts are scored verbatim, with the special tokens that lm_eval's own `hf` models give them:
those that the tokenizer adds by default, and before an empty context or a rolling score the BOS
token (the EOS token where there is none). `--apply_chat_template` renders them with the
checkpoint's template, by default without a system turn and without thinking, as in a study.
"""

import dataclasses
import functools
import operator
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ema_jax.data.batching import Batch, map_batches, pad_examples
from ema_jax.data.chat import Chat, TokenExample, first_line
from ema_jax.errors import RunStoppedError, UserError
from ema_jax.generation.sampler import Sampling, generate
from ema_jax.models import checkpoint, hub, lora
from ema_jax.models.decoder import Decoder
from ema_jax.models.sharding import make_mesh
from ema_jax.runtime import cli
from ema_jax.unlearning.log_probs import map_chunks

NAME = "ema_jax"
_CHUNK = 32
_BATCH_SIZE = 16
_DTYPES = ("float32", "bfloat16", "float16")
# Parts of lm_eval that read what the user gives.
_READ_INPUT = ("_cli", "config", "tasks", f"api{os.sep}registry")
_HARNESS = tuple(f"{os.sep}lm_eval{os.sep}{part}" for part in _READ_INPUT)
# Generation settings of a request, besides its length and stop strings.
_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")


@functools.partial(jax.jit, static_argnames="graph")
def _scores(
    graph: nnx.GraphDef, state: nnx.State, batch: Batch
) -> tuple[Float[Array, "B"], Bool[Array, "B"]]:
    """Log-probability of every response, and whether it is the greedy one."""
    model = nnx.merge(graph, state)

    def chunk(
        hidden: Float[Array, "B C D"], targets: Int[Array, "B C"], response: Bool[Array, "B C"]
    ) -> tuple[Float[Array, "B"], Bool[Array, "B"]]:
        log_probs = jax.nn.log_softmax(model.logits(hidden))
        chosen = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
        greedy = jnp.argmax(log_probs, axis=-1) == targets
        return jnp.sum(jnp.where(response, chosen, 0.0), 1), jnp.all(greedy | ~response, 1)

    hidden = model(batch.tokens, batch.mask, right_padded=True).hidden[:, :-1]
    arrays = (hidden, batch.tokens[:, 1:], batch.response[:, 1:])
    sums, greedy = map_chunks(chunk, model.config.vocab_size, *arrays, longest=_CHUNK)
    return jnp.sum(sums, 0), jnp.all(greedy, 0)


@dataclasses.dataclass(frozen=True)
class _Text(Chat):
    """Tokenizer of verbatim text without a template, by the rules of lm_eval's `hf` models.

    Attributes:
        add_bos: whether texts begin with BOS; None leaves special tokens to the tokenizer.
        longest: the number of tokens that prompts are cut to, from their end.
    """

    add_bos: bool | None = None
    longest: int = 0

    @property
    def prefix_id(self) -> int:
        """What stands before a text that nothing stands before: BOS, or EOS without one."""
        bos = self.tokenizer.bos_token_id
        return self.eos_ids[0] if bos is None else bos

    def verbatim(self, text: str) -> tuple[int, ...]:
        """Token ids with special tokens, unless the text opens with them (a rendered prompt)."""
        if text.startswith(self.tokenizer.decode([self.prefix_id])):
            return self._encode(text)
        if self.add_bos is None:
            return tuple(self.tokenizer(text)["input_ids"])
        bos = self.tokenizer.bos_token_id
        return (
            (bos, *self._encode(text)) if self.add_bos and bos is not None else self._encode(text)
        )

    def prompt_tokens(self, prompt: str) -> tuple[int, ...]:
        """Token ids of the end of the text; at least one."""
        return self.verbatim(prompt)[-self.longest :] or (self.prefix_id,)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens, its leading whitespace included."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)


class Scorer:
    """Serves lm_eval's requests, objects that hold their arguments in `args`.

    Args:
        model: with or without adapters.
        chat: its tokenizer and template.
        batch_size: rows per batch.
        max_length: most tokens of context and continuation, by default the model's own limit but
            at most 2048; longer ones are cut at the start.
        max_gen_toks: most tokens of a response, for tasks that set no limit.
        add_bos_token: whether texts begin with BOS; by default as the tokenizer has it.
    """

    def __init__(
        self,
        model: Decoder,
        chat: Chat,
        *,
        batch_size: int = _BATCH_SIZE,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
    ):
        super().__init__()  # lm_eval's, in `register`
        self._model, self._chat, self._batch_size = model, chat, batch_size
        self._mesh = make_mesh((1, -1, 1))
        self._max_length = max_length or min(model.config.max_positions, 2048)
        self._max_gen_toks = max_gen_toks
        self._text = _Text(chat.tokenizer, chat.eos_ids, add_bos=add_bos_token)

    @classmethod
    def load(
        cls,
        source: str,
        adapter: str | None = None,
        revision: str | None = None,
        dtype: str | None = None,
        system_prompt: str | None = None,
        enable_thinking: bool | str = False,
        add_bos_token: bool | str | None = None,
        **options: int | str,
    ) -> "Scorer":
        """Loads a model by name (`hub.resolve`).

        Values may be text, as in `--model_args`.

        Args:
            source: a checkpoint folder, a GGUF file, `pip:PACKAGE` or a Hub id.
            adapter: folder of a PEFT adapter to attach.
            revision: branch, tag or commit of a Hub id.
            dtype: of the parameters; by default bfloat16 on accelerators, float32 on a CPU.
            system_prompt: of rendered conversations; by default none.
            enable_thinking: whether a model with that choice (Qwen3) thinks before it answers.
            add_bos_token: whether texts begin with BOS; by default as the tokenizer has it.
            **options: `batch_size`, `max_length` and `max_gen_toks` of the class, and
                `max_batch_size`; a batch size of `auto` (or `auto:N`) is the default one.

        Raises:
            UserError: a model or adapter that cannot be loaded, a template without the choice to
                think, or an option that is unknown or has an impossible value.
        """
        thinking = _truth("enable_thinking", enable_thinking)
        bos = None if add_bos_token is None else _truth("add_bos_token", add_bos_token)
        sizes = _sizes(options)
        if dtype not in (None, "auto", *_DTYPES):
            raise UserError(f"dtype = {dtype!r}: expected one of {', '.join(_DTYPES)}")
        folder, _ = hub.resolve(source, revision)
        chat = Chat.load(folder, system_prompt, thinking)
        # "auto" is lm_eval's word for what the checkpoint stores.
        held = checkpoint.stored_dtype(folder).name if dtype == "auto" else dtype
        model = checkpoint.load(folder, mesh=make_mesh((1, -1, 1)), dtype=held)
        if adapter is not None:
            model = lora.load_peft(model, adapter)
        return cls(model, chat, add_bos_token=bos, **sizes)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For `(context, continuation)`: log-probability in nats, and whether it is greedy."""
        return self._score([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """For `(text,)`: log-probability in nats of all its tokens, the first one included.

        Each token is predicted once, in windows of `max_length`; the last window starts as early
        as it can (lm_eval's `get_rolling_token_windows` with one token of context).
        """
        windows = [
            list(self._windows(self._text.verbatim(request.args[0]))) for request in requests
        ]
        scores = iter(self._score([window for text in windows for window in text]))
        return [sum(next(scores)[0] for _ in text) for text in windows]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """For `(context, settings)`: the response up to the first stop string."""
        result = [""] * len(requests)
        groups: dict[tuple[int, Sampling], list[int]] = {}
        for i, request in enumerate(requests):
            settings = request.args[1]
            groups.setdefault((self._cap(settings), _sampling(settings)), []).append(i)
        for (cap, sampling), members in groups.items():
            longest = max(self._max_length - cap, 1)
            text = dataclasses.replace(self._text, longest=longest)
            for i, response in generate(
                self._model,
                text,
                [requests[i].args[0] for i in members],
                max_new_tokens=cap,
                batch_size=self._batch_size,
                sampling=sampling,
                mesh=self._mesh,
            ):
                stops = requests[members[i]].args[1].get("until") or []
                text_until = response.text
                for stop in filter(None, [stops] if isinstance(stops, str) else stops):
                    text_until = text_until.partition(stop)[0]
                result[members[i]] = text_until
        return result

    @property
    def tokenizer_name(self) -> str:
        """Identifies the chat template in lm_eval's cache of rendered requests."""
        return f"{NAME}_{self._chat.template_hash}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The chat template, for lm_eval's records."""
        return self._chat.template if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation, rendered with the chat template."""
        return self._chat.conversation(chat_history, add_generation_prompt)

    def _pair(self, context: str, continuation: str) -> TokenExample:
        # As in lm_eval's own models: trailing whitespace belongs to the continuation.
        blanks = len(context) - len(context.rstrip())
        if blanks:
            context, continuation = context[:-blanks], context[-blanks:] + continuation
        if not context:
            prefix, after = self._text.prefix_id, self._text.tokens(continuation)
            # A continuation that brings the prefix itself does not get another.
            return self._cut((prefix,), after[1:] if after[:1] == (prefix,) else after)
        whole, before = (self._text.verbatim(text) for text in (context + continuation, context))
        return self._cut(whole[: len(before)], whole[len(before) :])

    def _cut(self, before: Sequence[int], after: Sequence[int]) -> TokenExample:
        """Keeps `max_length` tokens of input, and the one predicted after them."""
        after = tuple(after[-self._max_length :])
        return TokenExample(tuple(before[-(self._max_length + 1 - len(after)) :]), after)

    def _windows(self, tokens: Sequence[int]) -> Iterator[TokenExample]:
        whole, size = (self._text.prefix_id, *tokens), self._max_length
        for start in range(0, len(tokens), size):
            end = min(start + size, len(tokens))
            yield TokenExample(whole[max(0, end - size) : start + 1], whole[start + 1 : end + 1])

    def _score(self, examples: Sequence[TokenExample]) -> list[tuple[float, bool]]:
        result: list[tuple[float, bool]] = [(0.0, True)] * len(examples)
        graph, state = nnx.split(self._model)
        for indices, found in map_batches(
            lambda batch: _scores(graph, state, batch),
            examples,
            functools.partial(pad_examples, pad_id=self._chat.pad_id),
            batch_size=self._batch_size,
            mesh=self._mesh,
            length=operator.attrgetter("size"),
        ):
            for i, total, same in zip(indices, *found, strict=True):
                result[i] = float(total), bool(same)
        return result

    def _cap(self, settings: Mapping[str, Any]) -> int:
        return int(settings.get("max_gen_toks") or self._max_gen_toks)


def _truth(name: str, value: bool | str) -> bool:
    text = str(value).lower()
    if text not in ("true", "false"):
        raise UserError(f"{name} = {value!r}: expected true or false")
    return text == "true"


def _sizes(options: Mapping[str, int | str]) -> dict[str, int]:
    """The whole numbers among `Scorer`'s options."""
    found: dict[str, int] = {}
    for name, value in options.items():
        if name not in ("batch_size", "max_batch_size", "max_length", "max_gen_toks"):
            raise UserError(f"{name}: no option of a model; see Scorer.load for those that are")
        if name == "batch_size" and str(value).partition(":")[0] == "auto":
            value = _BATCH_SIZE
        if not str(value).isdecimal() or not int(value):
            raise UserError(f"{name} = {value!r}: expected a whole number above 0")
        found[name] = int(value)
    if (most := found.pop("max_batch_size", None)) is not None:
        found["batch_size"] = min(found.get("batch_size", _BATCH_SIZE), most)
    return found


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    given = {name: settings[name] for name in _SAMPLING if settings.get(name) is not None}
    if not settings.get("do_sample", given.get("temperature", 0) > 0):
        given["temperature"] = 0.0
    elif "temperature" not in given:
        given["temperature"] = 1.0
    return Sampling(**given)


def register() -> type:
    """Adds `ema_jax` to lm_eval's models and returns the class.

    Raises:
        UserError: lm_eval is not installed.
    """
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError:
        raise UserError("lm_eval is not installed; pip install 'lm-eval>=0.4.9'") from None

    class Model(Scorer, LM):
        """`Scorer` with lm_eval's interface."""

        @classmethod
        def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> Any:
            """Loads a model from parsed `--model_args`."""
            given = {**(additional_config or {}), **arg_dict}
            if not given.get("source"):
                raise UserError("--model_args: source=CHECKPOINT is missing")
            return cls.load(**{k: v for k, v in given.items() if v is not None and k != "device"})

        @classmethod
        def create_from_arg_string(
            cls, arg_string: str, additional_config: dict | None = None
        ) -> Any:
            """Loads a model from `--model_args` as one string."""
            parts = [part.partition("=") for part in arg_string.split(",") if part]
            if wrong := next((name for name, equals, _ in parts if not equals), None):
                raise UserError(f"--model_args: {wrong!r} is no NAME=VALUE")
            given = {name: value for name, _, value in parts}
            return cls.create_from_arg_obj(given, additional_config)

    return register_model(NAME)(Model)


def main() -> None:
    """Runs lm_eval's own command; errors and signals end it with a line and the project's codes."""
    cli.quiet_libtpu()
    with cli.exit_codes("no results are written; lm_eval's --use_cache keeps answers for the next"):
        register()
        from lm_eval.__main__ import cli_evaluate

        try:
            cli_evaluate()
        except (UserError, RunStoppedError):
            raise
        except Exception as error:
            # lm_eval reports a bad argument, task or config as an exception of some built-in type.
            frames = traceback.extract_tb(error.__traceback__)
            if not any(name in frames[-1].filename for name in _HARNESS):
                raise
            cli.exit_with("error", f"lm_eval: {first_line(error)}", UserError.exit_code)


if __name__ == "__main__":
    main()
