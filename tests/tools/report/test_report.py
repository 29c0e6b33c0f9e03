"""The report in a real browser: pictures and plots are drawn, it requests nothing, hostile names do nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reelmae.pipeline.errors import ConfigError, DatasetError, InputError
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.claim import Claim
from reelmae.pipeline.storage.store import Store
from reelmae.tools.reconstruct import reconstruct
from reelmae.tools.report.write import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1000,1400",
    "--virtual-time-budget=8000",
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
BENCH = {
    "model": "vit_s",
    "step_ms": {"dense": 900.0, "sparse": 150.0},
    "load_step_ms": {"dense": 930.0, "sparse": 200.0},
    "speedup": {"compute": 6.0, "load_compute": 4.65},
    "tokens": {"kept": 156, "all": 1568},
    "machine": {"cpu": "a processor"},
    "versions": {"python": "3"},
}
# what a page holds once a browser has laid it out
PROBE = """<script>
let done = false;
addEventListener('load', () => {
  const box = e => { const r = e.getBoundingClientRect(); return [r.width, r.height]; };
  const found = {
    images: [...document.images].map(i => [i.naturalWidth, i.naturalHeight, ...box(i)]),
    plots: [...document.querySelectorAll('svg')].map(s => [...box(s), s.querySelectorAll('path').length,
      [...s.querySelectorAll('text')].map(t => t.textContent)]),
    requests: performance.getEntriesByType('resource').map(r => r.name).filter(n => !n.startsWith('data:')),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    text: document.querySelector('main').textContent, alerted: window.alerted || 0,
  };
  const pre = document.createElement('pre'); pre.id = 'probe'; pre.textContent = JSON.stringify(found);
  document.body.appendChild(pre);
});
window.alert = () => { window.alerted = (window.alerted || 0) + 1; };
</script>"""


def look(report: Path, tmp_path: Path) -> dict[str, Any]:
    """Open a copy of the page in headless Chromium, without its content policy, and say what was drawn."""
    page = report.read_text(encoding="utf-8")
    probed = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', PROBE, page)
    assert probed != page
    copy = tmp_path / "probed.html"
    copy.write_text(probed, encoding="utf-8")
    command = [str(CHROMIUM), *CHROMIUM_FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", copy.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180)
    found = re.search(r'<pre id="probe">(.*?)</pre>', result.stdout, re.DOTALL)
    assert found, result.stderr[-2000:]
    return json.loads(unescape(found.group(1)))


class Addresses(HTMLParser):
    """Every address a page could ask for, and every tag in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "href", "xlink:href", "poster", "data", "action"):
                self.found.append(value or "")
            if name.startswith("on"):
                self.handlers.append(f"{tag} {name}={value}")


@pytest.fixture
def full_run(run_copy: Path) -> Path:
    """The tiny run with pictures and timings: everything a report can show."""
    reconstruct(run_copy / "train", str(run_copy / "shards"), run_copy / "reconstruction", clips=2)
    (run_copy / "bench_step.json").write_text(json.dumps(BENCH))
    return run_copy


def test_only_a_loss_on_normalised_pixels_is_held_against_a_patchs_mean(run_copy: Path) -> None:
    path = run_copy / "train" / "config.json"
    config = json.loads(path.read_text())
    assert "only a patch's mean scores 1.0" in unescape(write_report(run_copy).read_text(encoding="utf-8"))
    for change in ({"objective": "motion"}, {"target": "hog"}, {"target_norm": "none"}):
        path.write_text(json.dumps({**config, "model": {**config["model"], **change}}))
        page = unescape(write_report(run_copy).read_text(encoding="utf-8"))
        assert "only a patch's mean scores 1.0" not in page, change
        assert f"objective {change.get('objective', 'mae')}" in page


@needs_chromium
def test_the_full_report_draws_its_pictures_and_plots(full_run: Path, tmp_path: Path) -> None:
    drawn = look(write_report(full_run), tmp_path)
    clips = len(pq.read_table(full_run / "shards" / "index.parquet"))
    assert len(drawn["images"]) == clips + 2  # the sheet, the animation, the grid
    for natural_width, natural_height, width, height in drawn["images"]:
        assert min(natural_width, natural_height, width, height) > 20
    assert len(drawn["plots"]) == 5  # durations, scores, loss, pace, timings
    for width, height, paths, texts in drawn["plots"]:
        assert width > 500
        assert height > 100
        assert paths > 5
        assert texts
    assert "loss on removed patches" in drawn["plots"][2][3]
    assert any("6.0× faster" in text for text in drawn["plots"][4][3])
    assert drawn["requests"] == []
    assert drawn["overflow"] == 0
    assert "Not in this report" not in drawn["text"]


