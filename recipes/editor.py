"""The JSON Schema that gives editors completion and checks while a recipe is typed."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError
from transformers.training_args import OptimizerNames

from unlearn.objectives import OBJECTIVES
from unlearn.recipes.passthrough import argument_types
from unlearn.recipes.schema import Recipe


def schema_for_editors() -> dict[str, Any]:
    """Give the schema of :class:`Recipe` with the names that only torch and transformers know."""
    schema = Recipe.model_json_schema()
    _name_objectives(schema["$defs"]["Term"])
    _name_arguments(schema["$defs"]["TrainingSection"])
    schema["required"].remove("terms")
    schema["anyOf"] = [{"required": ["terms"]}, {"required": ["edit"]}]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "unlearn recipe",
        **{key: value for key, value in schema.items() if key != "title"},
    }


def _name_objectives(term: dict[str, Any]) -> None:
    """List the objectives, and allow each one's own hyperparameters only."""
    properties = term["properties"]
    own = {"pattern": r"\.py:\w+$", "description": "A loss of your own: FILE.py:FUNCTION."}
    properties["objective"]["anyOf"] = [{"enum": sorted(OBJECTIVES)}, own]
    users: dict[str, list[str]] = {}
    for name, objective in OBJECTIVES.items():
        for hyper in objective.hyper:
            users.setdefault(hyper, []).append(name)
    for hyper, names in users.items():
        properties[hyper] = {"description": f"Hyperparameter of {', '.join(names)}."}
    shipped = {"properties": {"objective": {"enum": sorted(OBJECTIVES)}}}
    term["allOf"] = [
        {"if": shipped, "then": {"propertyNames": {"enum": sorted(properties)}}},
        *_own_hyperparameters(users),
    ]


def _own_hyperparameters(users: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    return [
        {
            "if": {"properties": {"objective": {"const": name}}, "required": ["objective"]},
            "then": {"properties": {h: False for h in users if h not in objective.hyper}}
            | ({"required": ["rejected"]} if objective.compares else {}),
        }
        for name, objective in OBJECTIVES.items()
        if set(users) - set(objective.hyper)
    ]


def _name_arguments(training: dict[str, Any]) -> None:
    """List the fields of TrainingArguments that a recipe may pass on."""
    properties = training["properties"]
    properties["optim"]["enum"] = [str(item.value) for item in OptimizerNames]
    properties["optim"].pop("examples", None)
    for name, hint in argument_types().items():
        where = {"description": f"Passed on to transformers.TrainingArguments.{name}."}
        properties.setdefault(name, _type_schema(hint) | where)
    training["additionalProperties"] = False


def _type_schema(hint: Any) -> dict[str, Any]:
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(
            hint, config=ConfigDict(arbitrary_types_allowed=True)
        )
        schema = adapter.json_schema()
    except (PydanticInvalidForJsonSchema, PydanticSchemaGenerationError):
        return {}
    return {} if "$defs" in schema else schema
