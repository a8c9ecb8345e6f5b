"""The folders of the library keep to themselves: who may import whom, and who may import Flax."""

import ast
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parent.parent / "eva_optax"
REACHED = {
    "_probes": [],
    "_statistics": ["_probes"],
    "_flax": ["_statistics", "_probes"],
    "_curvature": ["_probes"],
    "_transforms": ["_curvature", "_probes"],
}


@pytest.mark.parametrize("folder", REACHED)
def test_imports_follow_the_arrows(folder: str) -> None:
    files = sorted((LIBRARY / folder).rglob("*.py"))
    assert len(files) > 1
    allowed = [folder, *REACHED[folder]]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):  # also what is imported inside of functions
            if isinstance(node, ast.Import | ast.ImportFrom):
                prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                for name in (prefix + alias.name for alias in node.names):
                    top, *rest = name.split(".")
                    assert "_src" not in rest, f"{file} imports {name}, which is private"
                    assert top != "flax" or folder == "_flax", f"{file} imports {name}"
                    assert top != "eva_optax" or rest[0] in allowed, f"{file} imports {name}"


def test_no_module_lies_outside_of_the_folders() -> None:
    assert [file.name for file in LIBRARY.glob("*.py")] == ["__init__.py"]
    assert {path.parent.name for path in LIBRARY.glob("*/*.py")} == REACHED.keys()
