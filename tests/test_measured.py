# SPDX-License-Identifier: Apache-2.0
"""Pages and pictures show what the committed results say, and the results say where they are from."""

import json
import re
import sys
from pathlib import Path

import pytest
from needs import need

from nb_sparse_adam._src.bench import chart, comparison
from nb_sparse_adam._src.bench.lines import LINES
from nb_sparse_adam._src.bench.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
try:
    from benchmarks import largest_table
    from benchmarks.pages import __main__ as pages
    from benchmarks.pages import recommender_tables, speed, tables
finally:
    sys.path.remove(str(ROOT))

RESULTS = sorted(pages.MEASURED.glob("*.json"))


# --- the results ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_result_names_its_commit_and_no_place(path):
    def unique(pairs):
        names = [name for name, _ in pairs]
        assert len(set(names)) == len(names), names  # the last one would win
        return dict(pairs)

    text = path.read_text(encoding="utf-8")
    result = json.loads(text, object_pairs_hook=unique)
    assert re.fullmatch("[0-9a-f]{7}", result["commit"])
    assert not re.search(r"/(root|home|work|tmp|Users|mnt)\b|hostname", text)


def test_there_are_a_processor_and_a_gpu():
    assert {f"{name}.json" for name in pages.PROCESSORS} < {path.name for path in RESULTS}
    for machine in pages.machines():
        assert not machine.result["quick"]
        assert not machine.result["interrupted"]
        assert machine.result["missing_peers"] == {}


# --- pages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages.PAGES)
def test_a_page_shows_what_was_measured(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert pages.rendered(text) == text, "python -m benchmarks.pages"
    assert text.count("<!-- measured:") == text.count("<!-- end -->") == len(pages._MARKED.findall(text))


def test_each_table_is_on_a_page():
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in pages.PAGES)
    for name in [*pages._OF_MACHINES, *pages._OF_GPU, "files", "recommenders"]:
        assert f"<!-- measured: {name} -->" in text


def test_what_a_page_says_by_hand_is_noticed():
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    wrong = text.replace("**146**", "**147**", 1)
    assert wrong != text
    assert pages.rendered(wrong) == text
    with pytest.raises(
        ValueError, match="measured: no such table, expected one of claim, machines, others, "
    ):
        pages.rendered("<!-- measured: no such table -->\n<!-- end -->")


def rows_of(table):
    return [row.strip("| ").split(" | ") for row in table.splitlines() if row.startswith("| ")][2:]


def test_ratios_are_those_that_bench_found():
    machines = pages.machines()
    for name, wanted in (("others", tables.OTHERS), ("in torch", tables.IN_TORCH)):
        text = pages.content(name)
        found = [
            f"**{figure['value']:.1f}×**"
            for machine in machines
            for line in machine.lines.values()
            for figure in line["figures"]
            if figure["label"].partition(" / ")[2] in wanted
        ]
        assert len(found) > 6
        assert sorted(found) == sorted(re.findall(r"\*\*[\d.]+×\*\*", text))


def test_all_missed_targets_are_listed():
    machines = pages.machines()
    missed = [
        figure for machine in machines for line in machine.result["lines"] for figure in line["figures"]
        if figure["met"] is False
    ]  # fmt: skip
    assert len(re.findall(r"\| \*\*[^|]+\*\* ", pages.content("missed"))) == len(missed) > 0


def test_an_old_result_is_called_old_wherever_it_is_shown():
    assert pages.load(pages.XEON)["commit"] == "5b82f2e"
    for name in [*pages._OF_MACHINES, "files"]:
        text = pages.content(name)
        if text.startswith("|"):
            assert "† Measured before the engine was rebuilt." in text, name
    assert "before the engine was rebuilt" in tables.when(pages.load(pages.XEON))
    new = {**pages.load(pages.XEON), "commit": "0123abc"}
    assert tables.at(new) == "`0123abc`"
    assert tables.note(new) == ""


def test_recommenders_are_shown_with_what_they_took():
    line = LINES["recommender"]
    names = [entry.name for entry in line.entries if entry.threads is None]
    numbers = {number: 2.0 for entry in line.entries for number in line.numbers_of(entry)}
    del numbers["LightFM WARP, recommend"]
    curve = {"seconds": [[1.0]], "recall": [[0.5]]}
    shown = {
        "title": "recommenders, mine.csv",
        "numbers": numbers | {"softmax, recall@20": 0.25, "implicit ALS, recall@20": 0.5},
        "curves": dict.fromkeys(names, curve),
    }
    shown["figures"] = comparison.figures(line, shown["numbers"])
    result = {**comparison.describe(Settings((), 2, False)), "commit": "0123abc", "lines": [shown]}
    text = recommender_tables.page(result)
    assert set(names) == set(recommender_tables.NAMES)
    assert '| this library, `loss="softmax"` | 0.2500 | 2.0 s | 2.0 s | 2.0 s | 2.0 s |' in text
    assert "| LightFM, WARP | 2.0000 | 2.0 s | 2.0 s | 2.0 s |  |" in text
    assert "| recall@20, softmax / ALS | ≥ 1.05 | **0.5** |" in text
    assert "| an epoch, BPR / implicit's | ≤ 3 | 1 |" in text
    assert "| compiling, once |  | 2.0 s |" in text
    for figure in line.figures:
        assert f"| {figure.label} |" in text


