"""Results on disk: CSV files whose rows have keys, and pages of the documentation that show tables of them."""

import argparse
import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

ROOT = Path(__file__).resolve().parents[2]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"

Key = tuple[str, ...]  # the values of a row in the columns that tell rows apart
Row = dict[str, Any]


def command_line(benchmark: str, description: str) -> argparse.ArgumentParser:
    """The options that both programs have; the first paragraph of the description stands before them."""
    summary, _, usage = description.partition("\n\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"benchmarks.{benchmark}", None, summary, usage, formatter_class=form)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--report", action="store_true", help="measure nothing: the page again from the CSV files")
    return parser


def read_rows(path: Path, keys: Sequence[str]) -> dict[Key, Row]:
    """The rows of a file by key; none if there is no file."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {tuple(row[key] for key in keys): row for row in csv.DictReader(file)}


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Writes a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    with new.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    new.replace(path)


def append_row(path: Path, columns: Sequence[str], row: Sequence[object]) -> None:
    """Adds a row at the end. Several processes may share the file: a row is written at once, when the file closes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, row] if new else [row])


def table(header: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table, whose columns hold numbers from column `texts` on."""
    rule = ["---"] * texts + ["---:"] * (len(header) - texts)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def publish(text: str, page: Path, benchmark: str) -> None:
    """Prints tables, and puts them in place of the old ones into a page, which is made if there is none."""
    begin, end = f"<!-- tables: written by python -m benchmarks.{benchmark} -->", "<!-- end of the tables -->"
    page.parent.mkdir(parents=True, exist_ok=True)
    before, _, rest = (page.read_text() if page.exists() else f"{begin}\n{end}\n").partition(begin)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}")
    console = Console()
    console.width = max(console.width, 130)  # of the widest tables
    console.print(Markdown(text))
    console.print(f"Tables: {page}", soft_wrap=True)
