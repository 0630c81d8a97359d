"""The version of the rules that decide verdicts, recorded in every study, is tied to their code."""

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

from ema_jax.refusal.verdicts import RULES_VERSION

RULES = Path(__file__).parents[2] / "ema_jax/refusal"
FILES = (
    "lexical_weights.json",
    "lexical.py",
    "phrases.py",
    "sentences.py",
    "thoughts.py",
    "validity.py",
    "relevance.py",
    "answer_screen.py",
)
VERSION, DIGEST = 4, "2d6a2a8843412d8b"


def code(path: Path) -> str:
    """A file without what cannot change a verdict: comments, docstrings, layout, a table's card."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.dumps(json.loads(text)["weights"])
    return repr(_plain(ast.parse(text)))


def _plain(node: Any) -> Any:
    # Not `ast.dump`, whose text is another one in each version of Python.
    if isinstance(node, ast.AST):
        fields = ((name, _plain(value)) for name, value in ast.iter_fields(node))
        return type(node).__name__, [x for x in fields if x[1] not in (None, [])]
    return [_plain(x) for x in node if not _is_text(x)] if isinstance(node, list) else node


def _is_text(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def digest() -> str:
    sums = [hashlib.sha256(code(RULES / name).encode()).hexdigest() for name in FILES]
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()[:16]


def test_rules_do_not_change_under_the_same_version():
    found = digest()
    assert (RULES_VERSION, found) == (VERSION, DIGEST), (
        "the rules from a response to its verdict are not those recorded here: if verdicts can "
        f'change, raise RULES_VERSION and record it with the new DIGEST = "{found}"; record the '
        "digest alone if they cannot"
    )


def test_comments_and_docstrings_are_no_rules(tmp_path):
    path = tmp_path / "rules.py"
    path.write_text('"""One."""\nLIMIT = 3  # why\n"""Of words."""\n\ndef f():\n    """Two."""\n')
    before = code(path)
    path.write_text('"""Other."""\nLIMIT = 3\n\n\ndef f():\n    """Another."""\n')
    assert code(path) == before
    path.write_text('"""One."""\nLIMIT = 4\ndef f():\n    """Two."""\n')
    assert code(path) != before
