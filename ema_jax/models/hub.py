"""Where a checkpoint comes from: a folder on this machine, or the Hugging Face hub."""

import errno
from pathlib import Path
from typing import NoReturn

from ema_jax.errors import UserError
from ema_jax.models.config import DecoderConfig

_WEIGHTS = "*.safetensors"
_SMALL = ["*.json", "*.jinja", "tokenizer*", "merges.txt"]
# Second copies of the weights (Mistral's consolidated file) and everything in subfolders.
_UNWANTED = ["consolidated*", "*/*"]


def resolve(source: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder of a checkpoint, downloaded into the hub's cache if it is not there yet.

    `HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` act as everywhere.

    Args:
        source: a folder, or a hub id such as `Qwen/Qwen2.5-7B-Instruct`.
        revision: a branch, tag or commit of the hub id.

    Returns:
        The folder, and the commit it is a snapshot of (None for a folder of one's own).

    Raises:
        UserError: no such folder, or the hub does not give the checkpoint.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UserError(
                f"{source}: a folder has no revision {revision!r}; leave revision unset"
            )
        return folder, None
    if folder.exists():
        raise UserError(f"{source}: not a folder; name the checkpoint's folder or a hub id")
    if source.startswith(("/", ".", "~")) or source.count("/") != 1:
        raise UserError(f"{source}: no such folder, and no hub id (those read OWNER/NAME)")

    import huggingface_hub
    from huggingface_hub import errors

    where = source if revision is None else f"{source} at revision {revision!r}"

    def download(wanted: list[str], commit: str | None) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                source, revision=commit, allow_patterns=wanted, ignore_patterns=_UNWANTED
            )
        )

    try:
        # What says whether the weights can be used comes before many gigabytes of them.
        snapshot = download(_SMALL, revision)
        DecoderConfig.from_folder(snapshot)
        snapshot = download([*_SMALL, _WEIGHTS], snapshot.name)
        if not any(snapshot.glob(_WEIGHTS)):
            _refuse_other_weights(where, huggingface_hub.list_repo_files(source, revision=revision))
    except errors.GatedRepoError:
        raise UserError(
            f"{where}: a gated model; accept its terms at huggingface.co/{source}, then set "
            "HF_TOKEN or run `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{where}: no such folder, nor such a model on the hub (if private, set HF_TOKEN)"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{where}: the model has no such revision; name a branch or commit"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"{where}: no such folder, and the hub cannot be reached (or HF_HUB_OFFLINE is set) to "
            "download it; download it where there is a network and copy the folder or HF_HOME"
        ) from None
    except errors.HFValidationError:
        raise UserError(f"{source}: no such folder, and no valid hub id") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        # Only the kind of the error: its text may quote the request.
        raise UserError(
            f"{where}: the download failed ({type(error).__name__}); try again, it goes on where "
            "it stopped"
        ) from None
    return snapshot, snapshot.name


def _refuse_other_weights(where: str, files: list[str]) -> NoReturn:
    suffixes = (".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack")
    other = next((file for file in files if file.endswith(suffixes)), None)
    found = "no weights" if other is None else f"weights such as {other} but none in safetensors"
    raise UserError(f"{where}: {found}; name a model with model.safetensors, or convert it")


def cached(source: str, revision: str | None = None) -> tuple[Path, str | None] | None:
    """As `resolve`, without a network: None for a hub id that was not downloaded yet."""
    if Path(source).expanduser().exists() or source.startswith(("/", ".", "~")):
        return resolve(source, revision)
    import huggingface_hub
    from huggingface_hub import errors

    try:
        snapshot = huggingface_hub.snapshot_download(
            source,
            revision=revision,
            allow_patterns=[*_SMALL, _WEIGHTS],  # files that were never wanted are not missed
            ignore_patterns=_UNWANTED,
            local_files_only=True,
        )
    except errors.LocalEntryNotFoundError:
        return None
    except errors.HFValidationError:
        raise UserError(f"{source}: no such folder, and no valid hub id") from None
    return Path(snapshot), Path(snapshot).name
