"""Every code block of the README and of the page on reliability, and every example in a docstring, runs."""

import doctest
import importlib
import pkgutil
import re
import warnings
from pathlib import Path

import pytest

import eva_optax

ROOT = Path(__file__).parent.parent
PAGES = "".join((ROOT / name).read_text() for name in ("README.md", "docs/reliability.md"))
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGES, re.DOTALL)
pytestmark = pytest.mark.usefixtures("as_a_user")


def side_of_diff(block: str, added: bool) -> str:
    sign = "+" if added else "-"
    return "\n".join(line[1:] for line in block.splitlines() if not line or line[0] in (" ", sign))


@pytest.mark.parametrize(("language", "block"), BLOCKS, ids=[f"{i}-{block[0]}" for i, block in enumerate(BLOCKS)])
def test_code_blocks_run(language: str, block: str):
    if language == "diff":
        values = []
        for added in (False, True):
            names: dict = {}
            exec(side_of_diff(block, added), names)
            values.append(float(names["value"]))
            assert ("eva_optax" in names) == added
        assert all(value < 2.0 for value in values)  # ten classes: 2.3 untrained
    else:
        assert language == "python"
        exec(block, {})


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
