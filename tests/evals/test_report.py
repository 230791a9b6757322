import copy
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from unlearn.evals.curve import draw_curve
from unlearn.evals.metrics import rouge_l_recall
from unlearn.evals.overlap import Piece, shared_pieces
from unlearn.evals.report import markdown, table, write_report
from unlearn.evals.verdict import Cell, Row, headline, number, verdict

NASTY = '<script>alert("x")</script> ![i](https://evil.example/a.png) [a](b) | `c` & \x1b\u202e'


def detail(value: float | None, error: float | None, direction: str) -> dict[str, Any]:
    return {"value": value, "standard_error": error, "n": 400, "direction": direction}


def results(**changes: Any) -> dict[str, Any]:
    details = {
        "before": {
            "forget_Q_A_Prob": detail(0.9961, 0.0002, "lower"),
            "retain_Q_A_Prob": detail(0.9967, 0.0002, "higher"),
        },
        "after": {
            "forget_Q_A_Prob": detail(0.0208, 0.0031, "lower"),
            "retain_Q_A_Prob": detail(0.9123, 0.0072, "higher"),
        },
        "retain_model": {
            "forget_Q_A_Prob": detail(0.00076, 0.00009, "lower"),
            "retain_Q_A_Prob": detail(0.9935, 0.0003, "higher"),
        },
    }
    given = {
        "run": "runs/r1",
        "status": "complete",
        "method": "npo",
        "model": "runs/r1/model",
        "recipe": "runs/r1/recipe.yaml",
        "report": "runs/r1/report.html",
        "metrics": {
            who: {name: metric["value"] for name, metric in metrics.items()}
            for who, metrics in details.items()
        },
        "details": details,
        "examples": [
            {
                "split": "forget",
                "question": "Where was Ada born?",
                "answer": "Ada was born in Oslo.",
                "before": "Ada was born in Oslo.",
                "after": "Bo was painting",
                "retain_model": "",
            }
        ],
        "training": {
            "steps": 2,
            "seconds": 1.5,
            "tokens": 12345,
            "peak_memory_bytes": 2**30,
            "curve": [
                {"step": 1, "forget/npo": 1.4, "retain/nll": 0.1, "learning_rate": 1e-5},
                {"step": 2, "forget/npo": 0.7, "retain/nll": 0.2, "learning_rate": 1e-5},
            ],
        },
        "provenance": {
            "command": "unlearn run npo --model m --out runs/r1",
            "seed": 7,
            "versions": {"torch": "2.13.0"},
            "forget": {"source": "data#forget10", "rows": 400, "sha256": "ab12"},
            "finished": "2026-01-02T03:04:05+00:00",
        },
    }
    return copy.deepcopy(given) | changes


class Page(HTMLParser):
    """Collect the tags, attributes and visible text of a page; refuse unbalanced tags."""

    VOID = ("meta", "br", "link", "img", "use", "circle", "line", "path", "rect")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


def written(folder: Path, **changes: Any) -> tuple[Page, str]:
    write_report(folder, results(**changes))
    return Page((folder / "report.html").read_text()), (folder / "report.md").read_text()


def test_numbers_appear_as_given(tmp_path: Path) -> None:
    page, text = written(tmp_path)
    for shown in ("0.996", "0.021", "0.912", "0.00076"):
        assert shown in page.text
        assert shown in text
    assert "0.021 ± 0.003" in page.text
    assert "| 0.021 ± 0.003 | 0.00076 ± 0.000090 | ↓ 0.975 |" in text
    assert "12,345 tokens, peak memory 1,024 MiB" in page.text
    for fact in ("torch 2.13.0", "sha256 ab12", "unlearn run runs/r1/recipe.yaml"):
        assert fact in page.text
    assert "| Seed | 7 |" in text
    titles = {attributes.get("title") for _, attributes in page.tags}
    assert {"0.0208", "0.00076"} <= titles  # the exact value, on hovering


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    page, _ = written(tmp_path)
    source = (tmp_path / "report.html").read_text()
    assert not {"script", "img", "link", "iframe", "object", "a"} & {tag for tag, _ in page.tags}
    assert set(re.findall(r"https?://[^\"']*", source)) == {
        "http://www.w3.org/2000/svg",  # names of formats, never fetched
        "http://www.w3.org/1999/xlink",
    }
    assert "url(" not in source.replace("url(#", "")
    assert "@import" not in source


