"""Everything about a recipe that can be checked before weights are loaded."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unlearn import models
from unlearn.data import Template, encode, pad_token_id
from unlearn.data.answers import (
    BELONGS,
    SHIPPED,
    Draws,
    OtherAnswers,
    alternates_of,
    answered,
    check_answerable,
    read_refusals,
)
from unlearn.data.collate import StreamDataset
from unlearn.data.pairs import POST_TRAINING
from unlearn.edits import EDITS
from unlearn.edits.update import check_fits, update_shapes
from unlearn.edits.weightless import weightless
from unlearn.engines import Engine
from unlearn.errors import UserError
from unlearn.evals.forget_retain import Split
from unlearn.kinds import load_config, require_plain
from unlearn.objectives import find
from unlearn.posttrain.pruning import Pruner, Pruning
from unlearn.posttrain.reweighting import Weighting
from unlearn.recipes.benchmarks import Measures, find_measures
from unlearn.recipes.inputs import check_update_file, dictionaries_of, update_of
from unlearn.recipes.schema import Recipe
from unlearn.recipes.streams import Stream, post_training_streams, read_stream
from unlearn.recipes.terms import read_by
from unlearn.sae.candidates import entry_of, placed
from unlearn.terms import Term


@dataclass(frozen=True)
class Prepared:
    """A recipe with its tokenizer and its tokenised, masked rows.

    ``measured`` holds hyperparameters that were measured at the frozen start, by term label.
    """

    recipe: Recipe
    source: models.ModelSource
    tokenizer: Any
    template: Template
    streams: dict[str, Stream]
    measures: Measures
    measured: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    whole_forget: int | None = None
    """Examples of the whole forget set, once the part that is trained on has been chosen."""

    @property
    def pad_id(self) -> int:
        return pad_token_id(self.tokenizer)

    @property
    def terms(self) -> list[Term]:
        """The recipe's terms with their objectives looked up."""
        found = [
            Term(
                find(term.objective),
                term.on,
                term.weight,
                term.hyper,
                term.rejected,
                Weighting(**term.reweight.model_dump()) if term.reweight else None,
            )
            for term in self.recipe.terms
        ]
        return [
            replace(term, hyper={**term.hyper, **self.measured.get(term.label, {})})
            for term in found
        ]

    @property
    def given(self) -> dict[str, Stream]:
        """The rows that the recipe names: forget and retain set, or pairs and text."""
        return {name: stream for name, stream in self.streams.items() if stream.draws is None}

    @property
    def trained(self) -> dict[str, Stream]:
        """The streams that go through the model in training.

        The retain set always does, so that the curve shows what happens to it; the forget set only
        where a term reads it, and not only other answers to its questions.
        """
        if not self.recipe.trains:  # an edit reads what is given
            return self.given
        read = {"retain", *read_by(self.recipe.terms)}
        return {name: stream for name, stream in self.streams.items() if name in read}

    @property
    def anchor(self) -> str:
        """The stream that epochs are passes over: the forget set, else pairs, else text."""
        if not self.recipe.posttrains:
            return "forget"
        return next(name for name in POST_TRAINING if name in self.trained)

    @property
    def first(self) -> "Prepared | None":
        """What is trained first, prepared alike; None when nothing is."""
        recipe = self.recipe.first_recipe
        return replace(self, recipe=recipe) if recipe else None

    @property
    def dataset(self) -> StreamDataset:
        """What training takes its rows from."""
        return StreamDataset(
            {name: stream.examples for name, stream in self.given.items()},
            seed=self.recipe.seed,
            others={
                name: OtherAnswers(stream.draws, stream.examples)
                for name, stream in self.streams.items()
                if stream.draws
            },
            only=self.trained,
            anchor=self.anchor,
        )

    @property
    def engine(self) -> Engine:
        return self.recipe.launch.chosen

    @property
    def rows_per_step(self) -> int:
        """Rows of the anchor stream per optimiser step, over all processes."""
        training, launch = self.recipe.training, self.recipe.launch
        return training.per_device_train_batch_size * self.recipe.accumulation * launch.processes

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch: a pass over the whole forget set (or pairs, or text).

        A part of it that is trained on instead is passed over more often, in as many steps.
        """
        rows = self.whole_forget or len(self.streams[self.anchor].examples)
        return -(-rows // self.rows_per_step)

    @property
    def pruner(self) -> Pruner | None:
        """What leaves rows out of epochs, new; None when nothing does."""
        training, size = self.recipe.training, len(self.streams[self.anchor].examples)
        if training.prune is None:
            return None
        how = Pruning(**training.prune.model_dump())
        return Pruner(how, size, int(training.num_train_epochs), self.recipe.seed)

    @property
    def steps(self) -> int:
        """Optimiser steps of the recipe's own training; those of an edit that trains nothing."""
        training, edit = self.recipe.training, self.recipe.edit
        if edit and not self.recipe.trains:
            return int(EDITS[edit.name].filled(edit.hyper).get("steps", 1))
        if training.max_steps > 0:
            return training.max_steps
        if self.pruner:
            return -(-self.pruner.visits // self.rows_per_step)
        return math.ceil(self.steps_per_epoch * training.num_train_epochs)


def prepare(recipe: Recipe, *, offline: bool = False) -> Prepared:
    """Check the model folders, read the rows, tokenise and mask them; nothing is written.

    Raises:
        UserError: anything about the input that would fail later.
    """
    recipe.require_runnable()
    _check_choice(recipe)
    source, tokenizer, template = open_tokenizer(recipe, offline=offline)
    _check_update(recipe, source)
    _check_dictionaries(recipe, source)
    if recipe.model.retain_model:
        models.check_source(sibling(source, recipe.model.retain_model))
    streams = {}
    for name in ("forget", "retain", "unseen"):
        stream = read_stream(recipe, name, tokenizer, template, offline=offline)
        if stream is not None:
            streams[name] = stream
    streams |= post_training_streams(recipe, tokenizer, template, offline=offline)
    splits = {
        name: Split(stream.rows, stream.examples[: len(stream.examples) - stream.extra], template)
        for name, stream in streams.items()
        if name != "unseen"
    }
    measures = find_measures(
        recipe, splits, template, offline=offline, load_start=lambda: models.load_model(source)
    )
    prepared = Prepared(recipe, source, tokenizer, template, streams, measures)
    prepared = replace(prepared, streams=streams | _other_answers(prepared))
    _check_vocabularies(prepared)
    for stage in filter(None, (prepared.first, prepared)):
        _check_terms(stage)
        _check_enough_rows(stage)
    return prepared


def open_tokenizer(
    recipe: Recipe, *, offline: bool = False
) -> tuple[models.ModelSource, Any, Template]:
    """Check the recipe's model folder; give it, its tokenizer, and how rows become text."""
    source, data = model_source(recipe, offline=offline), recipe.data
    models.check_source(source)
    require_plain(source)
    tokenizer = models.load_tokenizer(source)
    template = Template.for_tokenizer(
        tokenizer, data.template, data.system_prompt, dict(data.template_args)
    )
    return source, tokenizer, template


def _check_enough_rows(prepared: Prepared) -> None:
    """Refuse more processes than there are rows: some would never have one."""
    name = prepared.anchor
    processes, rows = prepared.recipe.launch.processes, len(prepared.streams[name].examples)
    if processes > rows:
        what = "the forget set" if name == "forget" else f"'{prepared.streams[name].source}'"
        raise UserError(
            f"{processes} processes given, but {what} has {rows} row{'s' * (rows > 1)}",
            f"start {rows} or fewer (--nproc, --nnodes)",
        )


def _check_update(recipe: Recipe, source: models.ModelSource) -> None:
    """Refuse an update that is none, or that this model has no weights for; none are loaded."""
    if place := update_of(recipe):
        check_update_file(place)
        shapes = update_shapes(Path(place))
        check_fits(weightless(source), shapes)


def _check_dictionaries(recipe: Recipe, source: models.ModelSource) -> None:
    """Refuse dictionaries that are none, or of another model; reads no weights of the model."""
    if paths := dictionaries_of(recipe):
        assert recipe.edit is not None
        found = placed(paths, load_config(source), recipe.edit.hyper.get("layer"))
        if selected := recipe.edit.hyper.get("selected"):
            for one in found:
                entry_of(selected, one)


def _check_choice(recipe: Recipe) -> None:
    """Refuse to choose rows of a forget set to which others are tied."""
    others = sorted(name for name in recipe.read_streams() if BELONGS.get(name) == "forget")
    tied = "data.forget_extra" if recipe.data.forget_extra else ", ".join(others)
    if recipe.data.select and tied:
        raise UserError(
            f"data.select given together with {tied}, whose rows belong to the whole forget set",
            "write the rows to be trained on to a file of their own and name it as data.forget",
        )


def _other_answers(prepared: Prepared) -> dict[str, Stream]:
    """Tokenise the other answers that the run will draw, for the terms that read them."""
    wanted = sorted(name for name in prepared.recipe.read_streams() if name in BELONGS)
    return {name: _drawn(prepared, name) for name in wanted}


def _drawn(prepared: Prepared, name: str) -> Stream:
    recipe, data = prepared.recipe, prepared.recipe.data
    asked = prepared.streams[BELONGS[name]]
    check_answerable(asked.rows, name, asked.source)
    if asked.extra:
        key = f"data.{BELONGS[name]}_extra"
        raise UserError(
            f"{key} given with a term on '{name}': the rows it adds have no such answers",
            f"leave {key} out, or use a method whose terms are on forget and retain",
        )
    if name == "alternate":
        source, texts = asked.source, alternates_of(asked.rows, asked.source)
    else:
        source, refusals = data.refusals or SHIPPED, read_refusals(data.refusals)
        texts = [refusals] * len(asked.rows)
    epochs = max(1, -(-prepared.steps // prepared.steps_per_epoch))
    draws = Draws(name, recipe.seed, [len(each) for each in texts], epochs, {})
    base = prepared.dataset
    drawn = sorted(
        {
            (row, draws.answer(epoch, row))
            for epoch in range(epochs)
            for row in {base.row(draws.belongs, epoch, index) for index in range(len(base))}
        }
    )
    rows = [answered(asked.rows[row], texts[row][answer]) for row, answer in drawn]
    examples = encode(
        rows, prepared.tokenizer, prepared.template, max_length=data.max_length, source=source
    )
    places = {pair: place for place, pair in enumerate(drawn)}
    return Stream(source, rows, examples, replace(draws, places=places))


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


def _check_terms(prepared: Prepared) -> None:
    """Refuse terms that ask for what the rows or the batches do not give."""
    recipe = prepared.recipe
    split = recipe.accumulation * recipe.launch.processes
    for term in prepared.terms:
        name, objective = term.objective.name, term.objective
        marked = any(row.important is not None for row in prepared.streams[term.on].examples)
        if objective.annotated and not marked:
            raise UserError(
                f"'{name}' needs to know which tokens are important, but the rows of "
                f"'{prepared.streams[term.on].source}' have no column 'important'",
                "add it: a list of passages of the answer, word by word; or --map important=COLUMN",
            )
        if objective.most_tokens:
            _check_short(name, objective.most_tokens, prepared.streams[term.on])
        if term.weighting:
            _check_weighting(prepared, term, term.weighting)
        if recipe.training.passes == "apart" and objective.reads != "scores":
            _check_apart(prepared, name)
        if objective.couples_rows({**objective.hyper, **term.hyper}) and split > 1:
            raise UserError(
                f"'{name}' weighs a whole batch at once, but a step has {split} forward passes",
                "set training.gradient_accumulation_steps=1 and one process, or another "
                "granularity",
            )


def _check_apart(prepared: Prepared, name: str) -> None:
    """Refuse what no slopes of log-probabilities can stand for."""
    if compares := [t.objective.name for t in prepared.terms if t.objective.compares]:
        raise UserError(
            f"training.passes=apart given with '{compares[0]}', a loss of two streams, and "
            f"'{name}', which reads more than the log-probabilities of answers",
            "set training.passes=together, or leave one of the two out",
        )


def _check_weighting(prepared: Prepared, term: Term, how: Weighting) -> None:
    """Refuse weights of rows where an objective has none, or where a row stands alone."""
    objective, recipe = term.objective, prepared.recipe
    if objective.unit not in ("token", "sequence") or objective.reads == "hidden":
        raise UserError(
            f"reweight given for '{objective.name}', which has no loss of single rows",
            "leave it out, or use an objective such as nll",
        )
    if objective.compares:
        raise UserError(
            f"reweight given for '{objective.name}', whose loss is of two answers at once",
            "leave it out, or use a term on each side, as in redi",
        )
    at_once = recipe.training.per_device_train_batch_size * recipe.launch.processes
    beside = {"micro": at_once, "step": prepared.rows_per_step}.get(how.scope)
    if beside == 1:
        raise UserError(
            f"reweight given with scope '{how.scope}', in which one row stands alone: its weight "
            "would always be 1",
            "raise training.per_device_train_batch_size, or use the scope step, stream or cached",
        )


def _check_short(name: str, most: int, stream: Stream) -> None:
    """Refuse answers so long that an objective would say nothing about them."""
    labelled = sum(label != -100 for row in stream.examples for label in row.labels[1:])
    if labelled > most * len(stream.examples):
        raise UserError(
            f"'{name}' is for answers of {most} tokens or fewer, but those of '{stream.source}' "
            f"have {labelled / len(stream.examples):.0f} on average, where it is plain training",
            "give shorter answers, or use nll",
        )


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
