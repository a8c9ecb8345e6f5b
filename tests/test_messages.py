"""docs/faq.md has every error message of the library."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "eva_optax"
PAGE = " ".join((ROOT / "docs" / "faq.md").read_text().split())
ERRORS = {"AttributeError", "ImportError", "TypeError", "ValueError"}
WORDS = 6  # of a message that must be on the page, from where its first sentence says most at a stretch


def constants(trees: list[ast.Module]) -> dict[str, str]:
    """The texts that have names."""
    return {
        node.targets[0].id: node.value.value
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        if isinstance(node.value.value, str)
    }


def text_of(node: ast.expr, named: dict[str, str]) -> str:
    """A message, with … for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(value, named) for value in node.values)
    if isinstance(node, ast.FormattedValue):
        return text_of(node.value, named)
    if isinstance(node, ast.BinOp):
        return text_of(node.left, named) + text_of(node.right, named)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return re.sub(r"\{\d*\}", "…", text_of(node.func.value, named))
    return named.get(node.id, "…") if isinstance(node, ast.Name) else "…"


def calls(node: ast.AST) -> Iterator[str]:
    """The names of the functions that make a part of a message."""
    for part in ast.walk(node):
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Name):
            yield part.func.id


def messages() -> Iterator[str]:
    """Every message of the library, and of a message that functions make, every part."""
    trees = [ast.parse(file.read_text()) for file in sorted(LIBRARY.rglob("*.py"))]
    named = constants(trees)
    functions = {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    raised = [
        node.args[0]
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS and node.args
    ]
    for message in raised:
        yield text_of(message, named)
        for made in {name for name in calls(message) if name in functions}:
            returned = (node.value for node in ast.walk(functions[made]) if isinstance(node, ast.Return))
            yield from (text_of(value, named) for value in returned if value is not None)


def distinctive(message: str) -> str:
    """The first words of the longest stretch that the first sentence of a message has between what is filled in."""
    said = re.sub(r"^(eva_optax(\.\w+|\.…)?|…): ", "", message).split(". ")[0]
    stretches = [[word for word in part.split() if re.search(r"\w", word)] for part in said.split("…")]
    return " ".join(max(stretches, key=len)[:WORDS])


TEXTS = sorted({distinctive(message) for message in messages()} - {""})


def test_messages_are_found() -> None:
    assert len(TEXTS) > 50
    assert "must be greater than 0, got" in TEXTS
    assert any(text.startswith("tapped layers had gradients") for text in TEXTS)


@pytest.mark.parametrize("text", TEXTS)
def test_the_page_has_every_message(text: str) -> None:
    assert text in PAGE, f"docs/faq.md has no entry for the message: … {text} … Add one, in the message's words."
