import re
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from unlearn.errors import UserError
from unlearn.recipes import files
from unlearn.recipes.mistakes import find_mistakes
from unlearn.recipes.schema import Recipe, Scheduler

NPO = {"method": "npo", "terms": [{"objective": "npo", "on": "forget"}]}
RETAIN = {"objective": "nll", "on": "retain"}


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate(NPO | sections)


def test_the_defaults_are_open_unlearnings_tofu_settings():
    training = recipe().training
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert (batch, training.learning_rate, training.num_train_epochs) == (32, 1e-5, 10)
    assert (training.warmup_epochs, training.weight_decay) == (1, 0.01)
    assert training.lr_scheduler_type == "linear"


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        recipe().seed = 3
    with pytest.raises(ValidationError, match="frozen"):
        recipe().training.learning_rate = 1.0


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "dtype", "float16"),
        ("model", "lora", {"rank": 0}),
        ("model", "lora", {"targets": []}),
        ("model", "quantize", "nf4"),
        ("data", "max_length", 1),
        ("data", "max_length", "512"),
        ("data", "template", "Question:"),
        ("data", "forget", ""),
        ("training", "learning_rate", 0),
        ("training", "learning_rate", float("nan")),
        ("training", "learning_rate", float("inf")),
        ("training", "learning_rate", True),
        ("training", "max_steps", 0),
        ("training", "gradient_accumulation_steps", 0),
        ("training", "gradient_checkpointing", 1),
        ("training", "weight_decay", -0.1),
        ("training", "save_total_limit", 0),
        ("evals", "every", 0),
        ("evals", "max_rows", 0),
        ("evals", "max_row", 1),
    ],
)
def test_values_out_of_bounds_are_refused_at_their_key(section, key, value):
    mistakes = find_mistakes(NPO | {section: {key: value}})
    assert len(mistakes) == 1
    assert mistakes[0].key.startswith(f"{section}.{key}")


def test_a_weight_may_be_zero_but_not_negative():
    term = {"objective": "npo", "on": "forget", "weight": 0}
    assert recipe(terms=[term]).terms[0].weight == 0
    message = "terms.0.weight: -1 given; must be at least 0"
    assert message in map(str, find_mistakes(NPO | {"terms": [term | {"weight": -1}]}))


def test_quantized_weights_need_adapters():
    mistake = str(find_mistakes(NPO | {"model": {"quantize": "nf4"}})[0])
    assert mistake.startswith("model.quantize: 'nf4' given without lora")
    assert recipe(model={"quantize": "nf4", "lora": {}}).model.quantize == "nf4"


def test_lora_targets_are_a_word_or_a_list():
    assert recipe(model={"lora": {}}).model.lora.targets == "all-linear"
    assert recipe(model={"lora": {"targets": ["q_proj"]}}).model.lora.targets == ("q_proj",)
    mistakes = find_mistakes(NPO | {"model": {"lora": {"targets": 5}}})
    assert list(map(str, mistakes)) == ["model.lora.targets: 5 given; must be all-linear or a list"]


def test_some_term_must_forget():
    for terms in ([], [RETAIN]):
        assert "no term is on forget" in str(find_mistakes(NPO | {"terms": terms})[0])


def test_hyperparameters_are_the_other_keys_of_a_term():
    term = recipe(terms=[{"objective": "npo", "on": "forget", "beta": 0.5}]).terms[0]
    assert term.hyper == {"beta": 0.5}
    assert recipe().terms[0].hyper == {}


def test_a_run_names_everything_it_lacks_at_once():
    with pytest.raises(UserError) as caught:
        recipe(terms=[*NPO["terms"], RETAIN]).require_runnable()
    for words in ("model.path", "--forget", "--retain", "term 'nll' is on retain", "--out"):
        assert words in caught.value.message


def test_a_retain_source_is_needed_only_by_a_retain_term():
    given = {"model": {"path": "m"}, "data": {"forget": "f.jsonl"}, "out": "runs/a"}
    recipe(**given).require_runnable()
    with_retain = recipe(**given, terms=[*NPO["terms"], RETAIN])
    assert [line.split()[0] for line in with_retain.missing()] == ["data.retain"]


def test_other_training_arguments_pass_through():
    training = recipe(training={"adam_beta2": 0.95, "lr_scheduler_kwargs": {"a": 1}}).training
    assert training.extras == {"adam_beta2": 0.95, "lr_scheduler_kwargs": {"a": 1}}
    assert training.model_dump()["adam_beta2"] == 0.95


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("output_dir", "`out`"),
        ("data_seed", "`seed`"),
        ("fp16", "`model.dtype`"),
        ("warmup_ratio", "`training.warmup_epochs`"),
        ("save_strategy", "`training.save_steps`"),
        ("eval_strategy", "`evals.every`"),
        ("report_to", "events.jsonl"),
        ("remove_unused_columns", "`data`"),
        ("resume_from_checkpoint", "`unlearn resume RUN`"),
    ],
)
def test_what_the_pipeline_owns_is_refused_with_what_to_do(key, instead):
    (mistake,) = find_mistakes(NPO | {"training": {key: 1}})
    assert mistake.key == f"training.{key}"
    assert instead in mistake.message
    with pytest.raises(ValidationError, match=re.escape(instead)):
        recipe(training={key: 1})


