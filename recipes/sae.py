"""Dictionaries from models and texts named by their places: trained into a folder, or measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from unlearn import models, monitors
from unlearn.data import Template, encode, load_rows, pad_token_id, tokenize
from unlearn.errors import UserError, did_you_mean
from unlearn.kinds import load_config
from unlearn.ranks import Ranks
from unlearn.recipes.inputs import check_model_folder
from unlearn.recipes.training_folder import CHECKPOINT, RESULTS, check_folder, logged
from unlearn.recipes.yaml_text import parse
from unlearn.runs import versions, write_json
from unlearn.sae.corpus import Corpus, corpus_of
from unlearn.sae.dictionary import Dictionary, check_fits
from unlearn.sae.measure import doubts, fidelity, held_out_activations, recovery
from unlearn.sae.settings import TrainSettings
from unlearn.sae.storage import FILE, save_dictionary
from unlearn.sae.stream import Activations
from unlearn.sae.train import Training

OURS = {FILE}
"""What a training writes beside what :mod:`unlearn.recipes.training_folder` names."""
WHOLE = 2**31
"""No text is this long: each is encoded in one piece."""
Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Texts:
    """A model, and the texts that go through it; ``template`` joins questions and answers."""

    source: models.ModelSource
    data: str
    columns: Mapping[str, str] = field(default_factory=dict)
    template: str | None = None

    def corpus(self, *, context: int, pack: bool) -> tuple[Corpus, int]:
        """Read and tokenise the texts; give them with the id to pad with."""
        rows = load_rows(self.data, columns=self.columns, offline=self.source.offline)
        tokenizer = models.load_tokenizer(self.source)
        template = Template.for_tokenizer(tokenizer, self.template)
        examples = encode(rows, tokenizer, template, max_length=WHOLE, source=self.data)
        pad_id = pad_token_id(tokenizer)
        used = {token for one in examples for token in one.input_ids}
        models.check_vocabulary(self.source, used | {pad_id})
        front = tokenize(tokenizer, [""], adds_special=True)[0]
        end = tokenizer.eos_token_id
        return corpus_of(examples, front=front, end=end, context=context, pack=pack), pad_id


def settings_of(given: Mapping[str, Any], more: list[str]) -> TrainSettings:
    """Build settings from options and ``KEY=VALUE`` texts, which come last.

    Raises:
        UserError: every mistake at once.
    """
    known = TrainSettings.__dataclass_fields__
    values, mistakes = {key: one for key, one in given.items() if one is not None}, []
    for text in more:
        key, mark, value = text.partition("=")
        if not mark:
            mistakes.append(f"--set {text}: write KEY=VALUE")
        elif key not in known:
            mistakes.append(f"unknown setting '{key}'{did_you_mean(key, known)}")
        else:
            values[key] = parse(value)
    try:
        found = TypeAdapter(TrainSettings).validate_python(values)
    except ValidationError as error:
        told = ((".".join(map(str, one["loc"])), one) for one in error.errors())
        mistakes += [f"{key} is {one['input']!r}: {one['msg']}" for key, one in told]
    if mistakes:
        raise UserError("; ".join(mistakes), f"the settings are {', '.join(known)}")
    return found


def train(
    texts: Texts, settings: TrainSettings, out: Path, *, emit: Emit = lambda event: None
) -> dict[str, Any]:
    """Train a dictionary into a folder: ``sae.safetensors``, and ``results.json`` last.

    While it is trained, ``training.safetensors`` holds what it goes on from: the same call does so.

    Raises:
        UserError: whatever is wrong with the model, the texts, the settings or the folder.
        Interrupted: stopped by SIGINT or SIGTERM; the last step is saved.
    """
    check_model_folder(texts.source.path)
    ranks = Ranks.world()
    ranks.first(lambda: check_folder(out, OURS))
    _check_sizes(texts.source, settings)
    emit({"event": "stage", "stage": "reading the texts"})
    corpus, pad_id = texts.corpus(context=settings.context, pack=settings.pack)
    emit({"event": "stage", "stage": "load"})
    model = models.load_model(texts.source)
    emit({"event": "stage", "stage": "training the dictionary"})
    stop = monitors.StopRequest(in_step=True)
    with stop.listening():
        trained = Training(
            Activations(model, corpus, settings.layer, pad_id),
            settings,
            checkpoint=out / CHECKPOINT,
            identity={"model": models.weights_hash(model)},
            emit=logged(emit, out, ranks),
            stop=lambda: stop.requested,
        ).run()
    results = described(trained.dictionary) | {"metrics": dict(trained.metrics)}
    results |= {"model": texts.source.path, "data": texts.data, "versions": versions()}
    named = named_after(trained.dictionary, texts.source.path)
    ranks.first(lambda: _write(named, results, out))
    return results | {"out": str(out)}


def _check_sizes(source: models.ModelSource, settings: TrainSettings) -> None:
    """Refuse a layer that the model has not, and more active latents than there are."""
    models.check_source(source)
    try:
        config = load_config(source).get_text_config()
    except (OSError, ValueError) as error:
        cause = str(error).strip().split("\n")[0]
        raise UserError(f"cannot read the configuration of '{source.path}': {cause}") from error
    if settings.layer >= (depth := config.num_hidden_layers):
        raise UserError(
            f"layer={settings.layer} given, but '{source.path}' has {depth} layers",
            f"give 0 to {depth - 1}; about a third of the way up is usual",
        )
    settings.latents(config.hidden_size)


def named_after(dictionary: Dictionary, model: str) -> Dictionary:
    """Give the dictionary with the name of its model."""
    return replace(dictionary, model=model)


def _write(dictionary: Dictionary, results: Mapping[str, Any], out: Path) -> None:
    save_dictionary(dictionary, out / FILE)
    write_json(out / RESULTS, results)
    (out / CHECKPOINT).unlink(missing_ok=True)


def described(dictionary: Dictionary) -> dict[str, Any]:
    """Say what a dictionary is: its kind, its sizes, its place, its lengths and thresholds."""
    about = dict(dictionary.about)
    found = {
        "kind": dictionary.kind,
        "trained_as": about.get("trained_as"),
        "format": about.get("format", "unlearn"),
        "width": dictionary.width,
        "features": dictionary.latents,
        "k": dictionary.k,
        "hook": str(dictionary.hook) if dictionary.hook else about.get("hook"),
        "layer": dictionary.hook.leaves if dictionary.hook else None,
        "model": dictionary.model or None,
        "centred": dictionary.centred,
        "direction_lengths": _spread(dictionary.norms()),
        "decoder_bias_length": float(dictionary.b_dec.norm()),
        "threshold": None if dictionary.threshold is None else _spread(dictionary.threshold),
    }
    return found | ({"metrics": about["metrics"]} if about.get("metrics") else {})


def _spread(values: Any) -> dict[str, float]:
    ordered = values.double().sort().values
    return {
        "min": float(ordered[0]),
        "median": float(ordered[(len(ordered) - 1) // 2]),
        "max": float(ordered[-1]),
    }


def measured(
    dictionary: Dictionary,
    texts: Texts,
    *,
    name: str,
    layer: int | None = None,
    max_rows: int = 32,
    emit: Emit = lambda event: None,
) -> dict[str, Any]:
    """Measure a dictionary on texts: variance explained, L0, dead share, cross-entropy recovered.

    Rows are as long, and packed or apart, as those it was trained on, where it says so.

    Raises:
        UserError: the dictionary is for another width or layer, or its layer is not known.
    """
    check_model_folder(texts.source.path)
    emit({"event": "stage", "stage": "reading the texts"})
    trained = dictionary.about.get("settings") or {}
    context, pack = trained.get("context", 1024), trained.get("pack", True)
    corpus, pad_id = texts.corpus(context=context, pack=pack)
    emit({"event": "stage", "stage": "load"})
    model = models.load_model(texts.source)
    place = dictionary.hook.leaves if dictionary.hook else None
    chosen = layer if layer is not None else place
    if chosen is None:
        where = f"reads {dictionary.hook}" if dictionary.hook else "does not say what it reads"
        raise UserError(f"'{name}' {where}", "name the --layer whose output it was trained on")
    source = Activations(model, corpus, chosen, pad_id)
    check_fits(dictionary, source.width, layer, source=name)
    emit({"event": "stage", "stage": "measuring the dictionary"})
    rows = list(range(min(max_rows, len(corpus))))
    moved = dictionary.to(source.device)
    told = fidelity(moved, held_out_activations(source, rows, 8192))
    back = recovery(source, rows, moved, 8192)
    figures = vars(told) | back.as_json()
    return {"layer": chosen, "metrics": figures, "doubts": doubts(told, dictionary.latents)}
