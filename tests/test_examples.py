"""What the examples share: progress without a terminal, and plots of several seeds."""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")


def test_progress_in_a_file_is_a_line_now_and_then_and_one_at_the_end(monkeypatch):
    import progress

    console = Console(file=io.StringIO(), width=40)
    with progress.progress(console, {"first": 3000, "second": 1}) as advance:
        advance("first", 1000)  # too early for a line
        monkeypatch.setattr(progress, "SECONDS", 0)
        advance("first", 1000)
        monkeypatch.setattr(progress, "SECONDS", 10)
        advance("first", 1000)
        advance("second", 1)
    lines = console.file.getvalue().splitlines()
    assert [line.partition(" after ")[0] for line in lines] == [
        "first: 2,000 of 3,000 steps",
        "first: 3,000 of 3,000 steps",
        "second: 1 of 1 steps",
    ]


def test_a_band_holds_the_curves_of_all_seeds_around_their_median(tmp_path):
    import plots

    figure, (left, right) = plots.panels(2)
    curves = np.array([[3.0, 1.0], [5.0, 2.0], [4.0, 9.0]])
    plots.draw(left, np.array([0, 10]), curves, "SGD", "-", "three seeds")
    plots.draw(right, np.array([0, 10]), curves[:1], "AdamW", "--", "one seed")
    np.testing.assert_array_equal(left.lines[0].get_ydata(), [4, 2])
    (band,) = left.collections
    assert {tuple(corner) for corner in band.get_paths()[0].vertices} == {(0, 3), (0, 5), (10, 1), (10, 9)}
    assert not right.collections
    plots.save(figure, tmp_path / "made" / "plot.png")
    assert (tmp_path / "made" / "plot.png").stat().st_size
