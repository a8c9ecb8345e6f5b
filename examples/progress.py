"""How far a program is: bars in a terminal; elsewhere, as in a log file, a plain line now and then."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

SECONDS = 10  # between two lines

SMALL = "[bold]--small[/bold] shows that all of it runs. It compares nothing: no optimizer is tuned or near its end."


@contextmanager
def progress(console: Console, totals: Mapping[str, int]) -> Iterator[Callable[[str, int], None]]:
    """Gives a function to be told which of the parts went on, and by how many steps."""
    if console.is_terminal or console.is_jupyter:
        with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as bars:
            tasks = {name: bars.add_task(name, total=total) for name, total in totals.items()}
            yield lambda name, steps: bars.advance(tasks[name], steps)
        return
    done, start = dict.fromkeys(totals, 0), time.monotonic()
    last = start

    def advance(name: str, steps: int) -> None:
        nonlocal last
        done[name] += steps
        now = time.monotonic()
        if now - last >= SECONDS or done[name] == totals[name]:
            last = now
            console.print(f"{name}: {done[name]:,} of {totals[name]:,} steps after {now - start:.0f} s", soft_wrap=True)

    yield advance
