"""One pass over the model: every sequence is scored once, every prompt is answered once.

All metrics are functions of what this module gives; none of them calls the model.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unlearn.data.collate import IGNORE
from unlearn.data.encode import Example, pad_token_id
from unlearn.errors import UserError
from unlearn.evals.generate import Answer, stop_ids, text_of, written
from unlearn.evals.memory import require_memory, scoring_bytes, writing_bytes
from unlearn.evals.stored import Recall, Store
from unlearn.head import plain
from unlearn.ranks import Ranks
from unlearn.runs import cache_folder
from unlearn.scores import Scores
from unlearn.scoring import evaluation_mode, scored

GENERATION_BUDGET = 4
"""Writing one token at a time needs far less memory than scoring whole rows: larger batches."""
WANTED = ("correct", "statistics")
COLUMNS = ("log_probs", "correct", "mean", "variance")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluator:
    """A model under evaluation: what it says about given sequences, and what it writes itself.

    Ask for everything in one call: within a call, equal sequences are scored once, equal prompts
    are answered once, and sequences with the same prompt share the work on it. ``weights_hash``
    (:func:`unlearn.models.weights_hash`) lets results be kept in the user's cache and found again;
    with None every call asks the model. With ``torch.distributed`` initialised, all ranks must make
    the same calls; they share the work and each gets all of the numbers of one process.
    """

    model: Any
    tokenizer: Any
    batch_tokens: int = 8192
    max_new_tokens: int = 200
    weights_hash: str | None = None

    def check_finite(self, examples: Sequence[Example] = (), *, name: str = "the model") -> None:
        """Try two short rows (the shortest of those given) before the long work starts.

        Raises:
            UserError: a score is NaN or infinite.
        """
        rows = sorted(examples, key=lambda example: len(example.input_ids))[:2]
        for _, values in self._scored(rows or _probe(self.model)):
            if not all(row.isfinite().all() for row in values):
                raise UserError(
                    f"{name} gives NaN or infinite numbers instead of probabilities: its weights "
                    "hold such numbers, or overflow in this precision",
                    "load it in float32; if that does not help, take an earlier checkpoint or "
                    "train again with a smaller learning rate",
                )

    def score(
        self, examples: Sequence[Example], *, progress: Progress = lambda done, total: None
    ) -> Scores:
        """Score every example; row i, column j is the j-th labelled token of example i, on the CPU.

        Columns hold answers alone, left-aligned: ``attended`` is ``mask``. ``correct``, ``mean``
        and ``variance`` are always there.

        Raises:
            UserError: a batch would not fit on the GPU.
        """
        keys = [(tuple(example.input_ids), tuple(example.labels)) for example in examples]
        times, unique = Counter(keys), dict(zip(keys, examples, strict=True))
        recall = self._recall()
        recalled = recall.scores(list(unique.values()), len(COLUMNS), _dtype(self.model))
        found = {key: row for key, row in zip(unique, recalled, strict=True) if row is not None}
        done = sum(times[key] for key in found)
        missing = [key for key in unique if key not in found]
        rows = [unique[key] for key in missing]
        for places, values in self._scored(rows):
            recall.keep_scores([rows[place] for place in places], values)
            for place, row in zip(places, values, strict=True):
                found[missing[place]] = row
                done += times[missing[place]]
            progress(done, len(examples))
        return _stacked([found[key] for key in keys])

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        known: Sequence[Sequence[int]] | None = None,
        progress: Progress = lambda done, total: None,
    ) -> list[str]:
        """Give the greedy answer to each prompt (token ids), as text, in input order.

        Arguments and errors are those of :meth:`write_tokens`.
        """
        found = self.write_tokens(prompts, known=known, progress=progress)
        return [text_of(self.tokenizer, tokens) for tokens in found]

    def write_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        known: Sequence[Sequence[int]] | None = None,
        progress: Progress = lambda done, total: None,
    ) -> list[Sequence[int]]:
        """Give the tokens of the greedy answer to each prompt, its end token included.

        ``known`` gives, per prompt, tokens already known to be the first that greedy decoding would
        choose (:func:`known_start`); not used with a model that chooses by other numbers than those
        it is scored by.

        Raises:
            UserError: a prompt is empty, the model has no key-value cache, or a batch would not fit
                on the GPU.
        """
        starts: dict[tuple[int, ...], list[int]] = {}
        if not getattr(plain(self.model), "writes_as_it_scores", True):
            known = None
        for place, prompt in enumerate(map(tuple, prompts)):
            start = list(known[place]) if known else []
            starts[prompt] = max(starts.get(prompt, []), start, key=len)
        recall, stops = self._recall(), stop_ids(self.model, self.tokenizer)
        recalled = recall.answers(list(starts), self.max_new_tokens, stops)
        found = {key: ids for key, ids in zip(starts, recalled, strict=True) if ids is not None}
        times = Counter(map(tuple, prompts))
        done = sum(times[prompt] for prompt in found)
        missing = {prompt: start for prompt, start in starts.items() if prompt not in found}
        for answers in self._written(missing):
            sound = {tuple(answer.prompt): answer.tokens for answer in answers if answer.sound}
            recall.keep_answers(sound, self.max_new_tokens, stops)
            found |= {tuple(answer.prompt): answer.tokens for answer in answers}
            done += sum(times[tuple(answer.prompt)] for answer in answers)
            progress(done, len(prompts))
        progress(len(prompts), len(prompts))
        return [found[tuple(prompt)] for prompt in prompts]

    def _recall(self) -> Recall:
        ranks = Ranks.of(self.model)
        if self.weights_hash is None:
            return Recall(None, ranks)
        return Recall(Store.of(cache_folder(), self.model, self.weights_hash), ranks)

    def _scored(self, rows: Sequence[Example]) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Score rows; give places and, for each, [:data:`COLUMNS`, labelled token]."""
        if not rows:
            return
        longest = max(len(row.input_ids) for row in rows)
        needed = scoring_bytes(self.model, max(self.batch_tokens, longest))
        require_memory(self.model, needed, batch_tokens=self.batch_tokens)
        pad_id = pad_token_id(self.tokenizer)
        with evaluation_mode(self.model):
            for places, scores in scored(
                self.model, rows, pad_id=pad_id, batch_tokens=self.batch_tokens, want=WANTED
            ):
                columns = [getattr(scores, name).to(scores.log_probs.dtype) for name in COLUMNS]
                values, lengths = torch.stack(columns), scores.num_tokens.tolist()
                yield places, [values[:, i, :n].contiguous() for i, n in enumerate(lengths)]

    def _written(self, starts: Mapping[tuple[int, ...], list[int]]) -> Iterator[list[Answer]]:
        """Answer prompts, some of whose first tokens are known."""
        if not starts:
            return
        budget = GENERATION_BUDGET * self.batch_tokens
        require_memory(
            self.model, writing_bytes(self.model, budget), batch_tokens=self.batch_tokens
        )
        for _, answers in written(
            self.model,
            self.tokenizer,
            list(starts),
            known=list(starts.values()),
            max_new_tokens=self.max_new_tokens,
            token_budget=budget,
        ):
            yield answers


