"""Imports run one way, so that a part can be read, tested and changed without what stands on it."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "ema_jax"

# Part → what it may import beside its own modules; `errors` is everybody's.
MAY_IMPORT = {
    "errors": set(),
    "runtime": set(),
    "models": {"runtime"},
    "data": {"models", "runtime"},
    "generation": {"models", "data", "runtime"},
    "concepts": {"generation", "models", "data", "runtime"},
    "refusal": {"generation", "models", "data", "runtime"},
    "unlearning": {"refusal", "generation", "models", "data", "runtime"},
    "report": {"runtime"},
    "plots": {"report", "concepts"},
    "organism": {"unlearning", "refusal", "models", "data", "runtime"},
    "config": {"concepts", "refusal", "unlearning", "generation", "models", "data", "runtime"},
}
EVERYTHING_BELOW = {*MAY_IMPORT}
MAY_IMPORT["study"] = EVERYTHING_BELOW - {"organism"}
MAY_IMPORT["sweep"] = MAY_IMPORT["compile_check"] = {*EVERYTHING_BELOW, "study"}
COMMANDS = {"__main__", "main", "convert", "judge", "lm_eval", "init", "reproduce", "compare"}
COMMANDS |= {"share", "inspect_provider"}
MAY_IMPORT |= {command: {*MAY_IMPORT} for command in COMMANDS}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports() -> dict[str, set[str]]:
    """Module → the project's modules that it imports, wherever in the file."""
    known = modules()
    found: dict[str, set[str]] = {}
    for module, path in known.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {name if name in known else node.module for name in inner}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        found[module] = {name for name in names if name in known} - {module, "ema_jax"}
    return found


def part(module: str) -> str:
    return module.removeprefix("ema_jax.").partition(".")[0]


def test_no_module_stands_on_itself():
    TopologicalSorter(imports()).prepare()  # raises a CycleError that names the circle


def test_arrows_run_one_way():
    wrong = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if module != "ema_jax"
        and part(module) != part(other)
        and part(other) not in MAY_IMPORT[part(module)] | {"errors"}
    ]
    assert not wrong


def test_no_import_hides_in_a_string():
    # `ema_jax.__init__` alone imports by name: its pieces come when they are first used.
    hidden = [
        str(path.relative_to(PACKAGE))
        for path in modules().values()
        if "import_module" in path.read_text() and path != PACKAGE / "__init__.py"
    ]
    assert not hidden
