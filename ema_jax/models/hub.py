"""Models by name: a folder or GGUF file on this machine, or an id on the Hugging Face Hub."""

import dataclasses
import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from ema_jax.errors import UserError
from ema_jax.models import checkpoint, gguf_folder
from ema_jax.models.config import DecoderConfig

_WEIGHTS = "*.safetensors"
_SMALL = ["*.json", "*.jinja", "tokenizer*", "merges.txt"]
# Second copies of the weights (Mistral's consolidated file), and all subfolders.
_UNWANTED = ["consolidated*", "*/*"]


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model's checked folder, and where it comes from.

    Attributes:
        given: the folder, GGUF file, package or Hub id that the user named.
        folder: a Hugging Face or Flax checkpoint folder, or that of a GGUF file in the cache.
        revision: the commit of a Hub id; None for a local folder.
        fingerprint: `checkpoint.fingerprint` of the folder.
        weights_fingerprint: `checkpoint.weights_fingerprint` of it.
        token_files: `checkpoint.token_files` of it.
    """

    given: str
    folder: Path
    revision: str | None
    fingerprint: str
    weights_fingerprint: str = ""
    token_files: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def id(self) -> str:
        """The Hub id, or the name of a local folder without its path."""
        return self.given if self.revision else self.folder.name

    @property
    def label(self) -> str:
        """`id@commit` of a Hub id; `name@hash` of a local folder."""
        if self.revision:
            return f"{self.given}@{self.revision}"
        return f"{self.folder.resolve().name}@{self.fingerprint[:12]}"

    @property
    def config(self) -> DecoderConfig:
        """Architecture of the model."""
        return DecoderConfig.from_folder(self.folder)


def find(given: str, revision: str | None = None) -> ModelSource:
    """Resolves a model (`resolve`) and checks its folder without reading the weights.

    Raises:
        UserError: no such model, or a folder that `checkpoint.check` refuses.
    """
    return _checked(given, *resolve(given, revision))


def find_cached(given: str, revision: str | None = None) -> ModelSource | None:
    """`find` without a network: None for a Hub id that is not in the local cache."""
    found = cached(given, revision)
    return None if found is None else _checked(given, *found)


def _checked(given: str, folder: Path, revision: str | None) -> ModelSource:
    checkpoint.check(folder)
    return ModelSource(
        given,
        folder,
        revision,
        checkpoint.fingerprint(folder),
        checkpoint.weights_fingerprint(folder),
        checkpoint.token_files(folder),
    )


def resolve(source: str, revision: str | None = None) -> tuple[Path, str | None]:
    """Folder of a model, downloaded into the Hub's cache unless it is there.

    `HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` act as everywhere.

    Args:
        source: a folder, a GGUF file, `pip:PACKAGE` for the one in an installed package, or a hub
            id such as `Qwen/Qwen2.5-7B-Instruct`.
        revision: a branch, tag or commit of the hub id.

    Returns:
        The folder, and the commit that it is a snapshot of (None for a local folder).

    Raises:
        UserError: no such folder, file or package, or no such model on the Hub.
    """
    folder = Path(os.path.expanduser(source))
    if gguf_folder.is_gguf(source) and not os.path.isdir(folder):
        if revision is not None:
            raise UserError(f"{source}: a file has no revision {revision!r}; leave revision unset")
        return gguf_folder.folder_of(gguf_folder.locate(source)), None
    if os.path.isdir(folder):
        if revision is not None:
            raise UserError(
                f"{source}: a folder has no revision {revision!r}; leave revision unset"
            )
        return folder, None
    if os.path.lexists(folder):
        raise UserError(
            f"{source}: not a folder; name the checkpoint's folder, a GGUF file or a hub id"
        )
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
        # The config first: it shows whether many gigabytes of weights can be used.
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
        # The error's type alone: its text may quote the request, and with it a token.
        raise UserError(
            f"{where}: the download failed ({type(error).__name__}); try again, it resumes where "
            "it stopped"
        ) from None
    return snapshot, snapshot.name


def _refuse_other_weights(where: str, files: list[str]) -> NoReturn:
    suffixes = (".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack")
    other = next((file for file in files if file.endswith(suffixes)), None)
    found = "no weights" if other is None else f"weights such as {other} but none in safetensors"
    raise UserError(f"{where}: {found}; name a model with model.safetensors, or convert it")


def cached(source: str, revision: str | None = None) -> tuple[Path, str | None] | None:
    """`resolve` without a network: None for a Hub id that is not in the local cache."""
    local = gguf_folder.is_gguf(source) or source.startswith(("/", ".", "~"))
    if local or os.path.lexists(Path(os.path.expanduser(source))):
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