def known_start(example: Example, correct: Sequence[bool], prompt: Sequence[int]) -> list[int]:
    """Give the first tokens of the true answer that greedy decoding is known to choose.

    ``correct`` says, per labelled token, whether it was the likeliest. Where the teacher-forced
    prediction is right, greedy decoding writes the same token and stands before the same context;
    so right predictions at the start of an answer need no decoding. As with any two batches of
    different shape, rounding may settle a near-tie differently.
    """
    start = len(prompt)
    if example.input_ids[:start] != list(prompt):
        return []
    hits = iter(correct)
    end = start
    while end < len(example.input_ids) and example.labels[end] != IGNORE and next(hits):
        end += 1
    return example.input_ids[start:end]


def select(scores: Scores, rows: Sequence[int]) -> Scores:
    """Keep some rows of the evaluator's scores, in the given order."""
    index = torch.tensor(rows, dtype=torch.long)
    columns = {name: value for name, value in vars(scores).items() if value is not None}
    return Scores(**{name: value[index] for name, value in columns.items()})


def _stacked(rows: Sequence[Tensor]) -> Scores:
    """Lay out [:data:`COLUMNS`, labelled token] of every row as scores."""
    lengths = torch.tensor([row.shape[1] for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    columns = {}
    for name, values in zip(COLUMNS, torch.cat(list(rows), dim=1), strict=True):
        values = values.bool() if name == "correct" else values
        columns[name] = torch.zeros_like(mask, dtype=values.dtype).masked_scatter(mask, values)
    return Scores(mask=mask, attended=mask, **columns)


def _dtype(model: Any) -> torch.dtype:
    return torch.float64 if model.dtype == torch.float64 else torch.float32


def _probe(model: Any) -> list[Example]:
    """Give two rows of arbitrary tokens."""
    size = int(plain(model).config.get_text_config().vocab_size)
    rows = torch.randint(size, (2, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return [Example(row, [IGNORE, *row[1:]], 1, place) for place, row in enumerate(rows)]
