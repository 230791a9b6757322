"""Documents in windows: token streams, window scores, passages, and where they lie."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unlearn.detect import token_stream as stream
from unlearn.detect.engine import TextScorer
from unlearn.detect.settings import Settings
from unlearn.detect.spans import Profile, primary_score
from unlearn.detect.text import Text
from unlearn.detect.windows import Strides, Window, score_windows
from unlearn.errors import UserError
from unlearn.evals.report.heatmap import segments, write_heatmap
from unlearn.models import load_model, load_tokenizer

ROOT = Path(__file__).parents[2]
TEXT = "The quick brown fox jumps over the lazy dog. Ada was born in Oslo;  Bo paints 東京 boats.\n"


def pieces(text: str, size: int) -> Any:
    return (text[start : start + size] for start in range(0, len(text), size))


def flat(blocks: Any) -> list[Window]:
    return [window for block in blocks for window in block]


# Tokens


@pytest.mark.parametrize("part", [40, 300, 2**16])
@pytest.mark.parametrize("size", [7, 1000])
def test_tokens_of_a_stream_are_those_of_the_whole_text(
    part: int, size: int, tiny_tokenizer: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(stream, "PART", part)
    text = TEXT * 20
    found = list(stream.token_stream(pieces(text, size), tiny_tokenizer))
    whole = tiny_tokenizer(text, return_offsets_mapping=True)
    assert np.concatenate([one.ids for one in found]).tolist() == whole["input_ids"]
    spans = [pair for one in found for pair in zip(one.starts, one.ends, strict=True)]
    assert spans == [tuple(pair) for pair in whole["offset_mapping"]]
    assert "".join(one.text for one in found) == text


@pytest.mark.parametrize("name", ["stories260k", "tofu-tiny-target"])
def test_tokens_of_real_tokenizers_too(name: str, shared: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(stream, "PART", 1500)
    tokenizer = load_tokenizer(str(shared / "models" / name))
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = list(stream.token_stream(pieces(text, 317), tokenizer))
    assert len(found) > 5
    ids = np.concatenate([one.ids for one in found]).tolist()
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_stream_of_nothing_has_no_tokens(tiny_tokenizer: Any) -> None:
    assert list(stream.token_stream(iter([]), tiny_tokenizer)) == []
    assert list(stream.token_stream(iter(["", ""]), tiny_tokenizer)) == []


# Scores of windows


@pytest.mark.parametrize("bos", ["auto", "always"])
def test_windows_are_those_of_strided_passes(
    bos: Any, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """Every token's log-probability from a pass of its own, laid out as the module says.

    Contexts of 32 ids advance by half of their room; windows of 20 tokens by 8, and one at the end.
    """
    scorer = TextScorer.of(tiny_model, tiny_tokenizer, Settings(bos=bos, k=(0.3,)))
    text = TEXT * 3
    front = [1] if bos == "always" else []
    ids = tiny_tokenizer(text)["input_ids"]
    room = 32 - len(front)
    log_probs: list[float] = []
    done = 0
    while done < len(ids):
        end = min(len(ids), done + (room // 2 if done else room))
        row = front + ids[max(0, end - room) : end]
        with torch.no_grad():
            logits = tiny_model(input_ids=torch.tensor([row])).logits[0, :-1]
        each = logits.log_softmax(-1).gather(-1, torch.tensor(row[1:])[:, None])[:, 0].tolist()
        fresh = end - done - (0 if done or front else 1)
        log_probs += each[len(each) - fresh :]
        done = end
    found = flat(score_windows(scorer, pieces(text, 50), Strides(20, 8, 32)))
    last = len(log_probs) - 20
    assert [one.start_token for one in found] == sorted({*range(0, last + 1, 8), last})
    for one in found:
        values = np.sort(log_probs[one.start_token :][:20])
        assert one.num_tokens == 20
        assert one.scores["loss"] == pytest.approx(values.mean(), abs=1e-5)
        assert one.scores["mink"] == pytest.approx(values[:6].mean(), abs=1e-5)


def test_a_document_within_the_context_scores_as_the_text(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    scorer = TextScorer.of(tiny_model, tiny_tokenizer, Settings())
    (one,) = flat(score_windows(scorer, [TEXT]))
    (text,) = scorer([Text(0, TEXT)])
    assert one.scores == pytest.approx(text.scores, abs=1e-6)
    assert (one.num_tokens, TEXT[one.start : one.end]) == (text.num_tokens, TEXT[1:])


def test_how_a_document_comes_in_changes_nothing(
    tiny_model: Any, tiny_tokenizer: Any, monkeypatch: Any
) -> None:
    scorer = TextScorer.of(tiny_model, tiny_tokenizer, Settings(batch_tokens=64))
    strides = Strides(16, 8, 32)
    whole = flat(score_windows(scorer, [TEXT * 12], strides))
    monkeypatch.setattr(stream, "PART", 100)
    for one, two in zip(
        whole, flat(score_windows(scorer, pieces(TEXT * 12, 33), strides)), strict=True
    ):
        assert (one.start, one.end) == (two.start, two.end)
        assert one.scores == pytest.approx(two.scores, abs=1e-5)


@pytest.mark.parametrize("repeats", [1, 12])
def test_skipped_windows_leave_the_others_as_they_are(
    repeats: int, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    scorer = TextScorer.of(tiny_model, tiny_tokenizer, Settings(batch_tokens=64))
    strides = Strides(16, 8, 32)
    whole = flat(score_windows(scorer, [TEXT * repeats], strides))
    for skip in {1, 2, len(whole) // 2, len(whole) - 1, len(whole)}:
        found = flat(score_windows(scorer, [TEXT * repeats], strides, skip=skip))
        assert [one.start_token for one in found] == [one.start_token for one in whole[skip:]]
        for one, two in zip(found, whole[skip:], strict=True):
            assert one.scores == pytest.approx(two.scores, abs=1e-5)
            assert (one.start, one.end) == (two.start, two.end)


def test_p_values_count_the_references_that_score_as_high(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    scorer = TextScorer.of(tiny_model, tiny_tokenizer, Settings(scores=("loss", "mink")))
    strides = Strides(16, 8, 32)
    plain = flat(score_windows(scorer, [TEXT * 4], strides))
    others = sorted(one.scores["loss"] or 0.0 for one in plain)
    calibrated = flat(
        score_windows(
            scorer, [TEXT * 4], strides,
            references={"loss": others, "mink": lambda scores: np.full(len(scores), 0.25)},
        )
    )  # fmt: skip
    best = max(calibrated, key=lambda one: one.scores["loss"] or 0.0)
    # it is among the references itself; scores are stored with seven digits
    assert best.p["loss"] == pytest.approx(1 / (len(others) + 1), abs=1.01 / (len(others) + 1))
    assert {one.p["mink"] for one in calibrated} == {0.25}
    far = flat(score_windows(scorer, [TEXT], strides, references={"loss": [-99.0] * 9}))
    assert {one.p["loss"] for one in far} == {0.1}


def test_windows_refuse_what_needs_other_passes_and_strides_that_leave_gaps(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    scorer = TextScorer.of(tiny_model, tiny_tokenizer, Settings(scores=("loss", "pac")))
    with pytest.raises(UserError, match="windows have no score 'pac'"):
        flat(score_windows(scorer, [TEXT]))
    with pytest.raises(UserError, match="stride=9 does not fit window=8"):
        Strides(8, 9)


# Passages


def profile(values: list[float], p: list[float] | None = None) -> Profile:
    """Give windows of 10 characters every 5."""
    found = Profile("loss")
    found.add(
        [
            Window(5 * n, 10, 5 * n, 5 * n + 10, {"loss": value}, {"loss": p[n]} if p else {})
            for n, value in enumerate(values)
        ]
    )
    return found


def test_neighbouring_windows_that_stand_out_are_one_passage() -> None:
    """Windows 1 and 2 overlap and 7 stands apart; the longer passage comes first."""
    found = profile([0.0] * 9, p=[0.5, 0.04, 0.01, 0.5, 0.5, 0.5, 0.5, 0.05, 0.06])
    first, second = found.spans(0.05)
    assert (first.start, first.end, first.num_tokens, first.num_windows) == (5, 20, 15, 2)
    assert (first.p, second.p) == (0.01, 0.05)
    assert (second.start, second.end) == (35, 45)


def test_without_a_calibration_windows_are_ranked_within_the_document() -> None:
    """The best of 20 windows is the top 5 %; ties share the lower rank."""
    found = profile([float(n) for n in range(20)])
    assert found.basis == "rank"
    assert [(span.start, span.p) for span in found.spans(0.05)] == [(95, None)]
    assert profile([1.0] * 20).spans(0.05) == []


def test_the_score_to_judge_by() -> None:
    assert primary_score(("loss", "mink", "minkpp")) == "minkpp"
    assert primary_score(("ppl", "zlib")) == "zlib"


def test_segments_cover_the_text_and_take_the_mean_of_their_windows() -> None:
    """Between 5 and 10 lie windows of p 0.5 and 0.0045: their geometric mean is 0.047."""
    text = "abcdefghijklmno" + "pqrst"
    found = segments(text, profile([0.0, 0.0], p=[0.5, 0.0045]))
    assert "".join(one.text for one in found) == text
    assert [(one.text, one.level) for one in found] == [
        ("abcde", 1), ("fghij", 3), ("klmno", 4), ("pqrst", 0),
    ]  # fmt: skip


def test_the_page_needs_nothing_and_runs_nothing(tmp_path: Path) -> None:
    text = "<script>alert(1)</script> & more of it"
    path = tmp_path / "map.html"
    found = profile([0.0] * 5, p=[0.5, 0.001, 0.001, 0.5, 0.5])
    write_heatmap(path, name="<b>", text=text, size=99, profile=found, about=[("Model", "m&m")])
    page = path.read_text()
    assert "<script" not in page
    assert "&lt;scri" in page
    assert "http" not in page.replace("http-equiv", "")
    assert 'id="passage-1"' in page
    assert 'href="#passage-1"' in page
    assert f"{99 - len(text)} more characters" in page


def test_a_story_is_found_in_other_english(shared: Path) -> None:
    """stories260k wrote the story; its windows against those of other English, at p <= 0.05."""
    path = str(shared / "models" / "stories260k")
    model, tokenizer = load_model(path), load_tokenizer(path)
    torch.manual_seed(0)
    start = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    written = model.generate(input_ids=start, do_sample=True, temperature=0.8, max_new_tokens=400)
    story = tokenizer.decode(written[0], skip_special_tokens=True)
    other = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")[:6000]
    scorer = TextScorer.of(model, tokenizer, Settings(scores=("minkpp",)))
    strides = Strides(64, 32)
    unseen = (ROOT / "docs" / "selection.md").read_text(encoding="utf-8")[:8000]
    references = [one.scores["minkpp"] for one in flat(score_windows(scorer, [unseen], strides))]
    text = f"{other[:3000]}\n\n{story}\n\n{other[3000:]}"
    found = Profile("minkpp")
    found.add(flat(score_windows(scorer, [text], strides, references={"minkpp": references})))
    best = found.spans()[0]
    begin, end = 3002, 3002 + len(story)
    shared_part = min(end, best.end) - max(begin, best.start)
    assert shared_part / (max(end, best.end) - min(begin, best.start)) >= 0.6
