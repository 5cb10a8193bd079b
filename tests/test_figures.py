# SPDX-License-Identifier: Apache-2.0
"""The figures of docs/ show what the library computes."""

import importlib.util
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

TEXT = "{http://www.w3.org/2000/svg}text"
FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"


@pytest.fixture(scope="module")
def step_counts():
    spec = importlib.util.spec_from_file_location("step_counts", FIGURES / "step_counts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drawn():
    """The numbers that the committed figure was drawn from."""
    description = "{http://purl.org/dc/elements/1.1/}description"
    return json.loads(next(ElementTree.parse(FIGURES / "step-counts.svg").iter(description)).text)


def numbers(curves):
    for name, curve in curves.items():
        for what, values in {"met_at": curve}.items() if name == "met_at" else curve.items():
            yield (name, what), np.array(values)


@pytest.mark.jit
def test_the_figure_of_step_counts_is_of_what_the_library_computes(step_counts, drawn):
    computed = dict(numbers(step_counts.curves()))
    assert computed.keys() == dict(numbers(drawn)).keys()
    for what, values in numbers(drawn):
        np.testing.assert_allclose(values, computed[what], rtol=1e-9, err_msg=str(what))


def test_the_figure_of_step_counts_is_of_the_formula(drawn):
    """In closed form: a moment of a constant gradient is 1 − βᵏ after k meetings, and corrected by 1 − βᵗ."""
    beta1, beta2 = 0.9, 0.999
    meetings, steps = np.arange(1, len(drawn["met_at"]) + 1), np.array(drawn["met_at"])
    for rule, t in (("element", meetings), ("row", meetings), ("global", steps)):
        first = (1 - beta1**meetings) / (1 - beta1**t)
        second = (1 - beta2**meetings) / (1 - beta2**t)
        np.testing.assert_allclose(drawn[rule]["lengths"], first / np.sqrt(second), rtol=1e-6)
    assert max(drawn["global"]["lengths"]) == pytest.approx(6.5, abs=0.05)  # as the page says
    np.testing.assert_allclose(drawn["element"]["values"], (meetings + 1) // 2, rtol=1e-6)


def test_the_figure_is_drawn_by_its_script(step_counts, drawn, tmp_path):
    """Its words are compared: where lines and ticks lie is matplotlib's to say, whose versions differ."""
    step_counts.draw(drawn, tmp_path / "again.svg")
    again, committed = (
        (path / name).read_text(encoding="utf-8")
        for path, name in ((tmp_path, "again.svg"), (FIGURES, "step-counts.svg"))
    )
    words = [
        [
            text
            for each in ElementTree.fromstring(svg).iter(TEXT)
            if re.search("[a-z]", text := each.text or "")
        ]
        for svg in (again, committed)
    ]
    assert words[0] == words[1]
    assert '"global" goes on to 62' in words[0]
