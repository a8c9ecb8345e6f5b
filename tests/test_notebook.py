"""The NNX quickstart and the notebook run on the CPU, with few steps; what the notebook installs upgrades nothing."""

import json
import runpy
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOK = json.loads((EXAMPLES / "colab.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def tags(cell):
    return cell["metadata"].get("tags", [])


def test_only_the_first_code_cell_installs_and_it_upgrades_nothing():
    assert [tags(cell) == ["install"] for cell in CODE] == [True] + [False] * (len(CODE) - 1)
    (line,) = [line for line in CODE[0]["source"] if line.startswith("%")]
    assert "--no-deps" in line
    assert "upgrade" not in line
    assert not any(line.lstrip().startswith(("%", "!")) for cell in CODE[1:] for line in cell["source"])


def test_no_output_is_stored():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)


def test_every_cell_runs(as_a_user, capsys):
    matplotlib.use("Agg")
    names = {"__name__": "notebook"}
    for cell in CODE[1:]:
        source = "".join(cell["source"])
        if tags(cell) == ["parameters"]:
            assert "STEPS = 1000\n" in source
            source = source.replace("STEPS = 1000\n", "STEPS = 40\n")
        exec(compile(source, "notebook", "exec"), names)
    assert "layers/0/kernel" in capsys.readouterr().out
    for losses in names["curves"].values():
        assert losses.shape == (40,)
        assert np.isfinite(losses).all()
        assert losses[-1] < losses[0]
    (axes,) = names["figure"].axes
    assert len(axes.lines) == 2
    names["plt"].close("all")


@pytest.mark.slow
def test_the_nnx_quickstart_runs(as_a_user, capsys, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", ["quickstart_nnx.py", "--steps", "3"])
    runpy.run_path(str(EXAMPLES / "quickstart_nnx.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "38,282 of 38,282 parameters tapped" in printed
    assert "Eva-AdamW" in printed
