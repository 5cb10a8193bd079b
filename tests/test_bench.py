# SPDX-License-Identifier: Apache-2.0
"""The comparison of speeds compares what it says, and says what it found. No test here judges a time."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from needs import need

import nb_sparse_adam
from nb_sparse_adam.__main__ import main
from nb_sparse_adam._src.bench import cases, chart, comparison, text, timing, worker
from nb_sparse_adam._src.bench.cases import CASES, CSR, Bag, Case, Rows, compact
from nb_sparse_adam._src.bench.contenders import Contender, Ours
from nb_sparse_adam._src.bench.in_torch import DropInRows, FusedBag
from nb_sparse_adam._src.bench.interaction_data import DATA
from nb_sparse_adam._src.bench.limits import Limit
from nb_sparse_adam._src.bench.line import Figure
from nb_sparse_adam._src.bench.lines import LINES
from nb_sparse_adam._src.bench.peers import PEERS, TorchBag, TorchEntries, TorchRows
from nb_sparse_adam._src.bench.settings import Settings
from nb_sparse_adam._src.engine.threads import max_threads
from nb_sparse_adam.errors import MissingExtraError, OptionError

ALONE = Settings(peers=(), threads=1, quick=True)

# Every form of gradient, of tables that can be looked at whole.
TINY = {
    case.name: case
    for case in (
        Case("rows", 60, 20, 2, functools.partial(cases._unique_rows, n=17, ordered=True)),
        Case("bags", 60, 20, 2, functools.partial(cases._bag, bags=5, lookups=6, zipf=False)),
        Case("weighted bags", 90, 1, 2, functools.partial(cases._design_matrix, samples=6, nonzeros=4)),
        Case("csr", 60, 20, 2, functools.partial(cases._csr, n=17, per_row=3)),
    )
}


# --- cases ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_case_is_the_same_at_every_call_and_fits_its_table(name):
    case = dataclasses.replace(CASES[name].smaller(), gradients=1)
    (given,), (again,) = case.arrays(), case.arrays()
    for one, other in zip(given, again, strict=True):
        np.testing.assert_array_equal(one, other)
    if isinstance(given, CSR):
        assert len(given.indptr) == case.rows + 1
        assert given.indptr[-1] == len(given.indices) == len(given.data)
        assert given.indices.max() < case.dim
        return
    ids, values = (
        (given.rows, given.values) if isinstance(given, Rows) else (given.indices, given.grad_output)
    )
    assert 0 <= ids.min() <= ids.max() < case.rows
    assert values.shape[1] == case.dim
    assert values.dtype == np.float32


def test_the_gradients_of_a_case_differ():
    first, second = TINY["rows"].arrays()
    assert not np.array_equal(first.rows, second.rows)


def test_half_of_the_ids_are_one_row_or_the_same_batch_is_without_it():
    hot, without = (
        dataclasses.replace(CASES[name].smaller(), gradients=1) for name in ("bag-hot", "bag-hot-without")
    )
    (with_it,), (less,) = hot.arrays(), without.arrays()
    counts = np.bincount(with_it.indices)
    assert len(with_it.indices) == 2 * len(less.indices)
    assert counts.max() >= len(with_it.indices) // 2
    np.testing.assert_array_equal(with_it.indices[1::2], less.indices)


# --- lines ------------------------------------------------------------------------------------------------


def test_keys_and_names_are_unique():
    assert [line.key for line in LINES.values()] == list(LINES)
    assert len(LINES) == len(comparison.choose_lines([""], quick=False))
    for line in LINES.values():
        for names in ([entry.name for entry in line.entries], [figure.label for figure in line.figures]):
            assert len(set(names)) == len(names), line.key


@pytest.mark.parametrize("line", LINES.values(), ids=LINES.keys())
def test_a_line_names_what_there_is(line):
    assert line.measure in {*worker._MEASURES, "recommenders"}
    numbers = {name for entry in line.entries for name in line.numbers_of(entry)}
    for entry in line.entries:
        assert entry.case in (DATA if line.measure == "recommenders" else CASES)
        assert entry.peer is None or entry.peer in PEERS
    for figure in line.figures:
        assert {figure.over, figure.under} - {None} <= numbers
        assert figure.at_least is None or figure.at_most is None


@pytest.mark.parametrize("line", LINES.values(), ids=LINES.keys())
def test_a_line_of_one_figure_keeps_what_that_needs(line):
    for figure in line.figures:
        only = line.only(figure.label)
        assert only.figures == (figure,)
        assert 1 <= len(only.entries) <= 2
        numbers = {name: 1.0 for entry in only.entries for name in only.numbers_of(entry)}
        assert figure.value(numbers) == (0.0 if figure.difference else 1.0)


def test_sizes_are_written_in_few_characters():
    sizes = {1: "1", 4096: "4096", 200_000: "200k", 2_000_000: "2M", 1 << 24: "2**24", 1_677_721: "1.68M"}
    assert [compact(size) for size in sizes] == list(sizes.values())


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("line", LINES.values(), ids=LINES.keys())
def test_a_title_says_the_sizes_that_are_measured(line, quick):
    title = line.titled(quick)
    assert "{" not in title
    if line.key in ("large", "first-step", "scratch") or line.measure in (
        "processes",
        "recommenders",
        "stream",
        "index",
    ):
        return  # of several tables
    case = line.entries[0].sized(quick)
    assert (case == CASES[case.name]) is not quick
    assert re.findall(r"\S+ x \d+", title) == [f"{compact(case.rows)} x {case.dim}"]
    counted = r"(\w+) (?:(?:sorted|shuffled) )?(?:rows? of|\S+ ids|bags|samples)\b"
    said = re.search(counted, title)[1]
    gradient = dataclasses.replace(case, gradients=1).arrays()[0] if quick else None
    if isinstance(gradient, Rows):
        assert said == compact(len(gradient.rows))
    elif isinstance(gradient, Bag):
        assert said == compact(len(gradient.offsets) - 1)
    elif isinstance(gradient, CSR):
        assert said == compact(np.count_nonzero(np.diff(gradient.indptr)))


def test_quick_titles_are_not_those_of_the_whole_run():
    titles = [(line.titled(False), line.titled(True)) for line in LINES.values() if "{table}" in line.title]
    assert len(titles) > 20
    assert all(whole != quick for whole, quick in titles)


def test_figures():
    ratio = Figure("faster", "theirs", "ours", at_least=2.0)
    assert ratio.value({"theirs": 6.0, "ours": 2.0}) == 3.0
    assert ratio.value({"ours": 2.0}) is None
    assert ratio.value({"theirs": 6.0}) is None
    assert (ratio.met(2.0), ratio.met(1.9)) == (True, False)
    seconds = Figure("a step", "ours", at_most=1e-5, unit="s")
    assert seconds.value({"ours": 2e-5}) == 2e-5
    assert (seconds.met(1e-5), seconds.met(2e-5)) == (True, False)
    assert Figure("no target", "ours").met(1.0) is None
    less = Figure("less", "theirs", "ours", at_least=1.0, difference=True)
    assert less.value({"theirs": 6.0, "ours": 2.0}) == 4.0


# --- what is chosen ---------------------------------------------------------------------------------------


def uninstalled(monkeypatch, *names):
    for name in names:
        monkeypatch.setitem(PEERS, name, PEERS[name]._replace(module="no_module_of_this_name"))


def installed(monkeypatch, *names):
    for name in names:
        monkeypatch.setitem(PEERS, name, PEERS[name]._replace(module="json"))


def test_choose_peers(monkeypatch):
    installed(monkeypatch, "torch", "paddle")
    uninstalled(monkeypatch, "fbgemm", "implicit", "lightfm")
    assert comparison.choose_peers(None) == ("torch", "paddle")
    assert comparison.choose_peers("none") == ()
    assert comparison.choose_peers("paddle, torch") == ("torch", "paddle")


@pytest.mark.parametrize("names", ["tensorflow", "", "torch,", "none,torch"])
def test_no_such_peer(names, monkeypatch):
    installed(monkeypatch, *PEERS)
    with pytest.raises(OptionError, match=r"--peers got '.*', expected some of torch, fbgemm, paddle"):
        comparison.choose_peers(names)


def test_a_missing_peer_is_named_with_the_command_that_installs_it(monkeypatch):
    installed(monkeypatch, "torch", "implicit", "lightfm")
    uninstalled(monkeypatch, "fbgemm", "paddle")
    with pytest.raises(MissingExtraError) as caught:
        comparison.choose_peers("torch,fbgemm,paddle")
    assert "paddle: pip install paddlepaddle" in str(caught.value)
    assert "fbgemm: pip install fbgemm-gpu-cpu --index-url https://" in str(caught.value)
    assert "torch:" not in str(caught.value)
    assert set(comparison.describe(ALONE)["missing_peers"]) == {"fbgemm", "paddle"}


def test_choose_lines():
    assert [line.key for line in comparison.choose_lines(["small", "csr"], quick=True)] == [
        "csr",
        "small-1",
        "small-32",
    ]
    every = {line.key for line in comparison.choose_lines([], quick=False)}
    named = {key for key in LINES if key not in every}  # they take long, and must be named
    assert {key for key in named if not key.startswith("table-")} == {"recommender", "recommender-file"}
    assert "large" not in {line.key for line in comparison.choose_lines([], quick=True)}
    for name, quick in (("rows-65", False), ("large", True)):
        with pytest.raises(
            OptionError, match=f"--only got '{name}', expected the beginning of one of rows-16, "
        ):
            comparison.choose_lines(["csr", name], quick)


def test_choose_threads(monkeypatch):
    monkeypatch.setattr(comparison, "usable_cores", lambda: 1)
    assert comparison.choose_threads(None) == comparison.choose_threads(1) == 1
    for number in (0, -1, 2):
        with pytest.raises(OptionError, match=f"--threads got {number}, expected 1 to 1"):
            comparison.choose_threads(number)


# --- what is skipped, and why -----------------------------------------------------------------------------


def skipped(key, settings):
    (line,) = comparison.run([LINES[key]], settings)
    assert line["numbers"] == {}
    assert line["figures"] == []
    return line["skipped"]


def test_a_line_that_needs_a_peer(monkeypatch):
    uninstalled(monkeypatch, "paddle")
    assert skipped("paddle", ALONE) == "needs paddle: pip install paddlepaddle"
    installed(monkeypatch, "paddle")
    assert skipped("paddle", ALONE) == "paddle was left out"


def test_a_figure_that_needs_a_peer(monkeypatch):
    """The others of its line are there."""
    uninstalled(monkeypatch, "fbgemm")
    installed(monkeypatch, "torch")
    answer = {"numbers": {"element": 2.0, "row": 1.0}, "unusable": {}, "skipped": None}
    monkeypatch.setattr(comparison, "_answers", lambda *_: iter([answer]))
    (line,) = comparison.run([LINES["bag-zipf"]], ALONE)
    fbgemm = f"needs fbgemm: {PEERS['fbgemm'].install}"
    assert line["missing"] == {
        "torch / element": "torch was left out",
        "torch / row": "torch was left out",
        "FBGEMM SGD / element": fbgemm,
        "FBGEMM SGD / row": fbgemm,
        "FBGEMM AdaGrad / element": fbgemm,
        "FBGEMM AdaGrad / row": fbgemm,
        "of the limit, grouping included": "there is no number for limit",
    }
    assert line["skipped"] is None
    rows = list(text.text_lines(line))
    assert "    n/a, torch was left out: torch / element, torch / row" in rows
    assert "n/a, needs fbgemm: pip install fbgemm-gpu-cpu" in " ".join(rows)


def test_a_peer_that_cannot_be_imported_takes_its_figures_only(monkeypatch):
    def broken(name):
        raise NotImplementedError(f"{name} cannot be imported (OSError: no luck)")

    monkeypatch.setattr(worker, "import_peer", broken)
    monkeypatch.setitem(worker._MEASURES, "times", lambda line, _: {one.name: 1.0 for one in line.entries})
    settings, unusable = ALONE._replace(peers=("torch", "paddle")), {}
    assert set(worker.measure(LINES["paddle"], settings, unusable)) == {"element", "row"}
    assert unusable == {"Paddle": "paddle cannot be imported (OSError: no luck)"}
    with pytest.raises(worker.CannotMeasureError, match=r"^torch cannot be imported"):
        worker.measure(LINES["torch-bag-zipf"], settings, {})


def test_a_line_that_needs_memory_or_cores(monkeypatch):
    whole = ALONE._replace(quick=False)
    monkeypatch.setattr(comparison, "_memory", lambda _: 3.5)
    assert skipped("large", whole) == "needs 19 GB of free memory, there are 3.5"
    monkeypatch.setattr(comparison, "_memory", lambda _: None)
    monkeypatch.setattr(comparison, "usable_cores", lambda: 1)
    assert skipped("processes-omp", whole) == "needs 2 cores, there is 1"
    assert skipped("threads-rows", ALONE) == "needs 2 cores, there is 1"


def test_a_line_whose_process_dies_is_one_line_less(monkeypatch):
    monkeypatch.setattr(
        comparison, "command", lambda *_: [sys.executable, "-c", "import sys; sys.exit('no luck')"]
    )
    assert skipped("small-1", ALONE) == "its process ended with status 1: no luck"


DIES = """
import json, os, sys
for key in sys.argv[1:]:
    if key == "small-32":
        print("no luck", file=sys.stderr, flush=True)
        os._exit(9)
    answer = {"numbers": {"element": 1.0, "process": os.getpid()}, "unusable": {}, "skipped": None}
    print(json.dumps(answer), flush=True)
