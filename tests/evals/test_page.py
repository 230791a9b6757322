"""The pages as a browser sees them: nothing loaded, nothing logged, plots there, light and dark."""

import base64
import fcntl
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from unlearn.evals.report.folders import Found
from unlearn.evals.report.leaderboard import write_reports
from unlearn.evals.report.write import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
    "--host-resolver-rules=MAP * ~NOTFOUND",  # whatever the browser asks for itself stays here
    "--remote-debugging-pipe",
)
WIRE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Starts the browser, which reads from descriptor 3 and writes to 4."""

WIDE, NARROW = 1280, 400
LONG = "0123456789abcdef" * 4


def metric(value: float, direction: str = "lower") -> dict[str, Any]:
    low, high = value - 0.01 * abs(value), value + 0.01 * abs(value)
    return {"value": value, "standard_error": 0.002, "low": low, "high": high, "n": 400,
            "direction": direction}  # fmt: skip


def tofu_results(seed: int = 1, forget: float = 0.04) -> dict[str, Any]:
    """Build results of the size TOFU gives, with every plot."""
    values = {"before": (0.99, 0.99, 1e-50), "after": (forget, 0.95, 0.2),
              "retain_model": (0.001, 0.98, 1.0)}  # fmt: skip
    details = {
        who: {
            "forget_Q_A_Prob": metric(a),
            "extraction_strength": metric(a),
            "retain_Q_A_Prob": metric(b, "higher"),
            "ra_Q_A_Prob_normalised": metric(b, "higher"),
            "wf_Q_A_ROUGE": metric(b, "higher"),
            "mia_min_k": metric(0.5, "none"),
            "privleak": metric(-12.3456, "none"),
            "model_utility": metric(b - 0.1, "higher"),
            "forget_quality": metric(p, "higher"),
        }
        for who, (a, b, p) in values.items()
    }
    example = {"split": "forget", "question": "Where was Ada born? " + LONG, "answer": "In Oslo.",
               "before": "In Oslo.", "after": LONG * 3, "retain_model": ""}  # fmt: skip
    ratios = [math.exp(math.sin(number)) for number in range(40)]
    return {
        "status": "complete",
        "method": "npo",
        "model": "runs/r/model",
        "recipe": "runs/r/recipe.yaml",
        "metrics": {w: {k: d["value"] for k, d in m.items()} for w, m in details.items()},
        "details": details,
        "examples": [example] * 5,
        "training": {
            "steps": 20,
            "curve": [{"step": s, "forget/npo": 1 / s, "retain/nll": 0.1} for s in range(1, 21)],
        },
        "truth_ratios": {
            "before": [0.2 * x for x in ratios],
            "after": [0.9 * x for x in ratios],
            "retain_model": ratios,
        },
        "leakage": {
            "after": {"rule": "ROUGE-L recall ≥ 0.9", "leaked": 1, "n": 400, "upper": 0.0118}
        },
        "steps": [
            {"step": s, "metrics": {"forget_Q_A_Prob": 1 / s, "retain_Q_A_Prob": 1 - s / 100}}
            for s in range(2, 20, 2)
        ],
        "selected": {"step": 10, "metric": "forget_Q_A_Prob", "value": 0.1, "constraints": {}},
        "settings": {"tofu": {"split": "forget10"}},
        "warnings": ["A warning with a long path: /data/" + LONG],
        "provenance": {
            "seed": seed,
            "model_sha256": LONG,
            "forget": {"sha256": LONG},
            "command": f"unlearn run npo --model {LONG} --out runs/r",
        },
    }


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    write_report(folder, tofu_results())
    return folder / "report.html"


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    found = [
        Found(Path(f"runs/r{n}"), tofu_results(n, 0.04 * n), {"method": "npo", "beta": f"{n // 2}",
                                                              "seed": str(n)})
        for n in range(1, 5)
    ]  # fmt: skip
    write_reports(folder, found)
    return folder / "report.html"


@pytest.fixture(params=["single", "several"])
def page(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


# without a browser


class Checked(HTMLParser):
    """Collect ids, references and what a page would load; refuse unbalanced tags."""

    VOID = frozenset({"meta", "br", "wbr", "link", "img", "input", "hr"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.targets: set[str] = set()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.policy = ""
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._note(tag, dict(attrs))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self._note(tag, dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def _note(self, tag: str, attributes: dict[str, str | None]) -> None:
        self.tags.append(tag)
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(attributes["content"])
        for name, value in attributes.items():
            if name == "id":
                self.ids.append(str(value))
            references = re.findall(r"url\(([^)]*)\)", value or "")
            if name in ("href", "xlink:href", "src", "data", "action"):
                references.append(str(value))
            for reference in references:
                if reference.startswith("#"):
                    self.targets.add(reference[1:])
                else:
                    self.loads.append(reference)
            assert not name.startswith("on")


def test_the_page_is_whole_and_stands_alone(page: Path) -> None:
    found = Checked(page.read_text())
    assert found.loads == []
    assert not {"script", "img", "link", "iframe", "object", "form"} & set(found.tags)
    assert found.policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert len(found.ids) == len(set(found.ids))
    assert found.targets <= set(found.ids)
    assert found.targets  # the plots refer to their clip paths


# in a browser


class Browser:
    """A headless Chromium, spoken to through a pipe (Chrome DevTools Protocol)."""

    def __init__(self, binary: str, profile: Path) -> None:
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()

        pipes = [fcntl.fcntl(pipe, fcntl.F_DUPFD, 10) for pipe in (theirs_in, theirs_out)]
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        command = [binary, *FLAGS, *sandbox, f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", WIRE, *map(str, pipes), *command],
            pass_fds=pipes,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for pipe in pipes:
            os.close(pipe)
        os.close(theirs_in)
        os.close(theirs_out)
        self.out, self.into = os.fdopen(ours_out, "wb"), os.fdopen(ours_in, "rb")
        self.number, self.rest = 0, b""
        self.events: list[dict[str, Any]] = []
        self.session: str | None = None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        self.out.write(json.dumps(message).encode() + b"\0")
        self.out.flush()
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def show(self, page: Path, *, width: int = WIDE, scheme: str = "light") -> list[dict[str, Any]]:
        """Open a page and wait until it is loaded; give the events on the way."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900,
                 deviceScaleFactor=1, mobile=False)  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", features=features)
        self.events = []
        self.ask("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._next()
        return self.events

    def value(self, expression: str) -> Any:
        """Evaluate JavaScript in the page (the page's own scripts are another matter)."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self) -> Image.Image:
        data = self.ask("Page.captureScreenshot", format="png")["data"]
        return Image.open(io.BytesIO(base64.b64decode(data))).convert("L")

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            part = os.read(self.into.fileno(), 1 << 16)
            assert part, "the browser has gone"
            self.rest += part
        raw, _, self.rest = self.rest.partition(b"\0")
        message = dict(json.loads(raw))
        if "method" in message:
            self.events.append(message)
        return message

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.out.close()
        self.into.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    binary = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if binary is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on PATH")
    opened = Browser(binary, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def requests(events: list[dict[str, Any]]) -> list[str]:
    return [event["params"]["request"]["url"] for event in events
            if event["method"] == "Network.requestWillBeSent"]  # fmt: skip


def complaints(events: list[dict[str, Any]]) -> list[str]:
    named = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    return [json.dumps(event["params"]) for event in events if event["method"] in named]


def test_what_a_page_loads_or_logs_would_be_seen(browser: Browser, tmp_path: Path) -> None:
    """The counterpart of the next test: a page that does both is caught."""
    bad = tmp_path / "bad.html"
    bad.write_text('<img src="http://tracker.example/a.png"><script>console.error("no")</script>')
    events = browser.show(bad)
    assert "http://tracker.example/a.png" in requests(events)
    assert any('"no"' in text for text in complaints(events))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_asks_for_nothing_and_logs_nothing(
    browser: Browser, page: Path, scheme: str
) -> None:
    events = browser.show(page, scheme=scheme)
    assert requests(events) == [page.as_uri()]
    assert complaints(events) == []


def test_the_plots_are_drawn(browser: Browser, single: Path) -> None:
    browser.show(single)
    sizes = browser.value(
        "[...document.querySelectorAll('figure > svg')].map(s => [s.getAttribute('aria-label'),"
        " s.getBoundingClientRect().width, s.getBoundingClientRect().height,"
        " s.querySelectorAll('path').length])"
    )
    assert [label for label, *_ in sizes] == [
        "Cumulative distribution of the truth ratios",
        "Forgetting and utility by step",
        "Loss of each term by step",
    ]
    assert all(width > 400 and height > 200 and paths > 10 for _, width, height, paths in sizes)


def test_the_leaderboard_has_its_plot_and_leads_to_the_runs(
    browser: Browser, several: Path
) -> None:
    browser.show(several)
    assert browser.value("document.querySelectorAll('figure > svg')[0].ariaLabel").startswith(
        "Forgetting and utility of each run"
    )
    assert browser.value("document.querySelectorAll('details.run').length") == 4
    assert browser.value("document.querySelectorAll('details.run[open]').length") == 0
    browser.value("document.querySelector('.leaders a').click()")
    assert browser.value(
        "new Promise(done => setTimeout(() => done(0), 100)) && location.hash"
    ).startswith("#run-")


@pytest.mark.parametrize("width", [WIDE, 700, NARROW])
def test_nothing_is_wider_than_the_page(browser: Browser, page: Path, width: int) -> None:
    browser.show(page, width=width)
    browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    wide = browser.value(
        "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect()"
        f".right > {width}).map(e => e.outerHTML.slice(0, 120))"
    )
    assert wide == []
    assert browser.value("document.documentElement.scrollWidth") <= width


def test_words_in_plots_do_not_cover_each_other(browser: Browser, page: Path) -> None:
    browser.show(page)
    browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    overlaps = browser.value("""
      [...document.querySelectorAll('figure > svg')].flatMap(svg => {
        const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent,
          t.getBoundingClientRect()]);
        return texts.flatMap(([a, r], i) => texts.slice(i + 1).filter(([b, s]) =>
          r.left < s.right - 1 && s.left < r.right - 1 && r.top < s.bottom - 4 &&
          s.top < r.bottom - 4).map(([b]) => a + ' / ' + b));
      })""")
    assert overlaps == []


def test_dark_is_dark_and_light_is_light(browser: Browser, single: Path) -> None:
    shades = {}
    for scheme in ("light", "dark"):
        browser.show(single, scheme=scheme)
        histogram = browser.picture().histogram()
        shades[scheme] = sum(shade * n for shade, n in enumerate(histogram)) / sum(histogram)
    assert shades["light"] > 200
    assert shades["dark"] < 80


def test_a_printed_page_is_light_and_complete(browser: Browser, several: Path) -> None:
    browser.show(several, scheme="dark")
    browser.ask("Emulation.setEmulatedMedia", media="print",
                features=[{"name": "prefers-color-scheme", "value": "dark"}])  # fmt: skip
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    pdf = browser.ask("Page.printToPDF", printBackground=True)["data"]
    assert base64.b64decode(pdf).startswith(b"%PDF")
    heights = browser.value(
        "[...document.querySelectorAll('details.run > div')].map(e => e.offsetHeight)"
    )
    assert len(heights) == 4
    assert min(heights) > 500  # folded sections are printed too
