import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from unlearn.evals.report.curve import draw_curve
from unlearn.evals.report.page import markdown
from unlearn.evals.report.table import Cell, table
from unlearn.evals.report.write import write_report

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

    VOID = ("meta", "br", "wbr", "link", "img", "use", "circle", "line", "path", "rect")

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
    for fact in ("versions · torch2.13.0", "forget · sha256ab12"):  # a name and a value cell
        assert fact in page.text
    assert "unlearn run runs/r1/recipe.yaml" in page.text
    assert "| seed | 7 |" in text
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


# everything a report can have


def test_a_model_alone_is_described_without_before_and_after(tmp_path: Path) -> None:
    given = results()
    metrics = {who: given["metrics"][who] for who in ("after", "retain_model")}
    details = {who: given["details"][who] for who in ("after", "retain_model")}
    page, text = written(tmp_path, metrics=metrics, details=details, method="", examples=[])
    for shown in (page.text, text):
        assert (
            "The probability of the true answers is 0.021 on the forget set "
            "(retain model: 0.00076) and 0.912 on the retain set (retain model: 0.994)."
        ) in shown
        assert "Change" not in shown
        assert "Before" not in shown
    assert "| Model | Retain model |" in text


def rich() -> dict[str, Any]:
    """Give results with every part that a report can have."""
    given = results()
    given["details"]["after"]["forget_Q_A_Prob"] |= {"low": 0.015, "high": 0.027}
    counts = {"rule": "ROUGE-L recall ≥ 0.9", "leaked": 2, "n": 400, "upper": 0.01566}
    return given | {
        "truth_ratios": {"before": [0.1, 0.2], "after": [1.0, 2.0, 3.0],
                         "retain_model": [2.5, 3.5, 4.5]},
        "leakage": {"after": counts, "retain_model": counts | {"leaked": 0, "upper": 0.00746}},
        "steps": [{"step": 5, "metrics": {"forget_Q_A_Prob": 0.123, "retain_Q_A_Prob": 0.456}}],
        "selected": {"step": 5, "metric": "forget_Q_A_Prob", "value": 0.1,
                     "constraints": {"retain_Q_A_Prob": 0.4}, "satisfied": False},
        "settings": {"tofu": {"split": "forget10"}},
        "warnings": ["Nobody checked the holdout rows."],
    }  # fmt: skip


def test_page_markdown_and_json_say_the_same(tmp_path: Path) -> None:
    write_report(tmp_path, rich())
    page = Page((tmp_path / "report.html").read_text()).text
    text = (tmp_path / "report.md").read_text().replace("\\", "")
    stored = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    for shown in (
        "0.015 to 0.027",
        "KS distance 0.667, p = 0.600, log10 p = -0.222 (3 and 3 rows)",
        "2 of 400",
        "0.50 %",
        "0.75 %",
        "Step 5 was kept: the best forget_Q_A_Prob of the measured steps within "
        "retain_Q_A_Prob 0.4; no step met the constraints, this one misses them least.",
        "0.123",
        "0.456",
        "Nobody checked the holdout rows.",
        "tofu · split",
        *stored["limits"],
        *stored["reading"],
        *(finding["text"] for finding in stored["findings"]),
    ):
        assert shown in page
        assert shown in text
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.html", "report.md", "report.json", "curve.svg", "truth-ratios.svg", "trade-off.svg"
    }  # fmt: skip
    assert stored["leakage"][0]["share"] == 0.005
    assert stored["truth_ratios"]["distances"]["after"]["place"] == 2.0


def test_no_number_that_json_lacks_is_written(tmp_path: Path) -> None:
    given = rich()
    given["truth_ratios"]["after"] = [1.0, math.nan, math.inf]
    given["details"]["after"]["retain_Q_A_Prob"]["standard_error"] = math.nan
    given["training"]["curve"][0]["forget/npo"] = math.nan
    given["examples"][0]["after"] = "half \ud800"
    write_report(tmp_path, given)
    stored = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert "2 ratios that are not numbers were left out." in stored["truth_ratios"]["note"]


def test_hostile_text_in_the_parts_of_a_large_report(tmp_path: Path) -> None:
    given = rich()
    given["leakage"]["after"]["rule"] = NASTY
    given["warnings"] = [NASTY]
    given["settings"] = {NASTY: {NASTY: [NASTY, {NASTY: NASTY}]}}
    given["selected"]["metric"] = NASTY
    for part in ("metrics", "details"):
        given[part]["after"][NASTY] = 0.5 if part == "metrics" else detail(0.5, None, "lower")
    write_report(tmp_path, given)
    page = Page((tmp_path / "report.html").read_text())
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert page.text.count('<script>alert("x")</script>') >= 8
    text = (tmp_path / "report.md").read_text()
    outside_code = re.sub(r"`[^`]*`|^    .*$", "", text, flags=re.MULTILINE)
    assert not re.search(r"(?<!\\)<script|(?<!\\)!\[i|(?<!\\)\[a\]", outside_code)


# the curve


def test_the_curve_names_every_line_and_nothing_else() -> None:
    plot = draw_curve(results()["training"]["curve"])
    assert plot is not None
    svg = plot.svg
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
    plot = draw_curve([{"step": 1, "forget/npo": math.nan}, {"step": 2, "forget/npo": 0.5}])
    assert plot is not None
    assert ">npo 0.5<" in plot.svg
    assert "nan" not in plot.svg.lower()


def test_objective_names_are_escaped(tmp_path: Path) -> None:
    curve = [{"step": 1, "forget/<script>$x^2$": 1.0}]
    page, _ = written(tmp_path, training={"curve": curve})
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script>$x^2$ 1" in page.text
