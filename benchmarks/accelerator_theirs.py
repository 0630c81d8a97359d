"""The step and the decoding of accelerator.py in PyTorch: transformers + PEFT, eager."""

import time

import numpy as np
import peft
import torch
import transformers
from accelerator_run import (
    ALPHA,
    LENGTH,
    RANK,
    ROWS,
    TINY_LENGTH,
    TINY_ROWS,
    Run,
    drawn_lengths,
    full_lengths,
    hf_config,
    summary,
)

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BETA = 0.1


def theirs(run: Run) -> None:
    """The first shape of `train`, recomputing and not, full rows and drawn ones; `generate`."""
    device = "cpu" if run.tiny or not torch.cuda.is_available() else "cuda"
    torch.manual_seed(0)
    if run.tiny:
        torch.set_num_threads(
            1
        )  # its threads wait for one another in a loop, on busy cores for long
    model = _model(run, device)
    rows, length = (TINY_ROWS, TINY_LENGTH) if run.tiny else (ROWS, LENGTH)

    def measure(recompute: bool, lengths: str) -> None:
        _step(run, model, device, rows, length, recompute, lengths)

    def generate(rows: int) -> None:
        _generate(run, model, device, rows)

    limit = 5 if run.tiny else 15
    for recompute, lengths in ((False, "full"), (True, "full"), (False, "drawn")):
        run.attempt(measure, recompute, lengths, seconds=limit)
    for count in (4,) if run.tiny else (64, 256):
        run.attempt(generate, count, seconds=limit)


def _model(run: Run, device: str) -> torch.nn.Module:
    """The same architecture with random weights, made on the device, and fresh adapters."""
    settings = dict(hf_config(run.tiny))
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    dtype = torch.float32 if run.tiny else torch.bfloat16
    with torch.device("meta"):
        base = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    base = base.to_empty(device=device)
    # `to_empty` leaves the rotary frequencies, which are no parameters, undefined.
    base.model.rotary_emb = type(base.model.rotary_emb)(config).to(device)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1)
    base.tie_weights()
    adapters = peft.LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=TARGETS
    )
    return peft.get_peft_model(base, adapters).train()


def _step(
    run: Run,
    model: torch.nn.Module,
    device: str,
    rows: tuple[int, int],
    length: int,
    recompute: bool,
    lengths: str,
) -> None:
    """NPO with retain cross-entropy, in four parts, as logits of all rows would be 30 GB."""
    if recompute:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    else:
        model.gradient_checkpointing_disable()
    rule = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    parts, words = 1 if run.tiny else 4, model.config.vocab_size
    sizes = [
        drawn_lengths(n, length, side) if lengths == "drawn" else full_lengths(n, length)
        for side, n in enumerate(rows)
    ]
    # Each part of a side padded to its longest example, as a data collator pads.
    batches = [[_batch(part, words, device) for part in _parts(found, parts)] for found in sizes]

    def log_probs(ids, mask, response):
        # Full rows need no mask, which lets PyTorch choose its fastest attention.
        given = {"attention_mask": mask} if lengths == "drawn" else {}
        # A full row's response is its second half: logits of the first are not made.
        kept = length // 2 + 1 if lengths == "full" else ids.shape[1]
        logits = model(ids, logits_to_keep=kept, **given).logits[:, :-1]
        targets = ids[:, -(kept - 1) :]
        found = logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        return found * response[:, -(kept - 1) :]

    def step() -> None:
        total = sum(response[:, 1:].sum() for _, _, response in batches[1]) / parts
        for forget, retain in zip(*batches, strict=True):
            ratio = log_probs(*forget).sum(-1)
            loss = -2 / BETA * torch.nn.functional.logsigmoid(-BETA * ratio).mean()
            loss = loss - log_probs(*retain).sum() / total
            (loss / parts).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rule.step()
        rule.zero_grad()
        _wait(device)

    found = run.timed(step, 5)
    seconds = float(np.median(found))
    real = sum(map(sum, sizes[0] + sizes[1]))
    padded = sum(ids.numel() for side in batches for ids, _, _ in side)
    run.say(
        recompute=recompute,
        rows=rows,
        length=length,
        lengths=lengths,
        parts=parts,
        fill=round(real / padded, 3),
        **summary(found),
        tokens_per_s=round(padded / seconds),
        real_tokens_per_s=round(real / seconds),
        peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2) if device == "cuda" else None,
    )


def _parts(sizes: list[tuple[int, int]], parts: int) -> list[list[tuple[int, int]]]:
    """The lengths of examples in equal parts."""
    rows = len(sizes) // parts
    return [sizes[i * rows : (i + 1) * rows] for i in range(parts)]


def _batch(
    sizes: list[tuple[int, int]], words: int, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random tokens, real ones and those of responses `[rows, longest]`, padded on the right."""
    length = max(map(sum, sizes))
    at = torch.arange(length, device=device)
    prompts, ends = (
        torch.tensor(column, device=device)[:, None]
        for column in ([p for p, _ in sizes], [p + r for p, r in sizes])
    )
    ids = torch.randint(0, words, (len(sizes), length), device=device)
    return ids, (at < ends).long(), (at >= prompts) & (at < ends)


def _generate(run: Run, model: torch.nn.Module, device: str, rows: int) -> None:
    """The base by `generate`, in one static batch, its prompt pass included."""
    prompt, new = (32, 8) if run.tiny else (128, 48)
    ids = torch.randint(0, model.config.vocab_size, (rows, prompt), device=device)
    model.eval()

    def once(new: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode(), model.disable_adapter():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        _wait(device)
        return time.perf_counter() - start

    once(2)
    seconds = once(new)
    run.say(generate_rows=rows, new_tokens=new, tokens_per_s=round(rows * new / seconds))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
