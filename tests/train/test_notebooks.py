"""Every notebook runs from its first cell to its last, with few steps, once its installation is taken out of it."""

import json
import tomllib
from importlib import metadata
from pathlib import Path

import matplotlib
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
SHORT = {"STEPS = 1000": "STEPS = 30", "STEPS = 1500": "STEPS = 60", "STEPS = 300": "STEPS = 40"}
pytestmark = [pytest.mark.train, pytest.mark.usefixtures("as_a_user")]


def code(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def install(path: Path) -> str:
    """The first cell without the line that installs."""
    lines = code(path)[0]["source"]
    assert sum(line.startswith("%pip install") for line in lines) == 1
    return "".join(line for line in lines if not line.startswith("%"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, capsys):
    matplotlib.use("Agg")
    names: dict = {"__name__": "notebook"}
    exec(compile(install(path), path.name, "exec"), names)
    for cell in code(path)[1:]:
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        source = "".join(cell["source"])
        assert not source.lstrip().startswith(("%", "!"))
        if cell["metadata"].get("tags") == ["parameters"]:
            steps = source.split("\n")[0]
            source = source.replace(steps, SHORT[steps])
        exec(compile(source, path.name, "exec"), names)
    assert len(names["curves"]) == 2
    for losses in names["curves"].values():
        assert np.isfinite(losses).all()
        assert losses[-1] < losses[0]
    assert names["figure"].axes[0].lines
    names["plt"].close("all")


def test_the_first_cell_wants_the_oldest_versions_that_the_package_allows(monkeypatch):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = dict(requirement.split(">=") for requirement in project["dependencies"])
    (first,) = {install(path) for path in NOTEBOOKS}
    for package, floor in floors.items():
        assert f'"{package}": "{floor}"' in first
        major, minor, patch = map(int, floor.split("."))
        older = {**floors, package: f"{major}.{minor}.{patch - 1}" if patch else f"{major}.{minor - 1}.9"}
        monkeypatch.setattr(metadata, "version", older.__getitem__)
        with pytest.raises(RuntimeError, match=f"{package} .* is older than {floor}"):
            exec(first, {})
    monkeypatch.setattr(metadata, "version", floors.__getitem__)
    exec(first, {})
    monkeypatch.setattr(metadata, "version", lambda package: "10.0.0.dev1+g12")
    exec(first, {})
