"""Comparing drafted with plain text: ties up to rounding are counted, anything else fails."""

from typing import Any

import pytest
import torch

from unlearn.errors import RunFailed
from unlearn.evals import mtp
from unlearn.evals.mtp import measure_drafts, plain_decode, summary
from unlearn.mtp.decode import Written
from unlearn.mtp.predictor import MaskPredictor
from unlearn.mtp.settings import Shape

PROMPT = [5, 9, 2]


class Endless:
    eos_token_id = None


@pytest.fixture
def predictor(tiny_model: Any) -> Any:
    made = MaskPredictor(tiny_model, Shape(k=2, rank=2))
    yield made
    made.detach()


def written_instead(monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> None:
    """Let decoding with drafts write these tokens."""
    monkeypatch.setattr(mtp, "decode", lambda *args, **kwargs: Written(tokens, 3, [(0, 0)] * 3))


def measured(predictor: Any) -> Any:
    return measure_drafts(predictor, Endless(), {"": [PROMPT]}, max_new_tokens=4)


def test_plain_text_is_that_of_generate(predictor: Any) -> None:
    ids = torch.tensor([PROMPT])
    how = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": [], "pad_token_id": 0}
    theirs = predictor.model.generate(ids, **how)[0, 3:].tolist()
    assert plain_decode(predictor.model, PROMPT, max_new_tokens=6, stops=frozenset()) == theirs
    cut = plain_decode(predictor.model, PROMPT, max_new_tokens=6, stops=frozenset(theirs[:1]))
    assert cut == theirs[:1]


def test_texts_that_part_where_no_tie_is_are_a_failure(
    predictor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = plain_decode(predictor.model, PROMPT, max_new_tokens=4, stops=frozenset())
    least = predictor.model(torch.tensor([[*PROMPT, plain[0]]])).logits[0, -1].argmin()
    written_instead(monkeypatch, [plain[0], int(least), *plain[2:]])
    with pytest.raises(RunFailed, match=f"prompt 1: token 2 is .{int(least)}. with drafts"):
        measured(predictor)
    written_instead(monkeypatch, plain[:2])
    with pytest.raises(RunFailed, match=r"token 3 is \[\] with drafts"):
        measured(predictor)


def test_a_tie_up_to_rounding_is_counted(predictor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens of one unembedding row have one logit: the first is chosen, the other a tie."""
    plain = plain_decode(predictor.model, PROMPT, max_new_tokens=1, stops=frozenset())[0]
    head = predictor.model.get_output_embeddings()
    head.weight.data[plain + 1] = head.weight.data[plain]
    written_instead(monkeypatch, [plain + 1, 1, 2, 3])
    told = summary(measured(predictor))["all"]
    assert (told["identical"], told["tied"]) == (0, 1)


def test_shares_of_few_drafts_are_not_drawn() -> None:
    """The third place was checked 4 times, which is one too few."""
    part = {"acceptance": [0.9, 0.5, 1.0], "checked": [40, 5, 4]}
    assert mtp.often_checked(part) == ([1, 2], [0.9, 0.5])
    assert mtp.acceptance_plot({"domains": {"chat": part}}).title == mtp.TITLE
    nothing = {"acceptance": [], "checked": []}
    assert mtp.acceptance_plot({"domains": {"chat": nothing}}).svg.startswith("<svg")
