"""The page of a plan: figures, the stacked plot, and that a real browser shows it on a phone and on a desk."""

import re
import shutil
import subprocess

import pytest
import torch
import transformers as hf

import tightfit
from tightfit.train.plan_report import plan_page, write_plan_page
from tightfit.train.stacked import columns, stacked_plot


@pytest.fixture(scope="module")
def plan():
    config = hf.BertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, vocab_size=200
    )
    model = tightfit.skeleton(config, task="sequence-classification")
    return tightfit.plan(model, tightfit.Checkpointing(), batch=(4, 16))


def test_the_columns_keep_the_peak_and_never_span_two_phases(plan):
    timeline = plan.simulation.timeline
    shown = columns(timeline, count=40)
    assert max(shown.levels) == shown.levels[shown.peak] == max(timeline.levels)
    order = [phase for i, phase in enumerate(shown.phases) if i == 0 or shown.phases[i - 1] != phase]
    stock = [phase for i, phase in enumerate(timeline.phases) if i == 0 or timeline.phases[i - 1] != phase]
    assert order == stock


def test_the_plot_marks_the_peak_and_draws_the_measured_line(plan):
    shown = columns(plan.simulation.timeline)
    text = stacked_plot(shown, {"forward": [10, 20, 30], "backward": [40, 10], "optimizer": [5]})
    assert f"peak {tightfit.core.plan.mib(max(shown.levels))}" in text
    assert text.count("<polygon") == len(shown.categories)
    assert "<title>measured</title>" in text
    assert "measured" not in stacked_plot(shown)


def test_the_page_holds_the_figures_and_loads_nothing(plan):
    page = plan_page(plan)
    assert tightfit.core.plan.mib(plan.peak_bytes) in page
    assert "Checkpointing" in page
    assert "recompute" in page
    without_namespaces = page.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|<script|<link|url\(", without_namespaces)


def test_a_verified_plan_has_a_measured_line_and_a_measured_column():
    torch.manual_seed(0)
    config = hf.BertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, vocab_size=200
    )
    model = hf.BertForSequenceClassification(config)
    plan = tightfit.plan(model, tightfit.Checkpointing(), batch=(4, 16), clip=1.0)
    found = plan.verify()
    page = plan_page(plan, found)
    assert "<title>measured</title>" in page and "measured</th>" in page
    for name in ("peak", "forward", "backward", "clip", "optimizer", "zero grad", "saved for backward"):
        row = re.search(rf"<tr><td>{name}</td><td class=number>(.+?)</td><td class=number>(.+?)</td>", page)
        assert row and row[1] == row[2], name  # to a tenth of a MiB
    # the line follows the predicted roof: at every column of a phase it stays near the highest predicted level
    line = re.search(r'<polyline points="([^"]+)"', page)[1]
    heights = [float(point.split(",")[1]) for point in line.split()]
    peak = re.search(r'<circle cx="[\d.]+" cy="([\d.]+)"', page)[1]
    assert min(heights) == pytest.approx(float(peak), abs=0.2)


def test_the_page_of_a_refused_recipe_says_why():
    config = hf.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = tightfit.skeleton(config, task="sequence-classification")
    refused = tightfit.plan(model, tightfit.chain(tightfit.Lora(), tightfit.Lora(rank=4)), batch=(1, 4))
    assert "Lora appears twice" in plan_page(refused)


BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_page_without_sideways_scrolling(plan, tmp_path, width):
    write_plan_page(plan, tmp_path / "plan.html")
    # the page measures itself in a frame of the wanted width: headless windows have a least width of their own
    (tmp_path / "probe.html").write_text(
        f'<iframe id="page" src="plan.html" style="width:{width}px;height:800px;border:0"></iframe><script>'
        "onload = () => { const d = document.getElementById('page').contentDocument;"
        "document.title = [d.documentElement.scrollWidth, d.querySelectorAll('svg polygon').length,"
        "Math.round(d.querySelector('svg').getBoundingClientRect().width)].join(' '); }</script>"
    )
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--allow-file-access-from-files", "--virtual-time-budget=5000", f"--user-data-dir={tmp_path / 'web'}"]
    done = subprocess.run(
        [*command, "--dump-dom", (tmp_path / "probe.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    found = re.search(r"<title>(\d+) (\d+) (\d+)</title>", done.stdout)
    assert found, done.stdout[-500:] + done.stderr[-500:]
    scroll, areas, plot = map(int, found.groups())
    assert scroll <= width
    assert areas >= 4
    assert 0.8 * min(width, 900) < plot <= width  # the text column is 56rem wide at most
