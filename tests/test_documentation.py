"""Every code block of the README and of the site runs as it stands, and so does every example in a docstring."""

import doctest
import importlib
import pkgutil
import sys
import warnings
from pathlib import Path

import matplotlib
import pytest

import eva_optax
from tests import hugging_face
from tests.pages import DOCS, ROOT, run

# layers.md imports other libraries, of which tests/flax/test_foreign_layers.py has stand-ins.
PAGES = [path for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))] if path.name != "layers.md"]
RUN = [path for path in PAGES if "```python" in path.read_text()]
pytestmark = pytest.mark.usefixtures("as_a_user")


@pytest.mark.docs
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
