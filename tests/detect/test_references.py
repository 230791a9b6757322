"""References cut to a length score as fresh runs of the cut text; judging rests on them."""

from typing import Any

import numpy as np
import pytest

from unlearn.detect.conformal import NotCalibrated
from unlearn.detect.engine import TextScorer
from unlearn.detect.english import generic_english
from unlearn.detect.judge import judge, with_dataset_test, with_members
from unlearn.detect.references import References
from unlearn.detect.settings import Settings
from unlearn.detect.text import Text
from unlearn.errors import UserError

NAMES = ("loss", "zlib", "mink", "minkpp", "gapk", "dcpdd")
TEXTS = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "Bo paints small boats in the morning.",
    "Ada.",
    "x",
]


@pytest.fixture
def scorer(tiny_model: Any, tiny_tokenizer: Any) -> TextScorer:
    table = generic_english(tiny_tokenizer).frequencies()
    settings = Settings(scores=NAMES, k=(0.2, 0.4), min_tokens=1)
    return TextScorer.of(tiny_model, tiny_tokenizer, settings, frequencies=table)


def test_cut_references_score_as_fresh_runs(
    scorer: TextScorer, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """At every length, against a scorer that is given no more than that many tokens."""
    references = References.of(scorer, TEXTS)
    table = generic_english(tiny_tokenizer).frequencies()
    for tokens in (1, 2, 5, 11, 20):
        short = Settings(scores=NAMES, k=(0.2, 0.4), max_tokens=tokens + 1)
        fresh = TextScorer.of(tiny_model, tiny_tokenizer, short, frequencies=table)
        rows = [row for row in fresh(Text(n, t) for n, t in enumerate(TEXTS))
                if row.num_tokens == tokens]  # fmt: skip
        found = references.at(tokens)
        assert set(found) == {"loss", "zlib", "mink", "mink_0.4", "minkpp", "minkpp_0.4", "gapk",
                              "gapk_0.4", "dcpdd"}  # fmt: skip
        for name, values in found.items():
            expected = sorted(row.scores[name] for row in rows)  # type: ignore[type-var]
            assert sorted(values) == pytest.approx(expected, abs=2e-5), (name, tokens)


def test_whole_references_score_as_texts(scorer: TextScorer) -> None:
    rows = [row for row in scorer(Text(n, t) for n, t in enumerate(TEXTS)) if row.num_tokens]
    found = References.of(scorer, TEXTS).at()
    for name, values in found.items():
        expected = sorted(row.scores[name] for row in rows)  # type: ignore[type-var]
        assert sorted(values) == pytest.approx(expected, abs=2e-5)


def test_references_without_a_token_are_refused(scorer: TextScorer) -> None:
    with pytest.raises(UserError, match="no reference text has a token"):
        References.of(scorer, ["x", ""])


def many(count: int, seed: int) -> list[str]:
    words = [word for text in TEXTS[:2] for word in text.split()]
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(words, 4 + n % 9)) for n in range(count)]


def test_texts_like_the_references_are_rarely_called(scorer: TextScorer) -> None:
    """200 texts, at 5 %: 10 are expected, more than 20 have a probability of 0.1 %."""
    texts = [Text(n, text) for n, text in enumerate(many(200, 0))]
    found = judge(scorer, texts, many(300, 1))
    assert found.decisions.primary == "minkpp"
    assert found.decisions.member.sum() <= 20
    rows = found.rows()
    assert [row["id"] for row in rows] == list(range(200))
    enough = [row["references"] >= 19 for row in rows]
    assert [row["decision"] is not None for row in rows] == enough
    assert 100 < sum(enough) < 200
    used = {row["n_tokens"]: row["references"] for row in rows}
    assert used[min(used)] > used[max(used)]  # long texts have fewer references
    summary = found.summary()
    assert summary["called"] == sum(row["decision"] == "member" for row in rows)
    assert not summary["checks"]["shifted"]
    assert with_dataset_test(found).summary()["dataset_test"]["p"] > 0.01


def test_known_members_tell_how_many_are_found(scorer: TextScorer) -> None:
    """Members that are references again score exactly as high as these: hardly any is called."""
    references = many(60, 1)
    texts = [Text(0, TEXTS[1])]
    found = judge(scorer, texts, references, primary="loss", fpr=0.1, match_length=False)
    told = with_members(found, [Text(n, text) for n, text in enumerate(references[:30])])
    assert told.found_members is not None
    assert told.found_members.n == 30
    assert told.found_members.count <= 5  # the tenth of 60 that score highest
    assert told.found_members.low <= told.found_members.count / 30 <= told.found_members.high
    assert "Of 30 known members" in told.summary()["verdict"][-1]
    assert told.summary()["known_members"]["n"] == 30


def test_whole_references_on_request(scorer: TextScorer) -> None:
    texts = [Text(n, text) for n, text in enumerate(many(5, 0))]
    found = judge(scorer, texts, many(30, 1), primary="loss", match_length=False)
    assert set(found.decisions.references) == {30}


def test_too_few_references_are_refused(scorer: TextScorer) -> None:
    with pytest.raises(NotCalibrated, match="need at least 19"):
        judge(scorer, [Text(0, TEXTS[0])], many(18, 1), match_length=False)