"""


@pytest.mark.parametrize("quick", [False, True])
def test_another_worker_goes_on_after_one_that_died(quick, monkeypatch):
    """Quick lines share a worker. Each line is answered once, in order, whichever dies."""
    monkeypatch.setattr(comparison, "command", lambda *given: [sys.executable, "-c", DIES, *given[2:]])
    keys = ["element-64", "small-1", "small-32", "hot", "scratch"]
    lines = [LINES[key]._replace(gigabytes=0) for key in keys]
    found = list(comparison.run(lines, ALONE._replace(quick=quick)))
    assert [line["key"] for line in found] == keys
    died = "its process ended with status 9: no luck"
    assert [line["skipped"] for line in found] == [None, None, died, None, None]
    processes = {line["numbers"]["process"] for line in found if line["numbers"]}
    assert len(processes) == (3 if quick else 4)  # what is no time has its own in any case


def test_a_worker_ends_when_nobody_wants_its_answers(monkeypatch):
    program = "import time; print('{}', flush=True); time.sleep(600)"
    monkeypatch.setattr(comparison, "command", lambda *_: [sys.executable, "-c", program])
    answers = comparison._answers([LINES["small-1"], LINES["small-32"]], ALONE)
    assert next(answers) == {}
    answers.close()  # waits for it


NOISY = """
import os
from nb_sparse_adam._src.bench import worker