@needs_chromium
def test_hostile_names_are_text_and_nothing_more(run_copy: Path, tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>.webm"
    rejects = run_copy / "shards" / "rejects.parquet"
    rows = pq.read_table(rejects).to_pylist()
    assert any(name in row["source"] for row in rows)  # the generated bucket holds it
    for row in rows:
        row["detail"] += "<script>alert(2)</script>\" onmouseover='alert(3)'"
    table = pq.read_table(rejects)
    pq.write_table(table.from_pylist(rows, table.schema), rejects)
    report = write_report(run_copy)
    page = Addresses(report.read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert page.handlers == []
    drawn = look(report, tmp_path)
    assert drawn["alerted"] == 0
    assert name in drawn["text"]
    assert "<script>alert(2)</script>" in drawn["text"]


def test_the_page_holds_all_it_needs(full_run: Path) -> None:
    page = Addresses(write_report(full_run).read_text(encoding="utf-8"))
    assert page.found
    assert all(address.startswith(("data:", "#")) for address in page.found)
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base"}


def test_every_reject_is_in_the_table_under_its_reason(tiny_run: Path, tmp_path: Path) -> None:
    text = write_report(tiny_run, tmp_path / "report.html").read_text(encoding="utf-8")
    rows = pq.read_table(tiny_run / "shards" / "rejects.parquet").to_pylist()
    assert rows
    for row in rows:
        assert f"<code>{row['reason']}</code>" in text
    about = json.loads((tiny_run / "shards" / "dataset.json").read_text())
    assert f"{about['sources']} → {about['clips']}" in text


def test_a_page_about_shards_tells_scores_repeats_and_settings(run_copy: Path) -> None:
    shards = run_copy / "shards"
    table = pq.read_table(shards / "index.parquet")
    keys = table["key"].to_pylist()
    repeats = [None] * (len(keys) - 1) + [keys[0]]
    where = table.schema.get_field_index("duplicate_of")
    column = pa.array(repeats, pa.string())
    pq.write_table(table.set_column(where, "duplicate_of", column), shards / "index.parquet")
    text = write_report(shards).read_text(encoding="utf-8")
    assert text.count("<figure><div class=frame>") == len(keys) - 1  # the repeat is not on the sheet
    assert "repeat an earlier one" in text
    for words in ("off; at 0.5:", "off; at 0.7:", "Screening scores", "duration of a clip"):
        assert words in text
    assert "<code>short_side</code></td><td>64</td><td class=muted>256</td>" in text
    assert "<code>labels</code></td><td>folder</td>" in text
    assert "--labels folder --short-side 64" in text
    label = table["label"].to_pylist()[0]
    assert f"<td>{label}</td>" in text


def test_the_threshold_in_force_is_drawn_with_what_it_rejected(
    tmp_path: Path, make_tables: Any, make_clip: Any
) -> None:
    rejects = [("/raw/s", None, None, "static", "motion 0.1"), ("/raw/a", 1.0, 2.0, "static", "motion 0.2")]
    folder = make_tables(tmp_path / "d", [make_clip("/raw/a")], rejects, config={"min_motion": 0.5})
    text = write_report(folder).read_text(encoding="utf-8")
    assert "min_motion 0.5: rejected 1 source, 1 span" in text
    assert "<code>a</code> <span class=detail>1 s to 2 s</span>" in text


@needs_chromium
@pytest.mark.parametrize("rows", [0, 1])
def test_a_small_dataset_with_names_of_any_length_fits_the_page(
    rows: int, tmp_path: Path, make_tables: Any, make_clip: Any
) -> None:
    long = "/raw/" + "x" * 400 + "\n\u202e.mp4"
    clips = [make_clip(long, label="l" * 300, label_id=0), make_clip(long, 1)][: 2 * rows]
    rejects = [(long, None, None, "unreadable", "y" * 500)] * (1 - rows) + [("/raw/b", None, None, "static", "")]
    folder = make_tables(tmp_path / "d", clips, rejects, labels={"l" * 300: 0}, config={})
    drawn = look(write_report(folder), tmp_path)
    assert drawn["overflow"] == 0
    assert drawn["requests"] == []
    assert "\u202e" not in drawn["text"]
    assert len(drawn["plots"]) == 2 * rows


def test_a_shard_dataset_alone_gives_a_report_that_says_what_is_missing(run_copy: Path, tmp_path: Path) -> None:
    shards = Path(shutil.move(run_copy / "shards", tmp_path / "alone"))
    text = write_report(shards).read_text(encoding="utf-8")
    assert text.count("<img") >= 1
    for missing in ("A training run", "Reconstructions", "Timings"):
        assert missing in text
    assert "reelmae pretrain demo" in text


def test_a_training_run_alone_gives_its_curve_and_its_dataset(tiny_run: Path, tmp_path: Path) -> None:
    text = write_report(tiny_run / "train", tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<svg" in text
    assert "<table id=rejects>" in text
    assert "Reconstructions: <code>" in text


def test_a_clip_that_cannot_be_read_is_told_of(run_copy: Path) -> None:
    tar = next((run_copy / "shards" / "shards").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:2000])
    assert "cannot be read" in write_report(run_copy).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["shards/index.parquet", "shards/dataset.json", "train/summary.json"])
def test_a_damaged_file_is_named_and_no_page_is_written(name: str, run_copy: Path) -> None:
    (run_copy / name).write_bytes((run_copy / name).read_bytes()[:100])
    with pytest.raises(DatasetError, match=f"{Path(name).name}: is damaged"):
        write_report(run_copy)
    assert not (run_copy / "report.html").exists()


def test_a_folder_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds neither"):
        write_report(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        write_report(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


# --- datasets on an object store, and jobs at work


@pytest.fixture(scope="module")
def remote(tiny_run: Path, s3_server: Any) -> Any:
    """Store of the tiny run's shards on the S3 server."""
    store = Store(s3_server.url("report/shards"), s3_server.access())
    for path in sorted(p for p in (tiny_run / "shards").rglob("*") if p.is_file()):
        store.publish(path, path.relative_to(tiny_run / "shards").as_posix())
    return store


def test_a_dataset_at_a_url_has_a_page(remote: Any, s3_server: Any, tiny_run: Path, tmp_path: Path) -> None:
    page = write_report(remote.url(), tmp_path / "page.html", access=s3_server.access())
    text = page.read_text(encoding="utf-8")
    clips = len(pq.read_table(tiny_run / "shards" / "index.parquet"))
    assert text.count("<figure><div class=frame><picture>") == clips
    with pytest.raises(ConfigError, match=r"s3://.*: is a URL; give the page a place with --out"):
        write_report(remote.url())
    with pytest.raises(InputError, match=r"nothing: no finished shard dataset"):
        write_report(s3_server.url("nothing"), tmp_path / "none.html", access=s3_server.access())
    assert not (tmp_path / "none.html").exists()


def test_a_byte_that_was_wrong_on_its_way_spoils_no_picture(remote: Any, faulty: Any, tmp_path: Path) -> None:
    access = faulty("flip", share=0.5, path=".tar").s3.access()
    text = write_report(remote.url(), tmp_path / "page.html", access=access).read_text(encoding="utf-8")
    assert "<span class=note>cannot be read" not in text
    assert access.retries.counts()["checksum"] > 0


def test_a_run_on_an_object_store_finds_its_dataset_by_its_own_options(
    remote: Any, s3_server: Any, run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in s3_server.environment():
        monkeypatch.delenv(name)
    options, run = tmp_path / "options.json", run_copy / "train"
    options.write_text(json.dumps(s3_server.options()))
    config = json.loads((run / "config.json").read_text())
    config["data"] |= {"url": remote.url(), "storage_options": f"@{options}"}
    (run / "config.json").write_text(json.dumps(config))
    text = write_report(run).read_text(encoding="utf-8")
    assert "<table id=rejects>" in text
    assert s3_server.secret not in text
    options.unlink()
    assert "Not in this report" in write_report(run, access=Access(patience_s=0)).read_text(encoding="utf-8")


def test_a_job_that_is_at_work_is_told(run_copy: Path) -> None:
    with Claim(Store(str(run_copy / "shards"))):
        assert "When this page was written: a job is at work: " in write_report(run_copy).read_text(encoding="utf-8")
    assert "a job is at work" not in write_report(run_copy).read_text(encoding="utf-8")


def test_retries_of_a_run_are_told_where_there_are_any(run_copy: Path) -> None:
    path = run_copy / "train" / "summary.json"
    summary = json.loads(path.read_text())
    assert summary["retries"] == {}
    assert "tried again" not in write_report(run_copy).read_text(encoding="utf-8")
    path.write_text(json.dumps(summary | {"retries": {"503 SlowDown": 3, "<b>": 1}}))
    text = write_report(run_copy).read_text(encoding="utf-8")
    assert "Reading the clips was tried again: 4 (3 x 503 SlowDown, 1 x &lt;b&gt;)." in text
