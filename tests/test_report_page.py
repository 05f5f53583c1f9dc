"""The page holds the run's data, asks the network for nothing, and lets no text from the records become markup."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from effx_dist.report import RunLog, RunNotFoundError, read_run, write_report
from effx_dist.report.page import PAYLOAD_ID, payload

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>&amp;\u2028'\"<!--"
)
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
PREFIX = "effx/checkpoint/"


class Page(HTMLParser):
    """The page's elements, and the text within each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.texts: list[str] = []
        self._is_script = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._is_script = tag == "script"
        if self._is_script:
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self._is_script = False

    def handle_data(self, data: str) -> None:
        if self._is_script:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        else:
            self.texts.append(data)

    def data(self) -> Any:
        (text,) = [text for attributes, text in self.scripts if attributes.get("id") == PAYLOAD_ID]
        return json.loads(text)


def log_everything(folder: Path, shift: float = 0.0) -> None:
    """A run that has points for every chart."""
    with RunLog(folder, tensorboard=False) as log:
        log.event("start", config={"model": {"hidden": 64}}, world_size=2, versions={"torch": "2"})
        for step in range(1, 201):
            metrics = {
                "train/loss": 4.0 + math.exp(-step / 50) + shift,
                "lr": 1e-3,
                "epoch": (step - 1) / 50,
                "effx/infobatch/kept_fraction": 0.7,
                "effx/infobatch/threshold": 4.2,
                "effx/infobatch/samples_saved": 10.0 * step,
                "effx/cautious/alignment": 0.6,
                "effx/cautious/alignment/layers.0.weight": 0.5,
                "effx/cautious/alignment/layers.1.weight": 0.7,
            }
            if step % 40 == 0:
                save = {"raw_bytes": 7e6, "stored_bytes": 1e5, "ratio": 70.0, "run_ratio": 9.0}
                save |= {"blocked_s": 0.1, "write_s": 0.5, "error": 0.02}
                metrics |= {"eval/loss": 4.1 + shift} | {PREFIX + k: v for k, v in save.items()}
            log.log(step, metrics, samples=16 * step)
        log.event("resume", step=200, world_size=1)


def log_hostile(folder: Path) -> None:
    with RunLog(folder, tensorboard=False) as log:
        log.event("start", config={HOSTILE: {HOSTILE: HOSTILE}}, versions={HOSTILE: [HOSTILE]})
        log.event(HOSTILE, **{HOSTILE: HOSTILE})
        for step in (1, 2):
            log.log(
                step, {HOSTILE: 1.0, f"effx/cautious/alignment/{HOSTILE}": 0.5, "train/loss": 1.0}
            )


def log_single_points(folder: Path) -> None:
    with RunLog(folder, tensorboard=False) as log:
        log.log(
            1, {"train/loss": 8.0, PREFIX + "stored_bytes": 10.0, "effx/cautious/alignment": 0.5}
        )
        log.log(2, {"eval/loss": math.nan, "effx/infobatch/kept_fraction": 1.0, "lr": math.inf})


def log_only_a_start(folder: Path) -> None:
    with RunLog(folder, tensorboard=False) as log:
        log.event("start", config={})


def log_nothing(folder: Path) -> None:
    RunLog(folder, tensorboard=False).close()


RUNS = [log_everything, log_hostile, log_single_points, log_only_a_start, log_nothing]


@pytest.mark.parametrize("make_run", RUNS)
def test_the_data_in_the_page_is_the_data_of_the_run(
    make_run: Callable[[Path], None], tmp_path: Path
) -> None:
    make_run(tmp_path)
    run = read_run(tmp_path)

    data = Page(write_report(tmp_path, tmp_path / "out.html").read_text()).data()

    assert data == payload(run)
    assert list(data["run"]["series"]) == run.metric_names()
    for name, columns in data["run"]["series"].items():
        values = [
            float(value) for value in columns["value"]
        ]  # "NaN" and "Infinity" are strings there
        expected = run.series(name)
        assert columns["step"] == [step for step, _ in expected]
        assert repr(values) == repr([value for _, value in expected])
    assert [event["event"] for event in data["run"]["events"]] == [
        event.kind for event in run.events
    ]


