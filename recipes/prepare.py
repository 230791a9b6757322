"""Everything about a recipe that can be checked before weights are loaded."""

import hashlib
import json
import math
from dataclasses import dataclass, replace
from typing import Any

from unlearn import models
from unlearn.data import Example, Template, encode, load_rows, pad_token_id
from unlearn.engines import Engine
from unlearn.evals.forget_retain import Split
from unlearn.objectives import OBJECTIVES
from unlearn.recipes.benchmarks import Measures, find_measures
from unlearn.recipes.schema import Recipe
from unlearn.training import Term


@dataclass(frozen=True)
class Stream:
    """A set of rows as given and as tokenised."""

    source: str
    rows: list[dict[str, Any]]
    examples: list[Example]

    def sha256(self) -> str:
        """Hash the tokenised rows: what the model is actually trained on."""
        tokens = json.dumps([[example.input_ids, example.labels] for example in self.examples])
        return hashlib.sha256(tokens.encode()).hexdigest()

    def provenance(self) -> dict[str, Any]:
        """Say where the rows came from, how many there are and their hash."""
        return {"source": self.source, "rows": len(self.rows), "sha256": self.sha256()}


@dataclass(frozen=True)
class Prepared:
    """A recipe with its tokenizer and its tokenised, masked rows."""

    recipe: Recipe
    source: models.ModelSource
    tokenizer: Any
    template: Template
    streams: dict[str, Stream]
    measures: Measures
    whole_forget: int | None = None
    """Examples of the whole forget set, once the part that is trained on has been chosen."""

    @property
    def pad_id(self) -> int:
        return pad_token_id(self.tokenizer)

    @property
    def terms(self) -> list[Term]:
        """The recipe's terms with their objectives looked up."""
        return [
            Term(OBJECTIVES[term.objective], term.on, term.weight, term.hyper)
            for term in self.recipe.terms
        ]

    @property
    def engine(self) -> Engine:
        return self.recipe.launch.chosen

    @property
    def rows_per_step(self) -> int:
        """Forget rows per optimiser step, over all processes."""
        training, launch = self.recipe.training, self.recipe.launch
        return training.per_device_train_batch_size * self.recipe.accumulation * launch.processes

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch: a pass over the whole forget set.

        A part of it that is trained on instead is passed over more often, in as many steps.
        """
        rows = self.whole_forget or len(self.streams["forget"].examples)
        return -(-rows // self.rows_per_step)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        training = self.recipe.training
        if training.max_steps > 0:
            return training.max_steps
        return math.ceil(self.steps_per_epoch * training.num_train_epochs)


def prepare(recipe: Recipe, *, offline: bool = False) -> Prepared:
    """Check the model folders, read the rows, tokenise and mask them; nothing is written.

    Raises:
        UserError: anything about the input that would fail later.
    """
    recipe.require_runnable()
    source = model_source(recipe, offline=offline)
    models.check_source(source)
    if recipe.model.retain_model:
        models.check_source(sibling(source, recipe.model.retain_model))
    tokenizer = models.load_tokenizer(source)
    data = recipe.data
    template = Template.for_tokenizer(
        tokenizer, data.template, data.system_prompt, dict(data.template_args)
    )
    streams = {}
    for name, spec in (("forget", data.forget), ("retain", data.retain)):
        if spec is not None:
            rows = load_rows(spec, columns=data.columns, offline=offline)
            examples = encode(rows, tokenizer, template, max_length=data.max_length, source=spec)
            streams[name] = Stream(spec, rows, examples)
    splits = {name: Split(one.rows, one.examples, template) for name, one in streams.items()}
    measures = find_measures(
        recipe, splits, template, offline=offline, load_start=lambda: models.load_model(source)
    )
    prepared = Prepared(recipe, source, tokenizer, template, streams, measures)
    _check_vocabularies(prepared)
    return prepared


def sibling(source: models.ModelSource, path: str) -> models.ModelSource:
    """Give another model, loaded in the same way: only then are the numbers comparable."""
    return replace(source, path=path, revision=None)


def _check_vocabularies(prepared: Prepared) -> None:
    """Refuse models that do not know the tokens of the rows, or know them as something else."""
    streams = prepared.streams.values()
    used = {token for stream in streams for row in stream.examples for token in row.input_ids}
    models.check_vocabulary(prepared.source, used | {prepared.pad_id})
    if prepared.recipe.model.retain_model:
        retain = sibling(prepared.source, prepared.recipe.model.retain_model)
        models.check_same_tokenizer(prepared.tokenizer, retain, used)


def model_source(recipe: Recipe, *, offline: bool = False) -> models.ModelSource:
    """Give the recipe's model section as the library's own type."""
    section = recipe.model
    assert section.path is not None  # require_runnable
    return models.ModelSource(
        path=section.path,
        dtype=section.dtype,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
        quantize=section.quantize,
        offline=offline,
    )