def noisy(*_):
    print("hello", flush=True)
    os.write(1, b"from C")
    return {"element": 1.0}

worker.measure = noisy
worker._main("lines", "[[], 1, true]", "small-1", "small-32")
"""


def test_what_a_library_prints_is_no_answer():
    done = subprocess.run([sys.executable, "-c", NOISY], capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers == 2 * [{"numbers": {"element": 1.0}, "unusable": {}, "skipped": None}]
    assert done.stderr.count("from C") == done.stderr.count("hello") == 2


def test_a_threading_layer_that_cannot_be_loaded():
    hint = (
        "ValueError: No threading layer could be loaded.\n"
        "HINT:\nIntel TBB is required, try:\n$ conda/pip install tbb\n"
    )
    assert worker._reason(hint) == "numba cannot load this threading layer: pip install tbb"
    assert worker._reason(hint.partition("HINT")[0]) == "numba cannot load this threading layer"
    assert worker._reason("Traceback\n  ...\nMemoryError: no more\n") == "MemoryError: no more"
    assert worker._reason("") == "the process ended"


@pytest.mark.skipif(sys.platform != "linux", reason="LD_LIBRARY_PATH")
def test_tbb_is_looked_for_where_pip_puts_it(monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", "/somewhere")
    environment = worker._environment("tbb")
    assert environment["LD_LIBRARY_PATH"].split(os.pathsep) == [os.path.join(sys.prefix, "lib"), "/somewhere"]
    assert environment["NUMBA_THREADING_LAYER"] == "tbb"
    assert worker._environment("omp")["LD_LIBRARY_PATH"] == "/somewhere"


# --- taking turns -----------------------------------------------------------------------------------------


class Recorder(Contender):
    """Writes down what it is asked to do."""

    def __init__(self, name, did, rest):
        super().__init__(TINY["rows"])
        self.name, self.did, self.rest = name, did, rest

    def ready(self):
        self.did.append(f"{self.name} ready")

    def step(self):
        self.did.append(f"{self.name} steps")


def test_contenders_take_turns_on_idle_cores_with_threads_that_are_awake(monkeypatch):
    did, clock = [], iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: did.append("clock") or next(clock))
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: did.append(f"rest {seconds}"))
    contenders = {"a": Recorder("a", did, 0.25), "b": Recorder("b", did, 0.02)}
    seconds = timing.alternate(contenders, repeats=2, loop=2)
    assert [len(times) for times in seconds.values()] == [2, 2]
    warm = 2 * TINY["rows"].gradients
    assert did[: 4 * warm] == ["a ready", "a steps"] * warm + ["b ready", "b steps"] * warm
    once = ["{} ready", "{} steps", "{} ready"]  # not timed
    timed = ["clock", "{} steps", "{} ready", "{} steps", "clock"]
    a, b = ([text.format(name) for text in once + timed] for name in "ab")
    assert did[4 * warm :] == ["rest 0.25", *a, "rest 0.25", *b, "rest 0.02", *a, "rest 0.25", *b]
    did.clear()
    timing.alternate(contenders, repeats=1, longest_rest=0.05)
    assert [what for what in did if "rest" in what] == 2 * ["rest 0.05"]


# --- the same work ----------------------------------------------------------------------------------------


def run(contender, steps=2):
    for _ in range(steps):
        contender.ready()
        contender.step()


def tables(contender):
    (param,), (state,) = contender.optimizer.tables.values(), contender.optimizer.state.values()
    return {"param": param, "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq, "steps": state.steps}


@pytest.mark.jit
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("reads", [1, 2])
@pytest.mark.parametrize(
    ("name", "step_counts"),
    # The limit of CSR is that of single elements.
    [(name, "element") for name in TINY]
    + [(name, k) for name in TINY if name != "csr" for k in ("row", "global")],
)
def test_the_limit_writes_where_a_step_writes(name, step_counts, reads, threads):
    case, threads = TINY[name], min(threads, max_threads())
    ours = Ours(case, step_counts=step_counts, threads=threads)
    limit = Limit(case, step_counts=step_counts, threads=threads, reads=reads)
    limit.optimizer.lr = 1
    changed = []
    for contender in (ours, limit):
        before = {what: array.copy() for what, array in tables(contender).items()}
        run(contender)
        changed.append({what: array != before[what] for what, array in tables(contender).items()})
    by_step, by_limit = changed
    assert 0 < by_step["param"].sum() < by_step["param"].size
    for what in by_step:
        if what == "steps" and step_counts == "global":
            continue  # one number
        one, other = by_step[what], by_limit[what]
        if (
            name == "bags"
        ):  # where the limit adds what it has summed to the first element, and zeros to the others
            one, other = (array.reshape(case.rows, -1).any(axis=1) for array in (one, other))
        np.testing.assert_array_equal(other, one, what)


@pytest.mark.jit
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("rows", functools.partial(TorchRows, coalesced=True)),
        ("csr", functools.partial(TorchEntries, coalesced=True)),
        ("bags", TorchBag),
        ("weighted bags", TorchBag),
        ("rows", functools.partial(DropInRows, coalesced=False)),
        ("bags", FusedBag),
        ("weighted bags", FusedBag),
    ],
)
def test_torch_is_given_the_same_work(name, make):
    torch = need("torch")
    threads, case = torch.get_num_threads(), TINY[name]
    try:
        theirs = make(case, threads=1)
        run(theirs)
    finally:
        torch.set_num_threads(threads)
    # On single entries torch counts steps of the table, and updates entries: we have no such pair.
    ours = Ours(case, step_counts="element" if name == "csr" else "global", threads=1, eps_hat=True)
    ours.step()  # it holds the first gradient
    run(ours, 1)
    got, expected = tables(ours)["param"], theirs._optimizer.param_groups[0]["params"][0].detach().numpy()
    np.testing.assert_array_equal(got != np.float32(0.1), expected != np.float32(0.1))
    if name != "csr":
        np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.jit
def test_scratch_is_counted_by_the_id(monkeypatch):
    """On small bags, as the real ones take seconds."""
    monkeypatch.setitem(
        CASES,
        "bag-zipf",
        dataclasses.replace(
            TINY["bags"], make=functools.partial(cases._bag, bags=400, lookups=20, zipf=False)
        ),
    )
    line = LINES["scratch"].only("bytes an id, bags")
    numbers = worker.measure(line, ALONE)
    assert set(numbers) == {"bags", "bags, bytes besides"}
    assert 0 < numbers["bags"] < 200


@pytest.mark.jit
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_is_not_needed_is_counted_in_gradients():
    need("torch")
    settings = ALONE._replace(peers=("torch",))
    answer = subprocess.run(
        worker.command("lines", json.dumps(settings), "torch-memory"),
        check=True,
        text=True,
        capture_output=True,
    )
    numbers = json.loads(answer.stdout)["numbers"]
    assert set(numbers) == {"torch", "EmbeddingBag"}
    assert numbers["torch"] - numbers["EmbeddingBag"] >= 1


# --- what is shown ----------------------------------------------------------------------------------------


def shown(line, numbers=None, reason=None):
    """A line as `comparison.run` yields it."""
    if numbers is None and reason is None:
        numbers = {name: 2.0 for entry in line.entries for name in line.numbers_of(entry)}
    numbers = numbers or {}
    return {
        "key": line.key,
        "title": line.titled(False),
        "section": line.section,
        "numbers": numbers,
        "figures": comparison.figures(line, numbers),
        "missing": {},
        "skipped": reason,
    }


def test_text_lines():
    line = shown(LINES["small-1"], {"element": 12.34e-6, "torch": 43.19e-6})
    assert list(text.text_lines(line)) == [
        "1 row of 100k x 16",
        "    a step                              12.3 µs  <= 15 µs  met",
        "    torch / element                        3.50  >= 4.5    NOT met",
        "    element 12.3 µs; torch 43.2 µs",
    ]
    without_torch = shown(LINES["small-1"], {"element": 0.0123})
    assert [row.split() for row in text.text_lines(without_torch)][1:] == [
        ["a", "step", "12.30", "ms", "<=", "15", "µs", "NOT", "met"],
        ["element", "12.30", "ms"],
    ]
    assert list(text.text_lines(shown(LINES["large"], reason="needs 19 GB"))) == [
        "80M instead of 10M rows of 16: n/a, needs 19 GB"
    ]
    slow = shown(LINES["first-step"], {"rows, compiled": 12.345, "rows, from disk": 0.4567})
    assert [row.split()[-2:] for row in text.text_lines(slow)][1:3] == [["12.35", "s"], ["456.70", "ms"]]


@pytest.mark.parametrize("line", LINES.values(), ids=LINES.keys())
def test_columns_stay_apart(line):
    title, *rest = text.text_lines(shown(line))
    assert title == line.titled(False)
    for figure, row in zip(line.figures, rest, strict=False):
        assert re.match(rf"    {re.escape(figure.label)}  +\S.*", row)
        assert len(row) <= 79


def fake_result(*lines, quick=False):
    return {**comparison.describe(ALONE._replace(quick=quick)), "interrupted": False, "lines": list(lines)}


def test_headline(monkeypatch):
    result = fake_result()
    for part in (str(result["machine"]["processor"]), "1 threads", f"numpy {np.__version__}"):
        assert part in text.headline(result)
    monkeypatch.setattr(comparison, "_memory", lambda _: None)  # there is no /proc
    assert " GB" not in text.headline(fake_result())


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize(
    "lines",
    [
        pytest.param([], id="nothing"),
        pytest.param([shown(LINES["large"], reason="no memory")], id="skipped"),
        pytest.param([shown(LINES["rows-64"])], id="limits alone"),
        pytest.param([shown(LINES["paddle"])], id="peers alone"),
        pytest.param([shown(line) for line in LINES.values()], id="all"),
    ],
)
def test_the_chart_draws_what_there_is(lines, quick):
    need("matplotlib")
    result = fake_result(*lines, quick=quick)
    figure = chart.draw(result)
    png = chart.png(figure, result)
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert chart.checksum(result).encode() in png
    shown = chart.panels(result)
    assert [ax.get_title(loc="left") for ax in figure.axes if ax.get_title(loc="left")] == [
        title for title, _ in shown
    ]
    for ax, (_, bars) in zip(figure.axes, shown, strict=False):
        assert len(ax.patches) == len(bars)


# --- the command ------------------------------------------------------------------------------------------


@pytest.fixture
def no_measuring(monkeypatch):
    def refuse(*_):
        raise AssertionError("something was measured")

    monkeypatch.setattr(comparison, "run", refuse)


def load(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert {path.name for path in folder.iterdir()} == {"bench.json", "bench.png"}
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "bench.json").read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.mark.jit
def test_bench(tmp_path, capsys):
    need("matplotlib")
    arguments = ["--quick", "--only", "small-1", "--peers", "none", "--threads", "1"]
    assert main(["bench", *arguments, "--out", str(tmp_path / "deep" / "run")]) == 0
    said = capsys.readouterr().out
    result = load(tmp_path / "deep" / "run")
    assert list(result) == [
        *["schema", "commit", "date", "quick", "threads", "machine", "versions", "missing_peers"],
        *["interrupted", "lines"],
    ]
    assert (result["schema"], result["quick"], result["threads"], result["interrupted"]) == (
        1,
        True,
        1,
        False,
    )
    assert result["versions"]["numpy"] == np.__version__
    assert not set(PEERS) & set(result["versions"])
    (line,) = result["lines"]
    assert list(line) == ["key", "title", "section", "numbers", "figures", "missing", "skipped"]
    assert (line["key"], line["skipped"]) == ("small-1", None)
    assert line["title"] == "1 row of 10k x 16"
    assert set(line["missing"]) == {"torch / element"}
    assert list(line["numbers"]) == ["element"]
    (figure,) = line["figures"]  # the other one is of torch
    value = figure.pop("value")
    assert value == line["numbers"]["element"] > 0
    assert figure == {"label": "a step", "unit": "s", "at_least": None, "at_most": 1.5e-5, "met": None}
    assert "a quick run" in said
    assert line["title"] in said
    assert str(tmp_path) in said


def test_an_interrupt_saves_what_there_is(tmp_path, capsys, monkeypatch):
    need("matplotlib")

    def interrupted(*_):
        yield shown(LINES["csr"])
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "run", interrupted)
    assert main(["bench", "--only", "csr", "small", "--peers", "none", "--out", str(tmp_path)]) == 130
    assert "interrupted after 1 of 3 lines: saving what there is" in capsys.readouterr().out
    result = load(tmp_path)
    assert result["interrupted"] is True
    assert [line["key"] for line in result["lines"]] == ["csr"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--peers", "tensorflow"], "--peers got 'tensorflow'"),
        (["--only", "nothing"], "--only got 'nothing'"),
        (["--threads", "0"], "--threads got 0"),
        (["--threads", "two"], "argument --threads: "),
        (["--epochs", "3"], "--epochs"),
    ],
)
def test_wrong_arguments_are_usage_errors_of_bench(arguments, words, capsys, no_measuring):
    with pytest.raises(SystemExit) as caught:
        main(["bench", *arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert "nb-sparse-adam" in error.splitlines()[0]


def test_what_is_missing_is_said_before_the_work(tmp_path, capsys, monkeypatch, no_measuring):
    uninstalled(monkeypatch, "paddle")
    assert main(["bench", "--peers", "paddle", "--out", str(tmp_path)]) == 1
    assert "pip install paddlepaddle" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def measured(monkeypatch):
    """One line, without measuring."""
    monkeypatch.setattr(comparison, "run", lambda *_: iter([shown(LINES["csr"])]))


def test_without_matplotlib_there_is_no_chart_and_a_line_says_how_to_get_it(
    tmp_path, capsys, monkeypatch, measured
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "bench.json").write_text('{\n  "schema": 1}')
    (tmp_path / "bench.png").write_text("the chart of an earlier run")
    assert main(["bench", "--peers", "none", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [row for row in said if 'pip install "nb_sparse_adam[bench]"' in row] == [said[-1]]
    assert said[-1].startswith("no bench.png: drawing the chart needs matplotlib")
    assert said[-2] == f"saved in {tmp_path}: bench.json"
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    assert json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))["lines"]
    assert "    of the limit" in "\n".join(said)


def test_json_on_stdout_and_the_table_on_stderr(tmp_path, capsys, monkeypatch, measured):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--peers", "none", "--json", "-"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["lines"] == [shown(LINES["csr"])]
    assert said.out.isascii()
    assert LINES["csr"].titled(False) in said.err
    assert list(tmp_path.iterdir()) == []


def test_json_in_a_file_of_ones_own(tmp_path, capsys, measured):
    need("matplotlib")
    path, folder = tmp_path / "deep" / "mine.json", tmp_path / "run"
    for _ in range(2):  # a result of an earlier run is replaced
        assert main(["bench", "--peers", "none", "--json", str(path), "--out", str(folder)]) == 0
    assert json.loads(path.read_text(encoding="utf-8")) == load(folder)
    assert str(path) in capsys.readouterr().out


def test_somebody_elses_file_is_not_replaced(tmp_path, capsys, no_measuring):
    path = tmp_path / "mine.json"
    path.write_text('{"name": "package"}')
    assert main(["bench", "--peers", "none", "--json", str(path)]) == 1
    assert "mine.json" in capsys.readouterr().err
    assert path.read_text() == '{"name": "package"}'


def test_the_commit_is_that_of_our_own_checkout(tmp_path, monkeypatch):
    """Not that of a repository around an environment that the package is installed in."""

    def commit_of(package):
        monkeypatch.setattr(nb_sparse_adam, "__file__", str(package / "__init__.py"))
        return comparison._commit()

    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    package = Path(nb_sparse_adam.__file__).parent  # this suite may be run on an installed one
    assert (comparison._commit() is not None) == (package.parent / ".git").exists()
    ours, installed_there = tmp_path / "nb_sparse_adam", tmp_path / "lib" / "nb_sparse_adam"
    for package in (ours, installed_there):
        package.mkdir(parents=True)
        (package / "file").write_text("1")
    assert commit_of(ours) is None
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    assert re.fullmatch("[0-9a-f]{7}", commit_of(ours))
    assert commit_of(installed_there) is None
    (ours / "file").write_text("2")
    assert re.fullmatch("[0-9a-f]{7}-dirty", commit_of(ours))
    monkeypatch.setenv("PATH", "")
    assert commit_of(ours) is None


FIRST_STEP = """
import os, sys
from pathlib import Path
compiled = Path(os.environ["NUMBA_CACHE_DIR"], "kernels")
print(0.25 if compiled.exists() else 12.5)
compiled.write_text(str(sys.argv[1:]))
"""


def test_the_first_step_is_taken_with_nothing_on_disk_and_then_with_what_it_left_there(monkeypatch):
    monkeypatch.setattr(worker, "command", lambda *given: [sys.executable, "-c", FIRST_STEP, *given])
    numbers = worker.measure(LINES["first-step"], ALONE)
    assert set(numbers) == {
        name for entry in LINES["first-step"].entries for name in LINES["first-step"].numbers_of(entry)
    }
    assert {number for name, number in numbers.items() if name.endswith("compiled")} == {12.5}
    assert {number for name, number in numbers.items() if name.endswith("disk")} == {0.25}
    monkeypatch.setattr(worker, "command", lambda *_: [sys.executable, "-c", "raise MemoryError('no luck')"])
    with pytest.raises(worker.CannotMeasureError, match="MemoryError: no luck"):
        worker.measure(LINES["first-step"], ALONE)


@pytest.mark.jit
def test_a_worker_takes_one_step_and_says_how_long_that_took(capsys):
    worker._main("first step", "first-step", "CSR", "1")
    assert float(capsys.readouterr().out) > 0


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys, no_measuring):
    need("matplotlib")
    (tmp_path / "file").write_text("in the way")
    assert main(["bench", "--peers", "none", "--out", str(tmp_path / "file")]) == 1
    assert "file" in capsys.readouterr().err


def test_bags_of_the_first_half():
    bag = TINY["weighted bags"].arrays()[0]
    half = worker._first_half(bag)
    assert isinstance(half, Bag)
    assert len(half.grad_output) == len(half.offsets) - 1 == len(bag.grad_output) // 2
    assert len(half.indices) == len(half.weights) == half.offsets[-1]
