"""The shipped JSON Schema, and what it takes for a `results.json`."""

import copy

import jsonschema
import pytest
from report_fixtures import example_results
from results_schema import SCHEMA, assert_valid, optional_fields, without

from ema_jax.study import schema

DESIGN = {
    *("schema", "model", "target", "domains", "arms", "ema", "containment", "utility"),
    *("entanglement", "erasure", "forecast", "provenance"),
}


def test_the_shipped_schema_is_the_types():
    # Otherwise: python -m ema_jax.study.schema
    assert schema.PATH.read_text(encoding="utf-8") == schema.json_schema()
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_a_study_is_valid_with_and_without_what_came_later():
    results = example_results()
    assert_valid(results)
    oldest = without(results, optional_fields())
    assert oldest.keys() == set(SCHEMA["required"]) == DESIGN
    assert "shares" not in oldest["arms"]["npo"]["refusal"]["bias"]
    assert_valid(oldest)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema",), 2),
        (("arms", "npo", "refusal", "bias", "rate"), "high"),
        (("arms", "npo", "seeds", "0", "steps"), None),
        (("ema", "npo", "bias", "drop"), [0.1]),
        (("entanglement", "cosine", "bias"), 0.3),
    ],
)
def test_a_wrong_value_is_found(path, value):
    results = copy.deepcopy(example_results())
    *parents, last = path
    place = results
    for key in parents:
        place = place[key]
    place[last] = value
    with pytest.raises(AssertionError, match="/".join(path)):
        assert_valid(results)


def test_others_may_add_fields_and_lack_none_of_the_first_version():
    validator = jsonschema.Draft202012Validator(SCHEMA)
    assert validator.is_valid(example_results() | {"note": "of another tool"})
    for name in SCHEMA["required"]:
        lacking = {k: v for k, v in example_results().items() if k != name}
        assert not validator.is_valid(lacking)