def test_figures_of_a_gpu_follow_from_what_was_timed():
    times = pages.load("gpu-h200-times")
    for found in times["rows"].values():
        if isinstance(found, dict):
            rate = found["update_bytes"] / found["update_ms"] / 1e6
            assert rate / times["copy"]["copy_gb_per_s"] == pytest.approx(found["share_of_copy"])
            assert f"{found['share_of_copy']:.2f}" in pages.content("gpu updates")
    for found in (times["bags"]["zipf"], times["bags"]["uniform"], times["torch_rows"]):
        assert found["torch_wall_ms"] / found["ours_wall_ms"] == pytest.approx(found["torch_over_ours"])
        assert f"{found['torch_over_ours']:.2g}×" in pages.content("gpu torch")
    assert rows_of(pages.content("gpu checks"))[-1] == ["all", "**146**", "**146**"]


# --- pictures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("picture", pages.PICTURES)
def test_a_picture_shows_the_result_as_it_is(picture):
    result, _ = pages.PICTURES[picture]
    assert pages.is_current(pages.MEASURED / picture, result), "python -m benchmarks.pages"


def test_a_picture_of_another_result_is_noticed(tmp_path):
    need("matplotlib")
    result = pages.load(pages.EPYC)
    other = {**result, "date": "2020-01-01"}
    (tmp_path / "one.png").write_bytes(chart.png(speed.draw(result, "a processor"), result))
    (tmp_path / "other.png").write_bytes(chart.png(speed.draw(other, "a processor"), other))
    assert pages.is_current(tmp_path / "one.png", pages.EPYC)
    assert not pages.is_current(tmp_path / "other.png", pages.EPYC)
    assert not pages.is_current(tmp_path / "none.png", pages.EPYC)


def test_the_six_bars_are_figures_of_the_result():
    result = pages.load(pages.EPYC)
    shown = speed.bars(result)
    assert {bar.step.theirs.split()[0] for bar in shown} == {"torch", "Paddle", "FBGEMM"}
    found = {
        (line["key"], figure["label"]): figure["value"]
        for line in result["lines"]
        for figure in line["figures"]
    }
    for bar in shown:
        label = f"{bar.step.theirs} / {bar.step.ours}"
        assert bar.ratio == pytest.approx(found[bar.step.key, label])
    # The step at which the others come closest is among them.
    beside = [
        value for (_, label), value in found.items()
        if label.startswith(("torch / ", "FBGEMM", "Paddle")) and label.endswith(" / element")
    ]  # fmt: skip
    assert min(bar.ratio for bar in shown) == pytest.approx(min(beside))


def test_texts_of_the_six_bars():
    assert [speed.times(ratio) for ratio in (1.68, 9.94, 9.96, 13.44)] == ["1.7×", "9.9×", "10×", "13×"]
    assert [speed.milliseconds(ms) for ms in (5.87, 9.96, 78.9)] == ["5.9", "10", "79"]


def test_the_six_bars_need_a_whole_run_with_all_peers():
    result = pages.load(pages.EPYC)
    with pytest.raises(ValueError, match="a quick run"):
        speed.bars({**result, "quick": True})
    lines = [line for line in result["lines"] if line["key"] != "paddle"]
    with pytest.raises(ValueError, match="no paddle: Paddle, no paddle: element: measure with all peers"):
        speed.bars({**result, "lines": lines})


def drawn_texts(figure):
    """(text, its place in pixels) of all texts that are drawn, and the canvas' place."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [(text, text.get_window_extent(renderer)) for text in texts], figure.bbox


def overlap(one, other):
    return one.x0 < other.x1 and other.x0 < one.x1 and one.y0 < other.y1 and other.y0 < one.y1


@pytest.mark.parametrize("picture", pages.PICTURES)
def test_no_text_of_a_picture_is_cut_or_lies_on_another_or_on_a_line(picture):
    need("matplotlib")
    result, draw = pages.PICTURES[picture]
    figure = draw(pages.load(result))
    texts, whole = drawn_texts(figure)
    assert len(texts) > 20
    for number, (text, place) in enumerate(texts):
        assert whole.x0 <= place.x0 <= place.x1 <= whole.x1, text
        assert whole.y0 <= place.y0 <= place.y1 <= whole.y1, text
        for other, there in texts[:number]:
            assert not overlap(place, there), (text, other)
        for ax in figure.axes:
            for line in ax.lines:
                if len(line.get_xdata()):
                    assert not overlap(place, line.get_window_extent()), (text, line)


def test_a_result_of_now_can_be_shown(monkeypatch):
    """What `bench` writes has what pages and pictures ask for, and says its commit where there is one."""
    result = comparison.describe(comparison.Settings(peers=(), threads=1, quick=False))
    assert {"commit", "date", "quick", "threads", "machine", "versions", "missing_peers"} < set(result)
    if (ROOT / ".git").exists():
        assert result["commit"] is None or re.fullmatch("[0-9a-f]{7,}(-dirty)?", result["commit"])
    machine = tables.Machine("a processor", "it", {**result, "commit": None, "lines": []})
    assert tables.machines_table([machine]).splitlines()[2].startswith("| a processor, ")
    assert "unknown commit" in tables.when(machine.result)


@pytest.mark.jit
def test_the_largest_table_is_filled_and_drawn(tmp_path):
    largest_table.main(
        ["--rows", "400000", "--dim", "2", "--json", f"{tmp_path}/x.json", "--png", f"{tmp_path}/x.png"]
    )
    result = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert [point["rows"] // 20_000 for point in result["points"]][-1] >= 19
    assert all(0 < point["longest of writes"] < 10 for point in result["points"])
    assert chart.checksum(result).encode() in (tmp_path / "x.png").read_bytes()
