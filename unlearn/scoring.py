"""Scoring many rows: similar ones together, nothing twice, on one process or on all of a launch."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unlearn.data.collate import IGNORE, batches_by_length, pad
from unlearn.data.encode import Example
from unlearn.head import plain
from unlearn.packing import can_pack, is_packable, packable
from unlearn.prefixes import TokenTree
from unlearn.ranks import Ranks, whole
from unlearn.scores import Scorer, Scores

COLUMNS = {"correct": ("correct",), "statistics": ("mean", "variance", "top")}
"""What can be asked for beside the log-probabilities -> the fields of :class:`Scores` it fills."""
CPU_TOKENS = 2048
"""More tokens than this at once only make a CPU slower (1.5 times at 8192 on a 4M-parameter Llama):
its caches no longer hold what a layer passes to the next."""


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Switch dropout off and gradients too; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def scored(
    model: Any,
    examples: Sequence[Example],
    *,
    scorer: Scorer | None = None,
    pad_id: int = 0,
    batch_tokens: int = 8192,
    want: Collection[str] = (),
) -> Iterator[tuple[list[int], Scores]]:
    """Score every example once; give groups of them with their places, longest first.

    Row i, column j of a group's scores is the j-th labelled token of its i-th place, on the CPU:
    columns hold answers alone, left-aligned, ``attended`` is ``mask`` and ``next_tokens`` the
    labels. ``want``: ``correct``, ``statistics``. At most ``batch_tokens`` tokens go through the
    model at once, or one row.

    A model with plain causal attention (:func:`~unlearn.packing.can_pack`) computes what rows of a
    group begin with once (:mod:`unlearn.prefixes`); rows with the same prompt come in one group.
    That is always done, because it was never slower. Against padded batches, CPU time of a
    4M-parameter Llama: TOFU's answers, paraphrases and perturbed answers 1.5 to 1.7 times as fast
    (half of the tokens), with a system prompt of 45 words 2.9; four answers of 3 tokens to prompts
    of 300: 3.6; a hundred of 8 to one prompt of 1000: 29; with nothing to share 1.0. Other models
    get batches padded to their longest row.

    With ``torch.distributed`` initialised, every rank must call this with the same examples. The
    groups are dealt out to the ranks and every rank is given all of them: the groups are those of
    one process, and so are the numbers.
    """
    if not examples:
        return
    model = whole(model)
    scorer = scorer or Scorer.for_model(model)
    if next(model.parameters()).device.type == "cpu":
        batch_tokens = min(batch_tokens, CPU_TOKENS)
    with _prepared(scorer, model) as packed:
        score = _score_tree if packed else _score_padded
        groups = (by_prompt if packed else _by_length)(examples, batch_tokens)
        ranks = Ranks.of(model)
        for start in range(0, len(groups), ranks.size):
            turn = groups[start : start + ranks.size]
            rows = [[examples[place] for place in group] for group in turn]
            found = _none(model, want)
            if ranks.rank < len(turn):
                found = score(scorer, model, rows[ranks.rank], pad_id, want)
            sizes = [sum(map(num_labelled, group)) for group in rows]
            given = ranks.gather(found, sizes + [0] * (ranks.size - len(turn)))
            for places, group, values in zip(turn, rows, given, strict=False):
                yield places, _laid_out(values.cpu(), group, want)


def num_labelled(example: Example) -> int:
    """Count the tokens that are scored; the first of a row has nothing to be predicted from."""
    return sum(label != IGNORE for label in example.labels[1:])


def by_prompt(examples: Sequence[Example], batch_tokens: int) -> list[list[int]]:
    """Group rows within the token budget, longest first; rows with the same prompt stay together.

    A prompt counts once. Rows of one prompt are parted only where they exceed the budget alone.
    """
    lengths = [len(example.input_ids) for example in examples]
    families: dict[tuple[int, ...], list[int]] = {}
    for place in sorted(range(len(examples)), key=lambda place: (-lengths[place], place)):
        example = examples[place]
        prompt = tuple(example.input_ids[: example.prompt_length])
        families.setdefault(prompt, []).append(place)
    groups: list[list[int]] = [[]]
    room = batch_tokens
    for prompt, places in families.items():
        answers = [lengths[place] - len(prompt) for place in places]
        if groups[-1] and len(prompt) + sum(answers) > room:
            groups.append([])
            room = batch_tokens
        room -= len(prompt)
        for place, answer in zip(places, answers, strict=True):
            if groups[-1] and answer > room:
                groups.append([])
                room = batch_tokens - len(prompt)
            groups[-1].append(place)
            room -= answer
    return groups


def _by_length(examples: Sequence[Example], batch_tokens: int) -> list[list[int]]:
    return batches_by_length([len(example.input_ids) for example in examples], batch_tokens)


@contextmanager
def _prepared(scorer: Scorer, model: Any) -> Iterator[bool]:
    """Let the model take trees of tokens where it can; tell whether it does."""
    if scorer.head is None:
        yield False
    elif is_packable(plain(model)):
        yield True
    elif can_pack(model):
        with packable(model):
            yield True
    else:
        yield False


def _score_tree(
    scorer: Scorer, model: Any, rows: Sequence[Example], pad_id: int, want: Collection[str]
) -> Tensor:
    """Give [column, labelled token] of all rows in turn."""
    device = next(model.parameters()).device
    labelled = [np.flatnonzero(np.array(row.labels[1:]) != IGNORE) for row in rows]
    ends = [1 + max(places, default=0) for places in labelled]  # what comes later predicts nothing
    tree = TokenTree.of([row.input_ids[:end] for row, end in zip(rows, ends, strict=True)], device)
    wanted = [
        (path[places], np.array(row.input_ids)[places + 1])
        for row, path, places in zip(rows, tree.paths, labelled, strict=True)
    ]
    pairs = np.stack([np.concatenate(part) for part in zip(*wanted, strict=True)])
    distinct, again = np.unique(pairs, axis=1, return_inverse=True)
    predicting, targets = (torch.from_numpy(part).to(device) for part in distinct)
    readings = scorer.tree(model, tree, predicting, targets, want=want)
    columns = torch.stack([getattr(readings, name) for name in _columns(want)])
    return columns[:, torch.from_numpy(again.reshape(-1)).to(device)]


def _score_padded(
    scorer: Scorer, model: Any, rows: Sequence[Example], pad_id: int, want: Collection[str]
) -> Tensor:
    """Give [column, labelled token] of all rows in turn."""
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in pad(rows, pad_id).items()}
    scores = scorer(model, batch, want=want)
    return torch.stack([getattr(scores, name)[scores.mask] for name in _columns(want)])


def _columns(want: Collection[str]) -> list[str]:
    return ["log_probs", *(field for name in COLUMNS if name in want for field in COLUMNS[name])]


def _none(model: Any, want: Collection[str]) -> Tensor:
    """Give the values of no rows, as this model would give them."""
    parameter = next(model.parameters())
    double = parameter.dtype == torch.float64
    dtype = torch.float64 if double else torch.float32
    return torch.zeros(len(_columns(want)), 0, dtype=dtype, device=parameter.device)


def _laid_out(values: Tensor, rows: Sequence[Example], want: Collection[str]) -> Scores:
    """Turn [column, labelled token] into scores with one row each."""
    lengths = torch.tensor([num_labelled(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    columns = {}
    for name, column in zip(_columns(want), values, strict=True):
        column = column.bool() if name == "correct" else column
        columns[name] = torch.zeros_like(mask, dtype=column.dtype).masked_scatter(mask, column)
    labels = torch.tensor([label for row in rows for label in row.labels[1:] if label != IGNORE])
    tokens = torch.full(mask.shape, IGNORE).masked_scatter(mask, labels.long())
    return Scores(mask=mask, attended=mask, next_tokens=tokens, **columns)
