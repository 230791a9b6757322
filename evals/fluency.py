"""Does the model still write language? Measures of what it generates, without a judge.

Unlearning can be bought with gibberish: an answer full of repeated words overlaps little with the
true one. These figures stand beside ROUGE to show that.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

CLASSIFIER = "madhurjindal/autonlp-Gibberish-Detector-492513457"
CLEAN = 0
"""The classifier's class for ordinary language; the others are degrees of gibberish."""
NEEDED_FILES = ("config.json", "model.safetensors")


def repetition(text: str, *, n: int = 4) -> float | None:
    """Give the share of word n-grams that occurred before in the text, in [0, 1).

    1 - distinct / all, over words split at whitespace; None for a text of fewer than n words
    (Welleck et al. 2020, arXiv:1908.04319, seq-rep-n, there over tokens).
    """
    words = text.lower().split()
    grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


def perplexity(losses: Sequence[float]) -> float:
    """Give the geometric mean over texts of their perplexity per token: exp of the mean loss.

    ``losses`` are mean negative log-probabilities per token in nats, under the model that judges.
    1 or more; low for plain language and for the judge's own style, and also for repetition.
    """
    return math.exp(math.fsum(losses) / len(losses)) if losses else math.nan


def clean_probability(
    texts: Sequence[str], *, classifier: str = CLASSIFIER, max_length: int = 32
) -> list[float] | None:
    """Give the probability that each text is ordinary language; None without the classifier.

    open-unlearning's ``forget_gibberish``: the first ``max_length`` tokens are read. Nothing is
    downloaded: the classifier counts only where its safetensors files already lie.
    """
    if not _at_hand(classifier):
        return None
    # imported here: only this function needs the classes, and most machines lack the files
    from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(classifier, local_files_only=True)
    model = AutoModelForSequenceClassification.from_pretrained(
        classifier, local_files_only=True, use_safetensors=True
    ).eval()
    found: list[float] = []
    for start in range(0, len(texts), 32):
        batch = tokenizer(
            list(texts[start : start + 32]),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=max_length,
        )
        with torch.no_grad():
            found += model(**batch).logits.float().softmax(-1)[:, CLEAN].tolist()
    return found


def _at_hand(classifier: str) -> bool:
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415

    if Path(classifier).is_dir():
        return all((Path(classifier) / name).is_file() for name in NEEDED_FILES)
    return all(isinstance(try_to_load_from_cache(classifier, name), str) for name in NEEDED_FILES)
