"""The place of a data iterator in a checkpoint, the same for any number of hosts.

Global batches do not depend on how many hosts share them (see `loader.batches`), so "so many batches were taken" is all there is
to know, and it is the same on every host. Grain's own handler writes a file for each process, which another number of
processes cannot read.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath

__all__ = ["PositionHandler", "PositionRestore", "PositionSave"]

FILE = "position.json"


class PositionHandler(ocp.CheckpointHandler):
    """Saves `iterator.get_state()` once, from process 0, and restores it in every process."""

    def save(self, directory: epath.Path, args: PositionSave) -> None:
        """Writes the state."""
        if jax.process_index() == 0:
            (epath.Path(directory) / FILE).write_text(json.dumps(args.item.get_state()))

    def restore(self, directory: epath.Path, args: PositionRestore) -> grain.DatasetIterator:
        """Moves the iterator to the saved place; checkpoints with a file for each process are read, too.

        Raises:
          ValueError: there is no state, it is damaged, or processes were at different places.
        """
        directory = epath.Path(directory)
        paths = [directory / FILE] if (directory / FILE).exists() else sorted(directory.glob("process_*-of-*.json"))
        if not paths:
            raise ValueError(f"{directory}: no place of the data")
        texts = [path.read_text() for path in paths]
        try:
            states = [json.loads(text) for text in texts]
        except ValueError as error:
            raise ValueError(f"{directory}: damaged place of the data ({error})") from error
        if any(state != states[0] for state in states):
            raise ValueError(f"{directory}: {len(states)} processes were at different places in the data")
        args.item.set_state(states[0])
        return args.item


@ocp.args.register_with_handler(PositionHandler, for_save=True)
@dataclasses.dataclass
class PositionSave(ocp.args.CheckpointArgs):
    """For `args.Composite(data=PositionSave(iterator))`."""

    item: Any


@ocp.args.register_with_handler(PositionHandler, for_restore=True)
@dataclasses.dataclass
class PositionRestore(ocp.args.CheckpointArgs):
    """For `args.Composite(data=PositionRestore(iterator))`; the iterator itself is moved."""

    item: Any
