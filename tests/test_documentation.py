"""Every code block of the README and of the site runs as it stands, and so does every example in a docstring."""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

import eva_optax
from tests import hugging_face

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# layers.md imports other libraries, of which tests/flax/test_foreign_layers.py has stand-ins.
PAGES = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if path.name != "layers.md"]
RUN = [path for path in PAGES if "```python" in path.read_text()]
NUMBER = re.compile(r"\d+\.\d+")
pytestmark = pytest.mark.usefixtures("as_a_user")


def assert_printed(got: str, want: str) -> None:
    """The same text; numbers with a point may differ by what compilers do to training."""
    assert NUMBER.sub("#", got).split() == NUMBER.sub("#", want).split()
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (got, want)]
    np.testing.assert_allclose(*numbers, rtol=0.05)


def run(text: str) -> dict[str, Any]:
    """Runs the blocks of a page one after the other; a text block right behind one is what it prints."""
    names: dict[str, Any] = {"__name__": "page"}
    blocks = list(FENCE.finditer(text))
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if block[1] != "python":
            continue
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(block[2], "page", "exec"), names)
        if following and following[1] == "text" and not text[block.end() : following.start()].strip():
            assert_printed(printed.getvalue(), following[2])
    return names


@pytest.mark.parametrize("page", RUN, ids=[path.stem for path in RUN])
def test_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    registrations = []
    if page.stem == "hugging-face":
        for name, module in hugging_face.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
        register = eva_optax.register
        monkeypatch.setattr(eva_optax, "register", lambda *a, **k: registrations.append(register(*a, **k)))
    try:
        run(page.read_text())
    finally:
        for registration in registrations:
            registration.remove()


def side_of_diff(block: str, added: bool) -> str:
    sign = "+" if added else "-"
    return "\n".join(line[1:] for line in block.splitlines() if not line or line[0] in (" ", sign))


def test_the_first_diff_of_the_readme_prints_what_it_says_and_wins_for_each_of_eight_seeds() -> None:
    diff, printed = FENCE.findall(README)[:2]
    assert (diff[0], printed[0]) == ("diff", "text")
    losses = []
    for line, added in zip(printed[1].splitlines(), (False, True), strict=True):
        names: dict[str, Any] = {}
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(side_of_diff(diff[1], added), names)
        assert ("eva_optax" in names) == added
        assert_printed(output.getvalue(), line.partition(": ")[2])
        (of_seed_0,) = NUMBER.findall(output.getvalue())
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
        exec(code.replace(f"adamw({given}", f"adamw({rate}"), names)
        medians[rate] = np.median([float(names["train"](seed)[0]) for seed in range(8)])
    assert medians[given] < 1.05 * min(medians.values())


def test_every_public_name_has_a_runnable_example():
    for name in eva_optax.__all__:
        value = getattr(eva_optax, name)
        assert value.__doc__
        if not isinstance(value, type):
            assert ">>>" in value.__doc__, name
            assert "Source:" in value.__doc__, name


def test_docstring_examples():
    tried, failed = 0, []
    for module in pkgutil.walk_packages(eva_optax.__path__, "eva_optax."):
        with warnings.catch_warnings():
            result = doctest.testmod(importlib.import_module(module.name))
        tried += result.attempted
        failed += [module.name] * (result.failed > 0)
    assert not failed
    assert tried > 3 * len(eva_optax.__all__)
