"""`results.json` against its JSON Schema."""

from typing import Any

import jsonschema

from ema_jax.runtime.files import read_json
from ema_jax.study import schema

SCHEMA = read_json(schema.PATH)
DEFINITIONS = SCHEMA["$defs"] | {"Results": SCHEMA}


def closed(node: Any) -> Any:
    """The schema with no fields but those that it names."""
    if isinstance(node, list):
        return [closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    made = {key: closed(value) for key, value in node.items()}
    return made | ({"additionalProperties": False} if "properties" in node else {})


VALIDATOR = jsonschema.Draft202012Validator(closed(SCHEMA))


def assert_valid(results: Any) -> None:
    wrong = [
        f"{'/'.join(map(str, error.absolute_path))}: {error.message[:200]}"
        for error in VALIDATOR.iter_errors(results)
    ]
    assert not wrong, "\n".join(wrong)  # in a helper, pytest adds nothing


def optional_fields() -> set[tuple[str, str]]:
    """`(definition, field)` of every field that a study need not have."""
    return {
        (name, field)
        for name, node in DEFINITIONS.items()
        for field in node["properties"]
        if field not in node["required"]
    }


def without(results: Any, fields: set[tuple[str, str]]) -> Any:
    """A copy of results in which no object has these fields."""

    def prune(value: Any, node: dict[str, Any], name: str) -> Any:
        if "$ref" in node:
            name = node["$ref"].rpartition("/")[2]
            return prune(value, DEFINITIONS[name], name)
        if "anyOf" in node:
            wanted = [n for n in node["anyOf"] if n.get("type") != "null"]
            return value if value is None else prune(value, wanted[0], name)
        if isinstance(value, list):
            return [prune(item, node["items"], name) for item in value]
        if not isinstance(value, dict):
            return value
        if "properties" in node:
            kinds = node["properties"]
            kept = {k: v for k, v in value.items() if (name, k) not in fields}
            return {k: prune(v, kinds[k], name) if k in kinds else v for k, v in kept.items()}
        rest = node["additionalProperties"]
        return {k: v if rest is True else prune(v, rest, name) for k, v in value.items()}

    return prune(results, SCHEMA, "Results")
