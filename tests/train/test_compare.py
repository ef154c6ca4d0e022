import dataclasses
import json
import math
import xml.etree.ElementTree as tree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import recipe_file

from tightfit.core.errors import ConflictError, RecipeError
from tightfit.presets import named, presets
from tightfit.train.bench import compare, measure_recipe
from tightfit.train.card import table_rows
from tightfit.train.plots import draw_comparison, place_labels

pytestmark = pytest.mark.usefixtures("light_garbage")

PART = [{"PartialEmbedding": {}}]
LORA = [{"Lora": {"rank": 2}}]
BOTH = [*LORA, {"Checkpointing": {}}]


@pytest.fixture(scope="module")
def found(folder):
    files = [recipe_file(folder, methods, epochs=1) for methods in (PART, BOTH)]
    heard = []
    comparison = compare(files, output=folder / "out", echo=heard.append)
    return comparison, heard


def test_stock_comes_first_and_baselines_are_marked(found):
    rows = found[0].rows
    assert [row.name for row in rows] == ["stock", "PartialEmbedding", "Lora + Checkpointing"]
    assert [row.baseline for row in rows] == [True, False, True]
    assert [row.exact for row in rows] == [True, True, False]
    assert rows[0].step_time == 1.0 and all(0.1 < row.step_time < 10 for row in rows)
    assert sum("of 3" in line for line in found[1]) == 3


def test_figures(found):
    stock, part, both = found[0].rows
    assert part.metrics == stock.metrics and part.peak_bytes < stock.peak_bytes
    assert part.saved_bytes <= stock.saved_bytes and both.saved_bytes < stock.saved_bytes
    assert both.trainable_parameters < stock.trainable_parameters
    for row in found[0].rows:
        assert abs(row.predicted_peak_bytes / row.peak_bytes - 1) < 0.05


def test_what_is_written(folder, found):
    out = folder / "out"
    assert json.loads((out / "comparison.json").read_text()) == json.loads(json.dumps(found[0].to_dict()))
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    tree.parse(out / "plot.svg")
    page = (out / "report.html").read_text()
    assert page.count("<tr>") == 4 and "<svg" in page and "<b>PartialEmbedding</b>" in page
    assert {p.name for p in (out / "runs").iterdir()} == {"stock", "partialembedding", "lora-checkpointing"}
    head, rows = table_rows(found[0])
    assert head[-1] == "accuracy" and rows[0][3] == "1.00" and len(rows) == 3


def test_figures_that_are_no_numbers_are_null_in_json(found):
    row = dataclasses.replace(found[0].rows[0], metric=math.inf, metrics={"loss": math.nan})
    text = json.dumps(dataclasses.replace(found[0], rows=(row,)).to_dict(), allow_nan=False)
    assert json.loads(text)["rows"][0]["metric"] is None


def test_resume_keeps_finished_runs(folder, found):
    before = (folder / "out" / "runs" / "stock" / "run.json").stat().st_mtime_ns
    files = [recipe_file(folder, methods, epochs=1) for methods in (PART, BOTH)]
    again = compare(files, output=folder / "out", resume=True)
    assert (folder / "out" / "runs" / "stock" / "run.json").stat().st_mtime_ns == before
    assert [row.metric for row in again.rows] == [row.metric for row in found[0].rows]


def test_what_cannot_be_compared_is_refused_before_training(folder, tmp_path):
    one = recipe_file(folder, LORA)
    with pytest.raises(RecipeError, match=r"differ in train\.seed \(0 and 1\)"):
        compare([one, recipe_file(folder, [], seed=1)], output=tmp_path)
    with pytest.raises(RecipeError, match="more than once"):
        compare([one, one], output=tmp_path)
    with pytest.raises(RecipeError, match=r"a\.b and a-b would share the folder a-b"):
        compare([one, recipe_file(folder, PART)], output=tmp_path, names=["a.b", "a-b"])
    with pytest.raises(RecipeError, match="Stock is the name of the run without methods"):
        compare([one], output=tmp_path, names=["Stock"])
    with pytest.raises(RecipeError, match="no recipe"):
        compare([], output=tmp_path)
    with pytest.raises(ConflictError, match="twice"):
        compare([one, recipe_file(folder, [*LORA, *LORA])], output=tmp_path, names=["one", "twice"])
    assert not list(tmp_path.iterdir())


def test_measure_recipe(folder):
    found = measure_recipe(recipe_file(folder, PART))
    assert sum(v for k, v in found["by_category"].items() if k != "host") == found["peak_bytes"]
    assert found["predicted_peak_bytes"] and found["seconds"] > 0 and json.dumps(found)


def test_names_of_recipes():
    assert str(named("stock")) == "stock" and len(presets()) >= 6
    assert named("lora+checkpointing") == presets()["lora_checkpointing"] == named("lora-checkpointing")
    assert [t.name for t in named("partial-embedding + lora")] == ["partial-embedding", "lora"]
    for name, words in [
        ("loraa", "did you mean 'lora'"),
        ("", "unknown name ''"),
        ("lora+lora", "twice"),
        ("token-tune", "ratio"),
    ]:
        with pytest.raises(RecipeError, match=words):
            named(name)


NAMES = [
    "stock",
    "PartialEmbedding",
    "Checkpointing",
    "PartialEmbedding + Checkpointing",
    "Lora",
    "Lora + Checkpointing",
]
points = st.tuples(st.floats(0.7, 1.5), st.floats(50, 1000))


@settings(max_examples=10, deadline=None)
@given(st.lists(points, min_size=6, max_size=6))
def test_labels_cover_neither_each_other_nor_the_points(spots):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(figsize=(7.2, 4.6))
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.scatter(*zip(*spots))
    axes.margins(0.25)
    canvas.draw()
    texts = place_labels(axes, spots, NAMES)
    for text in texts:
        text.update_positions(canvas.get_renderer())
    boxes = [Text.get_window_extent(text, canvas.get_renderer()) for text in texts]  # without leader lines
    assert [text.get_text() for text in texts] == NAMES
    for i, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[i + 1 :])


def test_a_plot_of_one_row(found, tmp_path):
    one = dataclasses.replace(found[0], rows=found[0].rows[:1])
    assert draw_comparison(one, tmp_path / "a.png", tmp_path / "a.svg").startswith("<svg")