def test_whatever_a_model_writes_is_text(tmp_path: Path) -> None:
    example = dict.fromkeys(("question", "answer", "before", "after", "retain_model"), NASTY)
    page, text = written(
        tmp_path,
        method=NASTY,
        model=NASTY,
        run=NASTY,
        status=NASTY,
        recipe=NASTY,
        examples=[example | {"split": NASTY}],
        provenance={"command": NASTY, NASTY: {NASTY: NASTY}},
    )
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert '<script>alert("x")</script>' in page.text
    outside_code = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    assert not re.search(r"(?<!\\)<script|(?<!\\)!\[i|(?<!\\)\[a\]", outside_code)
    assert "\x1b" not in text
    assert "\u202e" not in (tmp_path / "report.html").read_text()


def test_markdown_is_escaped_to_what_was_written() -> None:
    assert markdown("a_b *c* | d") == r"a\_b \*c\* \| d"
    assert markdown("one\ntwo") == "one ↵ two"
    assert markdown("see https://x.y") == r"see https\://x.y"
    assert markdown("lone \ud800 surrogate") == "lone \ufffd surrogate"
    assert markdown("# 3.5 (fine), plain.") == r"\# 3.5 (fine), plain."


def test_without_a_retain_model_the_report_says_so(tmp_path: Path) -> None:
    given = results()
    metrics = {who: given["metrics"][who] for who in ("before", "after")}
    details = {who: given["details"][who] for who in ("before", "after")}
    page, text = written(tmp_path, metrics=metrics, details=details)
    for report in (page.text, text):
        assert "No retain model was given" in report
        assert "Compared with the retain model" not in report
    assert "| Before | After | Change |" in text


def test_a_broken_model_is_not_hidden(tmp_path: Path) -> None:
    given = results()
    given["metrics"]["after"]["forget_Q_A_Prob"] = None
    given["details"]["after"]["forget_Q_A_Prob"] = detail(None, None, "lower")
    page, text = written(tmp_path, metrics=given["metrics"], details=given["details"])
    for report in (page.text, text):
        assert "went from 0.996 to not a number on the forget set" in report
    assert "**not a number**" in text


def test_nan_counts_as_not_a_number() -> None:
    given = results()
    given["details"]["after"]["forget_Q_A_Prob"]["value"] = math.nan
    given["details"]["after"]["forget_Q_A_Prob"]["standard_error"] = math.inf
    row = table(given)[0]
    assert row.after == Cell(None, None, 400)
    assert row.change is None


def test_a_run_without_retain_set_curve_or_answers(tmp_path: Path) -> None:
    metrics = {"before": {"forget_Q_A_Prob": 0.9}, "after": {"forget_Q_A_Prob": 0.1}}
    page, text = written(
        tmp_path, metrics=metrics, details={}, examples=[], training={}, provenance={}
    )
    assert "Nothing was measured on the retain set" in page.text
    assert "No training curve was recorded" in text
    assert not (tmp_path / "curve.svg").exists()
    assert "curve.svg" not in text


def test_an_unfinished_run_is_marked(tmp_path: Path) -> None:
    page, text = written(tmp_path, status="interrupted")
    assert "This run is not complete (status: interrupted)" in page.text
    assert "This run is not complete (status: interrupted)" in text
    page, _ = written(tmp_path)
    assert "not complete" not in page.text


def test_partly_measured_sets_are_named(tmp_path: Path) -> None:
    provenance = {"forget": {"source": "f", "rows": 4000}, "retain": {"source": "r", "rows": 400}}
    page, _ = written(tmp_path, provenance=provenance)
    assert "Only the first 400 of the 4000 rows of the forget set were measured." in page.text
    assert "of the retain set were measured" not in page.text


def test_long_answers_are_cut_and_empty_ones_named(tmp_path: Path) -> None:
    example = results()["examples"][0] | {"after": "word " * 1000}
    page, text = written(tmp_path, examples=[example])
    assert "3500 more characters" in page.text
    assert "(nothing)" in page.text
    assert "(nothing)" in text


def test_shared_words_are_marked(tmp_path: Path) -> None:
    page, text = written(tmp_path)
    source = (tmp_path / "report.html").read_text()
    assert "<mark>Ada was born in Oslo</mark>." in source
    assert "Bo <mark>was</mark> painting" in source
    assert "| After | Bo **was** painting |" in text
    assert page.text.count("Ada was born in Oslo.") == 2