@pytest.mark.parametrize("make_run", RUNS)
def test_nothing_is_loaded_from_anywhere(make_run: Callable[[Path], None], tmp_path: Path) -> None:
    make_run(tmp_path)
    text = write_report(tmp_path, tmp_path / "out.html", baseline=tmp_path).read_text()
    page = Page(text)
    for tag, attributes in page.elements:
        assert not {"src", "href", "srcset", "action", "data"} & attributes.keys(), (
            tag,
            attributes,
        )
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert tag not in ("link", "iframe", "object", "embed", "base", "form"), tag
    styles = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert styles
    assert not re.search(r"url\(|@import", "".join(styles))


def test_the_policy_allows_the_pages_own_scripts_and_nothing_else(tmp_path: Path) -> None:
    log_everything(tmp_path)
    page = Page(write_report(tmp_path, tmp_path / "out.html").read_text())
    (policy,) = [
        a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    run = [text for attributes, text in page.scripts if "type" not in attributes]
    assert allowed == {
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run
    }
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy.split("script-src")[1]


def test_text_from_the_records_is_never_markup(tmp_path: Path) -> None:
    hostile, tame = tmp_path / "hostile", tmp_path / "tame"
    log_hostile(hostile)
    lines = (hostile / "run.jsonl").read_text()
    tame.mkdir()
    (tame / "run.jsonl").write_text(lines.replace(json.dumps(HOSTILE)[1:-1], "x"))

    pages = [
        Page(write_report(folder, folder / "out.html").read_text()) for folder in (hostile, tame)
    ]

    tags = [[tag for tag, _ in page.elements] for page in pages]
    assert tags[0] == tags[1]
    assert "img" not in tags[0]
    assert any(HOSTILE in text for text in pages[0].texts)
    assert HOSTILE in pages[0].data()["run"]["series"]


def test_the_folders_name_is_escaped_too(tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x>"
    log_nothing(folder)
    page = Page(write_report(folder, tmp_path / "out.html").read_text())
    assert "img" not in [tag for tag, _ in page.elements]
    assert "<img src=x>" in page.texts


def test_a_lone_surrogate_does_not_stop_the_page(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_text('{"t":1,"event":"start","config":{"a":"\\ud800"}}\n')
    assert Page(write_report(tmp_path, tmp_path / "out.html").read_text()).data()


def test_tables_can_be_read_without_javascript(tmp_path: Path) -> None:
    log_everything(tmp_path)
    page = Page(write_report(tmp_path, tmp_path / "out.html").read_text())
    assert {"100 kB", "70x", "model.hidden", "64", "resume"} <= set(page.texts)


def test_a_section_without_data_does_not_appear(tmp_path: Path) -> None:
    log_only_a_start(tmp_path)
    page = Page(write_report(tmp_path, tmp_path / "out.html").read_text())
    assert not {"Checkpoint table", "Resolved config"} & set(page.texts)
    assert "History" in page.texts


def test_a_long_run_is_thinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_everything(tmp_path)
    monkeypatch.setattr("effx_dist.report.page.MAX_POINTS", 50)
    monkeypatch.setattr("effx_dist.report.page.MAX_POINTS_PER_PARAMETER", 30)
    series = payload(read_run(tmp_path))["run"]["series"]
    assert len(series["train/loss"]["step"]) == 50
    losses = [loss for _, loss in read_run(tmp_path).series("train/loss")]
    assert series["train/loss"]["mean"]["value"][0] == pytest.approx(sum(losses[:40]) / 40)
    rows = [v["step"] for name, v in series.items() if name.startswith("effx/cautious/alignment/")]
    assert len(rows[0]) <= 30
    assert rows[0] == rows[1]


def test_the_page_is_replaced_as_a_whole(tmp_path: Path) -> None:
    log_nothing(tmp_path / "run")
    out = tmp_path / "new" / "folder" / "out.html"
    for _ in range(2):
        assert write_report(tmp_path / "run", out) == out
    assert [path.name for path in out.parent.iterdir()] == ["out.html"]


@pytest.mark.parametrize("role", ["run", "baseline"])
def test_a_missing_run_leaves_no_page(role: str, tmp_path: Path) -> None:
    log_nothing(tmp_path / "there")
    folders = {"run": tmp_path / "there", "baseline": tmp_path / "there", role: tmp_path / "absent"}
    with pytest.raises(RunNotFoundError, match="absent"):
        write_report(folders["run"], tmp_path / "out.html", folders["baseline"])
    assert not (tmp_path / "out.html").exists()


CHARTS = {
    log_everything: {
        "Training loss",
        "Held-out loss",
        "Kept fraction per epoch",
        "Threshold per epoch",
        "Samples saved so far",
        "Alignment, mean over parameters",
        "Alignment by parameter and step",
        "Stored bytes per save",
        "Compression ratio",
        "Training blocked per save",
        "lr",
    },
    log_hostile: {"Training loss", "Alignment by parameter and step", HOSTILE},
    log_single_points: {
        "Training loss",
        "Kept fraction",
        "Alignment, mean over parameters",
        "Stored bytes per save",
    },
    log_only_a_start: set(),
    log_nothing: set(),
}


class Charts(HTMLParser):
    """A rendered page: for every chart's host how many canvases it holds, and all elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.canvases: dict[str, int] = {}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._host = ""
        self._depth = 0  # of div elements within the host
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if title := attributes.get("data-chart"):
            self._host, self._depth = title, 0
            self.canvases[title] = 0
        if self._host and tag == "div":
            self._depth += 1
        if self._host and tag == "canvas":
            self.canvases[self._host] += 1

    def handle_endtag(self, tag: str) -> None:
        if self._host and tag == "div":
            self._depth -= 1
            self._host = self._host if self._depth else ""

    def pressed(self) -> list[str | None]:
        return [a["aria-pressed"] for tag, a in self.elements if tag == "button"]


def rendered(page: Path, profile: Path) -> Charts:
    """Open the page in Chromium and return what it has become. The browser may reach nothing outside."""
    assert CHROMIUM is not None
    switches = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    switches += (
        "--disable-background-networking --disable-component-update --disable-dev-shm-usage "
    )
    switches += "--virtual-time-budget=3000 --window-size=1240,900 --dump-dom"
    command = [CHROMIUM, *switches.split(), f"--user-data-dir={profile}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    return Charts(done.stdout)


@pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium or google-chrome on the path")
@pytest.mark.parametrize("make_run", RUNS)
def test_a_browser_draws_every_chart(make_run: Callable[[Path], None], tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    log_everything(tmp_path / "baseline", shift=0.1)
    baseline = tmp_path / "baseline" if make_run is log_everything else None
    page = write_report(tmp_path / "run", tmp_path / "out.html", baseline)

    charts = rendered(page, tmp_path / "profile")

    assert charts.canvases == dict.fromkeys(CHARTS[make_run], 1)
    assert "js-error" not in [attributes.get("id") for _, attributes in charts.elements]
    assert {"data-drawn": "yes"} in [
        attributes for tag, attributes in charts.elements if tag == "body"
    ]
    assert "img" not in [tag for tag, _ in charts.elements]


@pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium or google-chrome on the path")
def test_a_fault_in_the_page_would_be_seen(tmp_path: Path) -> None:
    """The marker that the test above looks for does appear when the data cannot be drawn."""
    log_everything(tmp_path / "run")
    page = write_report(tmp_path / "run", tmp_path / "out.html")
    page.write_text(page.read_text().replace('"series":{', '"gone":{', 1))
    charts = rendered(page, tmp_path / "profile")
    assert "js-error" in [attributes.get("id") for _, attributes in charts.elements]
    assert all("data-drawn" not in attributes for _, attributes in charts.elements)


@pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium or google-chrome on the path")
def test_every_button_redraws_the_page(tmp_path: Path) -> None:
    log_everything(tmp_path / "run")
    page = write_report(tmp_path / "run", tmp_path / "out.html", baseline=tmp_path / "run")
    click = (
        "for (const label of ['second half', 'by samples processed'])"
        "[...document.querySelectorAll('button')].find((b) => b.textContent === label).click();"
    )
    text = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    page.write_text(text.replace("</body>", f"<script>{click}</script></body>"))

    charts = rendered(page, tmp_path / "profile")

    assert charts.pressed() == ["false", "true", "false", "true"]
    assert charts.canvases == dict.fromkeys(CHARTS[log_everything], 1)
    assert "js-error" not in [attributes.get("id") for _, attributes in charts.elements]
