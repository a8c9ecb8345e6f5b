"""The README keeps its word: its first diff wins as it says, its figures were measured, its links lead somewhere."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.pages import (
    DOCS,
    FENCE,
    FILES,
    NUMBER,
    README,
    ROOT,
    SITE,
    assert_printed,
    execute,
    side_of_diff,
    targets,
)

pytestmark = pytest.mark.usefixtures("as_a_user")


@pytest.mark.docs
def test_the_first_diff_of_the_readme_prints_what_it_says_and_wins_for_each_of_eight_seeds() -> None:
    diff, printed = FENCE.findall(README)[:2]
    assert (diff[0], printed[0]) == ("diff", "text")
    losses = []
    for line, added in zip(printed[1].splitlines(), (False, True), strict=True):
        names: dict[str, Any] = {}
        output = execute(side_of_diff(diff[1], added), names)
        assert ("eva_optax" in names) == added
        assert_printed(output, line.partition(": ")[2])
        (of_seed_0,) = NUMBER.findall(output)
        losses.append([float(of_seed_0), *(float(names["train"](seed)[0]) for seed in range(1, 8))])
    assert all(with_eva < without for without, with_eva in zip(*losses, strict=True)), losses


@pytest.mark.slow
@pytest.mark.parametrize("added", [False, True], ids=["adamw", "eva_adamw"])
def test_rates_of_the_first_diff_are_the_best_of_one_grid_or_as_good(added: bool) -> None:
    code = side_of_diff(FENCE.findall(README)[0][1], added)
    code = code[: code.rindex("print(")]
    (given,) = re.findall(r"adamw\(([\d.]+)", code)
    medians = {}
    for rate in ("0.0005", "0.001", "0.002", "0.005", "0.01", "0.02"):
        names: dict[str, Any] = {}
        execute(code.replace(f"adamw({given}", f"adamw({rate}"), names)
        medians[rate] = np.median([float(names["train"](seed)[0]) for seed in range(8)])
    assert medians[given] < 1.05 * min(medians.values())


def page_of(url: str) -> Path:
    """The source of a page of the site."""
    path = url.removeprefix(SITE).strip("/")
    return DOCS / f"{path or 'index'}.md"


def test_links_of_the_readme_are_absolute_and_lead_somewhere() -> None:
    """Absolute, because a package index shows the README without what is beside it."""
    links = targets(README)
    assert any(link.startswith(FILES[1]) for link in links)
    for link in links:
        assert link.startswith("https://"), link
        for prefix in FILES:
            assert not link.startswith(prefix) or (ROOT / link.removeprefix(prefix)).is_file(), link
        assert not link.startswith(SITE) or page_of(link).is_file(), link


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_figures_of_the_readme_are_those_of_the_benchmark() -> None:
    measured = (DOCS / "convergence.md").read_text()
    tasks = ("autoencoder_relu", "autoencoder", "autoencoder_sum", "cnn", "cnn_batchnorm", "lm_200", "diabetes")
    table = README[README.index("## What it costs") :]
    for label, name in (("`eva_adamw`, rank 16", "eva_adamw@16"), ("`eva_adamw`, one direction", "eva_adamw")):
        row, seconds = table[table.index(f"| {label} |") :].splitlines()[:2]
        for place, task in enumerate(tasks, 2):
            section = measured[measured.index(f"### {task}:") :]
            lines = [line.split("|") for line in section.splitlines() if line.startswith("|")]
            columns = [cell.strip() for cell in lines[0]]
            cells = next(cells for cells in lines if cells[1].strip() == name)
            for given, column in ((row, "steps to loss"), (seconds, "seconds to loss")):
                (factor,) = re.findall(r"([\d.]+)×", cells[columns.index(column)])
                assert given.split("|")[place].strip() == factor, (label, task, column)
