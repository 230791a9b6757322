"""A model made ready to score texts: with its frequency table and its reference model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from unlearn.detect.engine import TextScorer
from unlearn.detect.english import generic_english, table_warnings
from unlearn.detect.frequency import FrequencyTable, load_table
from unlearn.detect.settings import DEFAULT, Settings
from unlearn.models import ModelSource, load_model, load_tokenizer

ENGLISH = "english"
"""Name of the rough table that needs no corpus."""
LOOKED_AT = 200
"""Texts that are compared with a frequency table."""


@dataclass(frozen=True)
class Extras:
    """What some scores need beside the model.

    ``frequencies``: folder of a table, or ``english``; ``reference``: another model.
    """

    frequencies: str | None = None
    reference: str | None = None

    def with_scores(self, settings: Settings, asked: Sequence[str] | None) -> Settings:
        """Choose the scores: those asked for, else all of one pass and what there is the input for.

        Raises:
            UserError: an unknown score, or one that lacks what it needs.
        """
        there = {"dcpdd": self.frequencies is not None, "ref": self.reference is not None}
        more = tuple(name for name, given in there.items() if given)
        found = replace(settings, scores=tuple(asked or (*DEFAULT, *more)))
        found.check_inputs(there)
        return found

    def missing(self, asked: Sequence[str] | None) -> list[str]:
        """Say which score of one pass is not among those chosen for want of a table."""
        if asked or self.frequencies is not None:
            return []
        return [
            "dcpdd is left out: it needs --freq FOLDER (`unlearn detect freq build`), or "
            "--freq english for a rough table"
        ]


def load_scorer(
    source: ModelSource,
    settings: Settings,
    extras: Extras,
    texts: Sequence[str] = (),
    *,
    nonmembers: Sequence[str] = (),
    members: Sequence[str] = (),
) -> tuple[TextScorer, list[str]]:
    """Load a model for scoring; also say what is doubtful about tokenizer and table.

    The reference model is loaded as the model is, save its revision. ``nonmembers`` and ``members``
    are texts for the prefixes of ReCaLL and Con-ReCaLL.

    Raises:
        UserError: the model, the table or the reference cannot be used.
    """
    tokenizer = load_tokenizer(source)
    table = find_table(extras.frequencies, tokenizer) if "dcpdd" in settings.scores else None
    model = load_model(source)
    reference = None
    if extras.reference and "ref" in settings.scores:
        other = replace(source, path=extras.reference, revision=None)
        reference = (load_model(other), load_tokenizer(other))
    scorer = TextScorer.of(
        model,
        tokenizer,
        settings,
        reference=reference,
        frequencies=table.frequencies() if table else None,
        nonmembers=nonmembers,
        members=members,
    )
    some = texts[:: max(1, len(texts) // LOOKED_AT)]
    warnings = table_warnings(table, some, tokenizer) if table else []
    return scorer, [*scorer.side.tokenizer.warnings, *warnings]


def find_table(name: str | None, tokenizer: object) -> FrequencyTable:
    """Give the table of a folder, or the rough one of English when none is named.

    Raises:
        UserError: there is none in the folder, or it is of another tokenizer.
    """
    if name == ENGLISH or name is None:
        return generic_english(tokenizer)
    return load_table(Path(name), tokenizer)