def test_the_same_results_give_the_same_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name in ("a", "b"):
        write_report(tmp_path / name, results())
    for file in ("report.html", "report.md", "curve.svg"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


# the verdict


def row(name: str, before: float, after: float, retain: float | None = None) -> Row:
    cells = [Cell(value, 0.01, 100) for value in (before, after)]
    return Row(name, "lower", *cells, None if retain is None else Cell(retain, 0.01, 100))


def test_the_verdict_by_hand() -> None:
    found = verdict([row("forget_Q_A_Prob", 0.9, 0.3, 0.1), row("retain_Q_A_Prob", 0.8, 0.6, 0.79)])
    assert [paragraph.text for paragraph in found] == [
        "On the forget set (100 rows), the probability of the true answer fell from 0.900 to "
        "0.300.",
        "On the retain set (100 rows), 75.0 % of the probability of the true answer was kept "
        "(0.800 before, 0.600 after).",
        "Compared with the retain model on the forget set, probability is 0.200 above its 0.100. "
        "Compared with the retain model on the retain set, probability is 0.190 below its 0.790. "
        # (0.9 - 0.3) / (0.9 - 0.1)
        "Of the way on the forget set from the model before unlearning to the retain model, 75 % "
        "was covered in probability.",
    ]


def test_a_change_within_the_error_is_not_called_one() -> None:
    # two combined standard errors are 2 * sqrt(2) * 0.01 = 0.0283
    small, large = row("forget_Q_A_Prob", 0.5, 0.475, 0.5), row("forget_Q_A_Prob", 0.5, 0.47, 0.5)
    assert "shows no sure change (0.500 before, 0.475 after)" in verdict([small])[0].text
    assert "no sure change (0.500 before, 0.475 after) on the forget set" in headline([small])
    assert "fell from 0.500 to 0.470" in verdict([large])[0].text
    assert "no sure difference from its 0.500" in verdict([small])[2].text
    assert "covered" not in verdict([large])[2].text  # there was no way to go


def test_failed_unlearning_is_told_as_it_is() -> None:
    rows = [row("forget_Q_A_Prob", 0.5, 0.9), row("retain_Q_A_Prob", 0.9, 0.1)]
    assert headline(rows) == (
        "The probability of the true answers rose from 0.500 to 0.900 on the forget set and fell "
        "from 0.900 to 0.100 on the retain set."
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0.000"),
        (1.0, "1.000"),
        (0.02081, "0.021"),
        (-0.5, "-0.500"),
        (0.001, "0.001"),
        (0.00076193, "0.00076"),
        (0.00001234, "0.000012"),
        (1.234e-9, "1.2e-09"),
        (None, "not a number"),
        (math.nan, "not a number"),
    ],
)
def test_number(value: float | None, shown: str) -> None:
    assert number(value) == shown


# shared words


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        ("Ada was born in Oslo.", "Ada was born in Oslo."),
        ("Ada was born in Oslo.", "in Oslo, Ada was  born!"),
        ("She writes novels", "She was writing a novel — again: novels"),
        ("a b c d e f", "f e d c b a c d"),
        ("Ada", ""),
        ("", "Ada"),
        ("Éa’s café", "Éa’s café ☕"),
    ],
)
def test_marked_words_are_those_that_rouge_counts(truth: str, answer: str) -> None:
    pieces = shared_pieces(truth, answer)
    assert "".join(piece.text for piece in pieces) == answer
    marked = sum(len(re.findall("[A-Za-z0-9]+", p.text)) for p in pieces if p.shared)
    total = len(re.findall("[A-Za-z0-9]+", truth))
    assert (marked / total if total else 0.0) == pytest.approx(rouge_l_recall(truth, answer))


def test_words_between_shared_ones_are_not_marked() -> None:
    assert shared_pieces("Ada was born", "Ada, was she born?") == [
        Piece("Ada, was", True),
        Piece(" she ", False),
        Piece("born", True),
        Piece("?", False),
    ]


# the curve


def test_the_curve_names_every_line_and_nothing_else() -> None:
    svg = draw_curve(results()["training"]["curve"])
    assert svg is not None
    for label in ("Forget set", "Retain set", "npo 0.7", "nll 0.2", "optimiser step"):
        assert f">{label}<" in svg
    assert "learning_rate" not in svg


@pytest.mark.parametrize(
    "curve",
    [[], [{"step": 1, "learning_rate": 1e-5}], [{"step": 1, "forget/npo": None}]],
    ids=["empty", "no loss", "nothing finite"],
)
def test_without_a_loss_there_is_no_curve(curve: list[dict[str, Any]]) -> None:
    assert draw_curve(curve) is None


def test_gaps_and_single_points_are_drawn() -> None:
    svg = draw_curve([{"step": 1, "forget/npo": math.nan}, {"step": 2, "forget/npo": 0.5}])
    assert svg is not None
    assert ">npo 0.5<" in svg
    assert "nan" not in svg.lower()


def test_objective_names_are_escaped(tmp_path: Path) -> None:
    curve = [{"step": 1, "forget/<script>$x^2$": 1.0}]
    page, _ = written(tmp_path, training={"curve": curve})
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script>$x^2$ 1" in page.text
