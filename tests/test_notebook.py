"""The NNX quickstart runs, and what the notebook installs upgrades nothing."""

import json
import runpy
import sys
from pathlib import Path

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


@pytest.mark.slow
def test_the_nnx_quickstart_runs(as_a_user, capsys, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", ["quickstart_nnx.py", "--steps", "3"])
    runpy.run_path(str(EXAMPLES / "quickstart_nnx.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "38,282 of 38,282 parameters tapped" in printed
    assert "Eva-AdamW" in printed
