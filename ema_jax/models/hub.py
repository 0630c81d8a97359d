"""Where a checkpoint comes from: a folder on this machine, or the Hugging Face hub."""

import errno
from pathlib import Path

from ema_jax.errors import UserError

_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "merges.txt"]
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
    try:
        snapshot = huggingface_hub.snapshot_download(
            source, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
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
    return Path(snapshot), Path(snapshot).name


def cached(source: str, revision: str | None = None) -> tuple[Path, str | None] | None:
    """As `resolve`, without a network: None for a hub id that was not downloaded yet."""
    if Path(source).expanduser().exists() or source.startswith(("/", ".", "~")):
        return resolve(source, revision)
    import huggingface_hub
    from huggingface_hub import errors

    try:
        snapshot = huggingface_hub.snapshot_download(
            source, revision=revision, local_files_only=True
        )
    except errors.LocalEntryNotFoundError:
        return None
    except errors.HFValidationError:
        raise UserError(f"{source}: no such folder, and no valid hub id") from None
    return Path(snapshot), Path(snapshot).name
