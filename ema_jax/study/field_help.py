"""Help on a study's fields, read from the dataclasses' source: to import them is to import JAX."""

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_PACKAGE = Path(__file__).parents[1]
_SOURCES = (
    *("config.py", "data/prompts.py", "unlearning/config.py", "unlearning/dose.py"),
    "models/lora.py",
)
_ENTRY = re.compile(r"^    (\w+): (.*(?:\n {8}.*)*)", re.M)


class FieldHelp(NamedTuple):
    """A field as the command line writes it, the source of its default, and what it means."""

    name: str
    default: str
    meaning: str


def text() -> str:
    """Every field with its default and meaning, for `--help`."""
    shown = [
        "Fields of the study: --config.FIELD=VALUE, as in --config.seeds=0,1,2 or, for one arm "
        "alone, --config.arms.npo.beta=0.2 (every field of unlearn may follow an arm's name).",
        "",
    ]
    for field in fields():
        default = textwrap.shorten(field.default, 60, placeholder=" …")
        shown.append(f"  --config.{field.name}={default}")
        shown += textwrap.wrap(field.meaning, 96, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(shown)


def fields() -> list[FieldHelp]:
    """All fields of `StudyConfig`, those of nested configs after the dot."""
    classes = {}
    for source in _SOURCES:
        for node in ast.parse((_PACKAGE / source).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                classes[node.name] = node
    return list(_fields(classes, "StudyConfig", ""))


def _fields(classes: dict[str, ast.ClassDef], kind: str, prefix: str) -> Iterator[FieldHelp]:
    doc = ast.get_docstring(classes[kind]) or ""
    meanings = {name: " ".join(text.split()) for name, text in _ENTRY.findall(doc)}
    for node in classes[kind].body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        name, hint = node.target.id, ast.unparse(node.annotation)
        if hint in classes:
            yield from _fields(classes, hint, f"{prefix}{name}.")
        else:
            default = ast.unparse(node.value) if node.value else ""
            factory = re.search(r"default_factory=(?:lambda: )?(.*?)(?:, hash=False)?\)$", default)
            shown = {"dict": "{}"}.get(factory[1], factory[1]) if factory else default
            yield FieldHelp(f"{prefix}{name}", _literal(shown), meanings.get(name, ""))


def _literal(source: str) -> str:
    """A default as a user would write it; one that is computed is left to its meaning."""
    try:
        return str(ast.literal_eval(source))
    except ValueError:
        return "…"