def test_an_argument_of_the_wrong_type_or_name_is_refused():
    training = {"adam_beta1": "x", "adam_bta2": 0.9, "lr": 1e-4}
    assert sorted(map(str, find_mistakes(NPO | {"training": training}))) == [
        "training.adam_beta1: 'x' given; must be a number",
        "training.adam_bta2: unknown key; did you mean 'training.adam_beta2'?",
        "training.lr: unknown key; did you mean 'training.learning_rate'?",
    ]


def test_what_the_pipeline_owns_never_hides_a_declared_key():
    from unlearn.recipes.passthrough import OWNED
    from unlearn.recipes.schema import TrainingSection

    assert not set(OWNED) & set(TrainingSection.model_fields)


def test_declared_training_keys_exist_in_transformers():
    from transformers import SchedulerType

    from unlearn.recipes.passthrough import KNOWN_OPTIMIZERS, argument_types, check_optimizer
    from unlearn.recipes.schema import TrainingSection

    ours = {"warmup_epochs", "reference", "trainable", "global_batch_size", "collapse", "prune"}
    ours.add("passes")
    assert set(TrainingSection.model_fields) - ours <= set(argument_types())
    assert set(Scheduler.__args__) <= {item.value for item in SchedulerType}
    from transformers.training_args import OptimizerNames

    assert set(KNOWN_OPTIMIZERS) <= {item.value for item in OptimizerNames}
    assert check_optimizer("lion_32bit") == "lion_32bit"
    with pytest.raises(ValueError, match="did you mean 'adamw_torch'"):
        check_optimizer("adamw_trch")


def test_every_key_explains_itself_to_editors():
    schema = files.json_schema()
    for section in (schema, *schema["$defs"].values()):
        for name, key in section["properties"].items():
            if "$ref" not in key:
                assert key.get("description"), name


def test_the_json_schema_accepts_every_shipped_recipe():
    schema = files.json_schema()
    for name in files.recipe_names():
        assert list(problems(schema, schema, files.read(files.find(name)))) == [], name
        resolved = files.load(name).model_dump(mode="json")
        assert list(problems(schema, schema, resolved)) == [], name


@pytest.mark.parametrize(
    "change",
    [
        {"modle": {}},
        {"training": {"lr": 1}},
        {"training": {"learning_rate": 0}},
        {"training": {"report_to": "none"}},
        {"terms": [{"objective": "npoo", "on": "forget"}]},
        {"terms": [{"objective": "nll", "on": "forget", "beta": 1}]},
        {"terms": [{"objective": "nll", "on": "forget", "wieght": 1}]},
        {"model": {"dtype": "fp16"}},
    ],
)
def test_the_json_schema_refuses_mistakes(change):
    schema = files.json_schema()
    assert list(problems(schema, schema, NPO | change))


def test_describing_a_recipe_needs_neither_torch_nor_transformers():
    code = (
        "import sys, unlearn.recipes.schema, unlearn.recipes.files as files\n"
        "unlearn.recipes.schema.Recipe.model_validate(files.read(files.find('npo')))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": int | float,
    "boolean": bool,
    "null": type(None),
}


def problems(root: dict, schema: Any, value: Any):
    """Check a value against the part of JSON Schema that our schema uses."""
    if not isinstance(schema, dict):
        if schema is False:
            yield f"{value!r} is not allowed"
        return
    if reference := schema.get("$ref"):
        yield from problems(root, root["$defs"][reference.rpartition("/")[2]], value)
    kind = schema.get("type")
    if kind and (
        not isinstance(value, TYPES[kind])
        or (isinstance(value, bool) and kind in ("integer", "number"))
    ):
        yield f"{value!r} is no {kind}"
        return
    yield from value_problems(schema, value)
    yield from branch_problems(root, schema, value)
    if isinstance(value, dict):
        yield from keys_problems(root, schema, value)
    for item in value if isinstance(value, list) else []:
        yield from problems(root, schema.get("items", {}), item)


def value_problems(schema: dict, value: Any):
    if "enum" in schema and value not in schema["enum"]:
        yield f"{value!r} not in {schema['enum']}"
    if "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{value!r} does not match {schema['pattern']}"
    if "const" in schema and value != schema["const"]:
        yield f"{value!r} is not {schema['const']!r}"
    if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
        yield f"{value!r} is too small"
    if "minimum" in schema and value < schema["minimum"]:
        yield f"{value!r} is too small"


def branch_problems(root: dict, schema: dict, value: Any):
    branches = schema.get("anyOf", [])
    if branches and all(list(problems(root, branch, value)) for branch in branches):
        yield f"{value!r} matches no branch"
    for part in schema.get("allOf", []):
        if not list(problems(root, part["if"], value)):
            yield from problems(root, part["then"], value)


def keys_problems(root: dict, schema: dict, value: dict):
    properties = schema.get("properties", {})
    yield from (f"no {name}" for name in schema.get("required", []) if name not in value)
    for name, item in value.items():
        yield from problems(root, schema.get("propertyNames", {}), name)
        other = schema.get("additionalProperties", {})
        yield from problems(root, properties.get(name, other), item)
