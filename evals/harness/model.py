"""Our model object as lm-eval's ``LM``; imports lm-eval: import this module late.

It differs from lm-eval's own ``HFLM`` in nothing that changes a number: it reports progress, finds
batch sizes on a CPU without trying them out, and refuses a model that answers NaN.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from unlearn.errors import UserError
from unlearn.evals.benchmark import Progress

LARGEST_BATCH = 64
LOGITS_ON_CPU = 2**28
"""Entries of [batch, seq, vocab] per batch on a CPU: 1 GiB in float32, held twice by lm-eval."""

NOT_A_NUMBER = UserError(
    "the model gives NaN instead of probabilities",
    "check its weights; a model in float16 may overflow: load it in float32 or bfloat16",
)


class HarnessModel(HFLM):
    """A loaded model and its tokenizer, unchanged, for lm-eval."""

    def __init__(
        self, model: Any, tokenizer: Any, *, batch_size: int | str, progress: Progress
    ) -> None:
        # lm-eval sets a pad token where there is none
        super().__init__(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            max_batch_size=LARGEST_BATCH,
        )
        self._progress = progress
        self._stage, self._done, self._total = "", 0, 0
        self._checked = False
        self.num_cut = 0
        """Requests too long for the model's context; lm-eval drops their beginning."""

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        kwargs["disable_tqdm"] = True
        longest = self.max_length + 1
        self.num_cut += sum(len(context) + len(end) > longest for _, context, end in requests)
        self._require_known_tokens(requests)
        contexts = {(*context, *end[:-1]) for _, context, end in requests}
        self._begin("scoring", len(contexts))
        found = super()._loglikelihood_tokens(requests, *args, **kwargs)
        if any(math.isnan(log_prob) for log_prob, _ in found):
            raise NOT_A_NUMBER
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
        self._begin("answering", len(requests))
        return super().generate_until(requests, disable_tqdm=True)

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        logits = super()._model_call(inps, *args, **kwargs)
        if not self._checked and logits[:, -1].isnan().any():
            raise NOT_A_NUMBER
        self._checked = True
        self._advance(len(inps))
        return logits

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = super()._model_generate(context, *args, **kwargs)
        self._advance(len(context))
        return found

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        """On a CPU take what a share of memory holds: a batch too large ends the process there."""
        if self.device.type != "cpu":
            done = self._done
            size = int(super()._detect_batch_size(requests, pos))
            self._done = done
            return size
        longest = self.max_length
        if requests:
            _, context, end = requests[pos]
            longest = min(longest, len(context) + len(end))
        vocabulary = self.config.get_text_config().vocab_size
        return max(1, min(LARGEST_BATCH, LOGITS_ON_CPU // (longest * vocabulary)))

    def _require_known_tokens(self, requests: Sequence[Any]) -> None:
        size = self.config.get_text_config().vocab_size
        most = max((max(*context, *end) for _, context, end in requests), default=0)
        if most >= size:
            raise UserError(
                f"the tokenizer writes token {most}, but the model knows {size} tokens",
                "give the tokenizer and the model of one folder that was saved together",
            )

    def _begin(self, stage: str, total: int) -> None:
        self._stage, self._done, self._total = stage, 0, total
        self._progress(stage, 0, total)

    def _advance(self, rows: int) -> None:
        self._done = min(self._total, self._done + rows)
        if self._total:
            self._progress(self._stage, self._done, self._total)
