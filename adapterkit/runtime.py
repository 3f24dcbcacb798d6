"""Which adapters act: a process-wide default and an override for one thread. Names only, no tensors."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from adapterkit.composition import Setup


class Lanes(NamedTuple):
    """Steps side by side: each lane acts on its own part of a batch or sequence, or all on the same.

    Kinds: `rows` (groups of examples), `route` and `tasks` (the batch says which lane an example takes, -1:
    none), `split` (segments of the sequence), `average` (the weighted mean of what the lanes give), `fuse`
    (what a fusion makes of the last unit of each lane).
    """

    kind: str
    lanes: tuple[tuple[Step, ...], ...]
    numbers: tuple[float, ...] = ()
    """Examples, positions or weight of each lane."""
    reads: tuple[str, ...] = ()
    """What the units read from the flow, so that it is cut as well."""
    leaves: tuple[str, ...] = ()
    """Branches of which the units may leave more than an output."""
    by: str = ""
    """Key of the fusion that puts together what the lanes give."""
    block: int = 0
    """Number of the block where its lanes run one at a time around some cores, else 0."""
    none: tuple[Step, ...] = ()
    """What an example has that takes no lane: a head."""


class Around(NamedTuple):
    """How a core is called for one lane at a time: lanes without units, see inject/apart.py."""

    step: Lanes
    whole: frozenset[str]
    """Arguments that have no row for each example."""


Step = str | Lanes
"""The key of a unit, or lanes of them."""


class Batch(NamedTuple):
    """What a setup asks of the batch; a part of the program of the model itself."""

    copies: int = 1
    """How often the batch is repeated."""
    examples: int | None = None
    """How many examples there must be."""
    routed: int = 0
    """Among how many lanes `rows` choose."""
    tasks: int = 0
    """Among how many lanes `task_ids` choose."""
    images: bool = True
    """Whether adapters act where images are read, say, so that each example has one."""


class Program(NamedTuple):
    """What a site does in a forward pass, in order."""

    inputs: tuple[Step, ...] = ()
    outputs: tuple[Step, ...] = ()
    entry: tuple[str, ...] = ()
    """Units that see all arguments before the host runs."""
    kernel: tuple[Step, ...] = ()
    """Units whose keys and values come first in the attention of the host."""
    held: tuple[Step, ...] = ()
    """Units that the site itself does not run: units elsewhere ask for them."""
    instead: Step | None = None
    """A module that is called in place of the host: a head of the adapter's own."""
    before: str | None = None
    """Key of a unit that sees the first argument before the host is called, outside what is checkpointed."""
    composed: bool = False
    """Whether there are lanes in it."""
    lone: bool = False
    """Whether all that is in it are lanes at the output, in which the batch is cut."""
    joined: bool = False
    """Whether its one unit computes the host as well."""
    batch: Batch | None = None
    around: Around | None = None
    """The blocks of which the host runs one lane at a time."""


Programs = Mapping[str, Program]
"""Site -> program. A site that is not in it does nothing."""


@dataclass
class Record:
    """What was asked to be kept of the forward passes of one thread, by address."""

    gates: dict[str, list[Any]] = field(default_factory=dict)
    """What each gate let through: (B,) for each pass."""
    fusion: dict[str, list[Any]] = field(default_factory=dict)
    """Weights of the adapters at each fusion: (B, T, N) for each pass."""


class _Override(threading.local):
    """Programs for this thread. `__init__` runs once in each thread, so that the attribute always is the
    instance's own:

    a class attribute as default would be guarded by torch.compile in place of the missing instance
    attribute, and a later override would be ignored without a word.
    """

    def __init__(self) -> None:
        self.programs: Programs | None = None
        self.active: Setup | None = None
        self.record: Record | None = None
        self.rows: Any = None
        """For each example the lane that it takes (B,), -1 for none."""
        self.tasks: Any = None
        self.flow: dict[str, Any] = {}
        """What passes between the points of a branch; see methods/flow.py."""
        self.blocks: list[Any] = []
        """Blocks that are open, the innermost last; see overriding.py."""


class Runtime:
    """Shared by all sites of a model. Copies and pickles start without an override."""

    def __init__(self) -> None:
        self.programs: Programs = {}
        """What acts where no thread overrides it."""
        self._alone()

    def _alone(self) -> None:
        self.override = _Override()
        self.uses: list[Any] = []
        """Blocks that are open in any thread; see overriding.py."""
        self.changing = threading.RLock()
        """Held where a block is opened, and where adapters are taken out that a block may name."""

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _OF_THREADS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._alone()


_OF_THREADS = ("override", "uses", "changing")
