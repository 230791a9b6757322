"""The run of a mask predictor's recipe: a folder with the predictor and its figures."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unlearn import models, monitors
from unlearn.data import Template, encode, load_rows, pad_token_id
from unlearn.data.encode import Example
from unlearn.errors import UserError
from unlearn.kinds import require_plain
from unlearn.mtp.predictor import MaskPredictor
from unlearn.mtp.settings import require_share
from unlearn.mtp.storage import save_predictor
from unlearn.mtp.train import Training, names_of, require_same_training
from unlearn.ranks import Ranks
from unlearn.recipes.inputs import absolute_places, check_model_folder
from unlearn.recipes.mtp import MODEL, OURS, RECIPE, MtpRecipe, dump
from unlearn.recipes.training_folder import CHECKPOINT, RESULTS, check_folder, logged
from unlearn.runs import command_line, versions, write_atomic, write_json

Emit = Callable[[dict[str, Any]], None]
NOTHING_HELD_OUT = "no text is held out to measure on: there are fewer than ten, or held_out=0"
TEMPLATE = (
    r"give one: --set 'data.template=Question: {question}\nAnswer: '; "
    "the answer follows directly"
)
"""Instead of hints that name the option of other commands."""


def source_of(recipe: MtpRecipe, *, offline: bool = False) -> models.ModelSource:
    """Give the recipe's model section as the library's own type."""
    section = recipe.model
    assert section.path is not None  # require_runnable
    return models.ModelSource(
        section.path,
        section.dtype,
        section.revision,
        section.trust_remote_code,
        section.quantize,
        offline,
    )


def run_mtp(
    recipe: MtpRecipe, *, emit: Emit = lambda event: None, offline: bool = False
) -> dict[str, Any]:
    """Train a mask predictor into a folder: ``model/``, and ``results.json`` last.

    While it is trained, ``training.safetensors`` holds what it goes on from: the same call does so.

    Raises:
        UserError: whatever is wrong with the model, the texts, the settings or the folder.
        Interrupted: stopped by SIGINT or SIGTERM; the last step is saved.
    """
    recipe.require_runnable()
    settings, out, ranks = recipe.settings, Path(str(recipe.out)), Ranks.world()
    require_share(settings, ranks.size)
    check_model_folder(recipe.model.path)
    ranks.first(lambda: check_folder(out, OURS))
    source = source_of(recipe, offline=offline)
    models.check_source(source)
    require_plain(source)
    emit({"event": "stage", "stage": "reading the texts"})
    tokenizer = models.load_tokenizer(source)
    require_same_training(out / CHECKPOINT, settings.identity())
    examples = examples_of(recipe, source, tokenizer)
    require_same_training(out / CHECKPOINT, names_of(settings, examples))
    emit({"event": "stage", "stage": "load"})
    model = models.load_model(source)
    identity = {"model": models.weights_hash(model)}
    predictor = MaskPredictor(model, settings.shape, seed=settings.seed)
    told, stop = logged(emit, out, ranks), monitors.StopRequest(in_step=True)
    training = Training(
        predictor, examples, settings, out / CHECKPOINT, identity, told, lambda: stop.requested
    )
    require_same_training(out / CHECKPOINT, training.names)
    ranks.first(lambda: write_atomic(out / RECIPE, dump(absolute(recipe))))
    if not training.held_out:
        emit({"event": "stage", "stage": NOTHING_HELD_OUT})
    emit({"event": "stage", "stage": "training the mask predictor"})
    with stop.listening():
        training.run()
        metrics = training.measure()
    results = {
        "method": recipe.method,
        "out": str(out),
        "model": str(out / MODEL),
        "base": source.path,
        "data": recipe.data.train,
        "settings": asdict(settings),
        "metrics": metrics,
        "command": command_line(),
        "versions": versions(),
    }

    def write() -> None:
        about = {"metrics": metrics, "settings": asdict(settings)}
        save_predictor(predictor, out / MODEL, source, tokenizer, about=about)
        write_json(out / RESULTS, results)
        (out / CHECKPOINT).unlink(missing_ok=True)

    ranks.first(write)
    return results


def absolute(recipe: MtpRecipe) -> MtpRecipe:
    """Give the recipe with the places that exist here made absolute, to be run from anywhere."""
    model, train = absolute_places(recipe.model.path, recipe.data.train)
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"path": model}),
            "data": recipe.data.model_copy(update={"train": train}),
            "out": recipe.out and str(Path(recipe.out).absolute()),
        }
    )


def examples_of(recipe: MtpRecipe, source: models.ModelSource, tokenizer: Any) -> list[Example]:
    """Read and tokenise the texts of a recipe.

    Raises:
        UserError: they cannot be read, or the tokenizer writes tokens that the model does not know.
    """
    data = recipe.data
    assert data.train is not None  # require_runnable
    models.check_vocabulary(source, {pad_token_id(tokenizer), *tokenizer.get_vocab().values()})
    rows = load_rows(data.train, columns=data.columns, offline=source.offline)
    length = recipe.settings.max_length
    try:
        template = Template.for_tokenizer(tokenizer, data.template, data.system_prompt, {})
        return encode(rows, tokenizer, template, max_length=length, source=data.train)
    except UserError as error:
        hint = TEMPLATE if "explicit template" in error.hint or "--template" in error.hint else ""
        raise UserError(error.message, hint or error.hint) from error
