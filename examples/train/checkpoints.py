"""Orbax checkpoints: the state of training and the position in the input, together, written while training goes on."""

from pathlib import Path
from typing import Any, Self

import orbax.checkpoint as ocp


class Checkpoints:
    """The last checkpoints of a run."""

    def __init__(self, folder: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.manager.close()  # waits for what is being written

    def restore(self, wanted: Any) -> tuple[Any, dict[str, Any]] | None:
        """State and notes of the last checkpoint; `wanted` has the shapes of the state, and where each array lies."""
        step = self.manager.latest_step()
        if step is None:
            return None
        items = ocp.args.Composite(state=ocp.args.StandardRestore(wanted), notes=ocp.args.JsonRestore())
        found: Any = self.manager.restore(step, args=items)
        return found.state, found.notes

    def save(self, step: int, state: Any, notes: dict[str, Any]) -> None:
        if step != self.manager.latest_step():
            items = ocp.args.Composite(state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(notes))
            self.manager.save(step, args=items, force=True)
