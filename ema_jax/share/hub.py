"""Adapters of a study on the Hugging Face Hub: private, on request, never on deny-listed topics."""

from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ema_jax.data import denylist
from ema_jax.data.prompts import read_prompts
from ema_jax.errors import UserError
from ema_jax.models.card import unlearned_card
from ema_jax.study.finished import read_results
from ema_jax.study.manifest import read_manifest

_FILES = ("adapter_config.json", "adapter_model.safetensors")


def push(workdir: Path, arm: str, seed: int, repository: str, *, api: Any = None) -> str:
    """Uploads one run's adapters with their model card to a private repository; returns its URL.

    Only the adapters and their card leave the machine: no prompts, no responses.

    Args:
        workdir: the study's folder.
        arm: the arm's name.
        seed: its seed.
        repository: `USER/NAME`; made, as a private one, if it is not there.
        api: in place of `huggingface_hub.HfApi()`, which takes token and endpoint from the
            environment.

    Raises:
        UserError: no such adapters, a target or a harvest prompt on the deny-list, a public
            repository, or what the Hub refuses.
    """
    folder = workdir / "adapters" / arm / f"seed_{seed}"
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: {missing[0]} is not there; only trained adapters are shared")
    results = read_results(workdir)
    _refuse_denied(workdir, results["target"])
    card = _card(workdir, results, arm, seed)
    operations = [CommitOperationAdd(name, folder / name) for name in _FILES]
    operations.append(CommitOperationAdd("README.md", card.encode()))
    api = HfApi() if api is None else api
    try:
        url = api.create_repo(repository, private=True, exist_ok=True)
        if not api.repo_info(repository).private:
            raise UserError(
                f"--repository: {repository} is public; adapters are shared in private "
                "repositories only: name another one, or make it private first"
            )
        message = f"ema_jax: {results['target']} unlearned, {arm}, seed {seed}"
        api.create_commit(repository, operations, commit_message=message)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(
            f"--repository: {repository}: {line}; HF_TOKEN has to be one that may write there"
        ) from None
    return str(url)


def _card(workdir: Path, results: dict[str, Any], arm: str, seed: int) -> str:
    model = results["model"]
    path = workdir / "stages" / f"unlearn.{arm}.seed_{seed}.json"
    settings = read_manifest(path)["settings"].get("arm")
    if not isinstance(settings, dict):
        raise UserError(f"{path}: does not record the settings of the arm; train it again")
    return unlearned_card(
        base=model["id"],
        revision=model["revision"],
        fingerprint=model.get("fingerprint", "not recorded"),
        target=results["target"],
        arm=arm,
        seed=seed,
        settings=settings,
        quantisation=model.get("quantisation"),
        merged=False,
    )


def _refuse_denied(workdir: Path, target: str) -> None:
    """The study's own check once more: a folder may have been made or changed elsewhere."""
    harvested = [p for p in read_prompts(workdir / "prompts")["harvest"] if p.domain == target]
    for source in {prompt.source for prompt in harvested}:
        categories = sorted({p.category for p in harvested if p.source == source and p.category})
        denylist.check_target(target, categories, source)
    denied = [kind for p in harvested if (kind := denylist.denied_text(p.prompt))]
    if denied:
        raise UserError(
            f"{workdir}: {len(denied)} harvest prompts of {target} are on the deny-list "
            f"({denied[0]}); adapters trained on such prompts are never shared"
        )
    denylist.check_target(target)
