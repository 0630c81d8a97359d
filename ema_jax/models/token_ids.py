"""Token ids against the rows of the embedding.

A gather beyond the last row is clamped by XLA: a model whose tokenizer grew and whose embedding did
not would run, and read another token's row.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ema_jax.errors import UserError
from ema_jax.runtime.files import read_json


def largest_of(ids: Mapping[str, int]) -> tuple[int, str]:
    """The largest id of a vocabulary and its token; -1 of an empty one."""
    token = max(ids, key=ids.__getitem__, default="")
    return ids.get(token, -1), token


def check_folder(folder: str | Path, rows: int) -> None:
    """Refuses a folder whose tokenizer files name ids beyond an embedding's rows.

    Reads `tokenizer.json`, `added_tokens.json` and `tokenizer_config.json`, whichever are there; a
    damaged one is left to whoever needs the tokenizer.

    Raises:
        UserError: an id has no row.
    """
    folder = Path(folder)
    ids: dict[str, Any] = {}
    tokenizer = _read(folder / "tokenizer.json")
    vocabulary = _of(tokenizer.get("model"), "vocab")
    if isinstance(vocabulary, list):  # Unigram: the place is the id
        vocabulary = {str(entry): place for place, entry in enumerate(vocabulary)}
    ids |= vocabulary if isinstance(vocabulary, dict) else {}
    for token in _list(tokenizer.get("added_tokens")):
        ids[str(_of(token, "content"))] = _of(token, "id")
    ids |= _read(folder / "added_tokens.json")
    added = _of(_read(folder / "tokenizer_config.json"), "added_tokens_decoder")
    for place, token in (added if isinstance(added, dict) else {}).items():
        ids[str(_of(token, "content"))] = int(place) if place.isdecimal() else None
    known = {token: place for token, place in ids.items() if isinstance(place, int)}
    check_largest(folder, *largest_of(known), rows)


def check_largest(folder: str | Path, largest: int, token: str, rows: int) -> None:
    """Refuses a tokenizer whose largest id has no row.

    Raises:
        UserError: it has none.
    """
    if largest >= rows:
        raise UserError(
            f"{folder}: the tokenizer's ids reach {largest} ({token!r}) and the embedding has "
            f"{rows} rows; resize it (transformers: resize_token_embeddings) or use the tokenizer "
            "that belongs to the weights"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


def _of(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
