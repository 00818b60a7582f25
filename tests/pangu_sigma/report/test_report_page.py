"""The report is one harmless, self-contained file for runs of any size."""

import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pangu_sigma.errors import UserError
from pangu_sigma.monitor import MetricsLog
from pangu_sigma.report import write_report

HOSTILE = "<script>alert(1)</script>\"'&\x1b[31m"
VOID = {"meta"}
DRAWN = {"path", "circle", "rect", "line", "use"}


class Page(HTMLParser):
    """Collects what the tests ask for and checks that every element is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.charts, self.styles = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        names = dict(attributes)
        if tag == "svg":
            assert names.get("aria-hidden") or (names["role"] == "img" and names["aria-label"])
            self.charts.append(names.get("aria-label"))
        self.styles.append(names.get("style") or "")
        assert not {"src", "onload", "onclick"} & set(names)
        assert names.get("href", "#").startswith("#")
        for value in names.values():
            assert "nan" not in re.split(r"[^a-z]+", value or "") or tag not in DRAWN

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def has(self, text):
        return text in " ".join(self.text)


def run(folder: Path, domains, steps=60, every=10, nan_at=None, evaluate=True, **more) -> Path:
    folder.mkdir(exist_ok=True)
    with MetricsLog(folder, resume_step=-1) as log:
        for step in range(1, steps + 1):
            losses = {d: 9 - i / 50 - step / steps for i, d in enumerate(domains)}
            if step == nan_at:
                losses = dict.fromkeys(domains, math.nan)
            log.train(
                step,
                loss=sum(losses.values()) / len(losses),
                losses=losses,
                tokens=dict.fromkeys(domains, 100),
                learning_rate=1e-3 * step / steps,
                gradient_norm=math.inf if step == nan_at else 1.0,
                tokens_per_second=900,
                flops_per_second=3e9,
                seconds=1.5,
                expert_load={
                    "blocks.10": {d: [5, 15, 10, 10] for d in domains},
                    "blocks.2": {d: [0, 0] for d in domains},
                },
                **more,
            )
            if evaluate and step % every == 0:
                log.evaluate(
                    step, losses=losses, unigram=dict.fromkeys(domains, 9.5), tokens=dict.fromkeys(domains, 64)
                )
        log.checkpoint(steps, path="runs/one/step-60", bytes_written=81_234_567, bytes_linked=0, seconds=3.25)
        log.event(steps, "the end")
    return folder


def write_evaluation(folder, domains, own_best=True, step=60):
    value = {
        "step": step,
        "losses": dict.fromkeys(domains, 3.25),
        "unigram": dict.fromkeys(domains, 9.5),
        "perplexity": dict.fromkeys(domains, math.exp(3.25)),
        "tokens": dict.fromkeys(domains, 64),
        "matrix": {a: {b: 3.25 + ((a == b) != own_best) for b in domains} for a in domains},
    }
    (folder / "evaluation.json").write_text(json.dumps(value))


def read(folder) -> Page:
    return Page(write_report(folder).read_text("utf-8"))


def test_a_whole_run(tmp_path):
    folder = run(
        tmp_path / "first-light", ["code", "docs"], loss_scale=65536.0, dropped_share={"blocks.2": {"code": 0.1}}
    )
    write_evaluation(folder, ["code", "docs"])
    (folder / "summary.json").write_text('{"parameters": {"total": 48300000, "shared": 21000000}}')
    (folder / "config.yaml").write_text("model: {layers: 8, hidden: 512}\ntrain: {steps: 60}\n")
    page = read(folder)
    for text in (
        "first-light", "8 layers · hidden 512", "48.3M", "shared 21.0M", "of 60", "3.250", "+6.250", "25.8",
        "Every domain does best under its own experts.", "blocks.10", "1.50 ×", "no rows", "Loss scale",
        "Dropped share of rows", "81.2MB", "runs/one/step-60", "the end", "Effective configuration",
    ):  # fmt: skip
        assert page.has(text), text
    assert page.text.index("blocks.2") < page.text.index("blocks.10")
    assert not {"script", "link", "img", "iframe"} & set(page.tags)


def test_the_same_files_give_the_same_bytes(tmp_path):
    folder = run(tmp_path / "a", ["code", "docs"])
    first = write_report(folder).read_bytes()
    code = f"from pangu_sigma.report import write_report; write_report({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert (folder / "report.html").read_bytes() == first
    assert sorted(p.name for p in folder.iterdir()) == ["metrics.jsonl", "report.html"]


def test_whatever_comes_from_files_is_escaped(tmp_path):
    folder = run(tmp_path / "<b>run", [HOSTILE, "docs"])
    with MetricsLog(folder, resume_step=60) as log:
        log.event(60, HOSTILE)
        log.checkpoint(60, path=HOSTILE, bytes_written=1, bytes_linked=1, seconds=1)
        log.write(
            {"kind": "train", "step": 61, "losses": {"x": 1.0}, "expert_load": {HOSTILE: {HOSTILE: [1, 2]}},
             "dropped_share": {HOSTILE: {HOSTILE: 0.5}}}
        )  # fmt: skip
    write_evaluation(folder, [HOSTILE, "docs"], own_best=False)
    (folder / "config.yaml").write_text(f"model:\n  preset: '{HOSTILE.replace(chr(39), '').replace(chr(27), '')}'\n")
    (folder / "summary.json").write_text(json.dumps({"parameters": {HOSTILE: 1, "total": 2}}))
    text = write_report(folder).read_text("utf-8")
    page = Page(text)
    assert "<script" not in text and "<b>" not in text and "\x1b" not in text
    assert page.has("<script>alert(1)</script>")
    assert page.has("0 of 2 domains do best under their own experts")


def test_one_record(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind":"train","step":10,"loss":5.0,"losses":{"code":5.0}}\n')
    page = read(tmp_path)
    assert page.has("5.000") and not page.has("Quality per domain")
    assert "use" in page.tags  # a point, which is no line


@pytest.mark.parametrize(
    "line",
    [
        '{"kind":"event","step":0,"message":"begun"}',
        '{"kind":"checkpoint","step":5,"path":"p"}',
        '{"kind":"evaluate","step":0,"losses":{"code":9.0},"unigram":{},"tokens":{}}',
        '{"kind":"train","step":1,"loss":"nan","losses":{"code":"nan"},"gradient_norm":"inf","loss_scale":0.0}',
        '{"kind":"train","step":1}',
    ],
)
def test_any_first_record_makes_a_page(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    read(tmp_path)


def test_forty_domains(tmp_path):
    domains = [f"domain_{i:02d}" for i in range(40)]
    folder = run(tmp_path / "forty", domains, steps=20)
    write_evaluation(folder, domains)
    page = read(folder)
    assert all(any(label and f"Loss of domain {d} " in label for label in page.charts) for d in domains)
    assert page.tags.count("figure") == 1 + 40 + 2 + 5


def test_a_run_without_evaluation(tmp_path):
    page = read(run(tmp_path / "a", ["code"], evaluate=False))
    assert page.has("Training loss (smoothed) per domain") and not page.has("Domain × group")


def test_values_that_are_not_finite_break_the_curve_and_are_shown(tmp_path):
    page = read(run(tmp_path / "a", ["code"], nan_at=30))
    assert page.has("×")
    assert page.has("nan") and page.has("inf")  # in the tables of values


def test_a_long_run_stays_small_and_keeps_its_spike(tmp_path):
    lines = [
        json.dumps({"kind": "train", "step": s, "loss": 50.0 if s == 7777 else 3 + s % 7 / 10, "losses": {"code": 3.0}})
        for s in range(1, 20_001)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    path = write_report(tmp_path)
    assert path.stat().st_size < 150_000
    assert ">40</text>" in path.read_text("utf-8")  # the axis reaches up to the spike


def test_colours_are_those_of_the_style_sheet_alone(tmp_path):
    """One picture serves light and dark pages."""
    page = read(run(tmp_path / "a", ["code", "docs"]))
    drawn = [style for style in page.styles if "stroke:" in style or "fill:" in style]
    assert len(drawn) > 50 and not [style for style in drawn if "#" in style]
    assert any("var(--s0)" in style for style in drawn) and any("var(--ink)" in style for style in drawn)


def test_every_picture_is_a_table_too_and_scrolls_by_keyboard(tmp_path):
    text = write_report(run(tmp_path / "a", ["code"])).read_text("utf-8")
    assert text.count("<figure") == text.count("<summary>Values") > 5
    assert text.count('class="scroll"') == text.count('class="scroll" tabindex="0" role="region" aria-label="')


def test_drawing_leaves_matplotlib_as_it_was(tmp_path):
    import matplotlib

    matplotlib.rcParams["font.size"] = before = 17.0
    try:
        first = write_report(run(tmp_path / "a", ["code"])).read_bytes()
        assert matplotlib.rcParams["font.size"] == before
    finally:
        matplotlib.rcdefaults()
    assert write_report(tmp_path / "a").read_bytes() == first  # nor do a user's settings show


@pytest.mark.parametrize("name", ["$x^2$", "$\\frac", "数学", "a-->b", 'style="fill: #2a78d6"'])
def test_any_name_is_text_in_every_picture(tmp_path, name, recwarn):
    page = read(run(tmp_path / "a", [name, "docs"]))
    assert page.text.count(name) > 3
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_results_of_a_later_step_count(tmp_path):
    folder = run(tmp_path / "a", ["code"])
    write_evaluation(folder, ["code"], step=30)
    assert read(folder).has("Held-out text at step 60")


def test_missing_and_empty_runs_are_sentences(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        write_report(tmp_path / "none")
    with pytest.raises(UserError, match="does not exist"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no record yet"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("evaluation.json", "{"),
        ("evaluation.json", "[]"),
        ("evaluation.json", '{"losses": {"code": "high"}}'),
        ("evaluation.json", '{"losses": {}, "matrix": {"code": 3}}'),
        ("evaluation.json", '{"step": "last"}'),
        ("summary.json", "7"),
        ("config.yaml", "a: [1"),
        ("metrics.jsonl", '{"kind":"train","step":1,"losses":[3]}'),
        ("metrics.jsonl", '{"kind":"train","step":1,"losses":{"code":null}}'),
        ("metrics.jsonl", '{"kind":"train","step":1,"expert_load":{"blocks.1":{"code":[null]}}}'),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, text):
    folder = run(tmp_path / "a", ["code"], steps=2)
    (folder / name).write_text(text + "\n")
    with pytest.raises(UserError, match=name):
        write_report(folder)
