"""What a replay keeps of the stages that it runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from truestep.errors import FOREIGN, TruestepError, UsageError, one_line
from truestep.joint import Value, tensors_of
from truestep.measure.distance import same_bits
from truestep.measure.plain import plain
from truestep.runtime.pipeline import Observer, show


class WroteIntoInputError(Exception):
    """A stage wrote into what it was given."""

    def __init__(self, shape: list[int]) -> None:
        super().__init__(
            f"wrote into a tensor of shape {shape} that it was given; the next takes it as it is"
        )


@dataclass
class Replay:
    """What the stages of a pipeline gave on recorded inputs.

    Attributes:
        outputs: By the name of the recorded tensor that each answers to.
        failures: What a stage did instead: `raised ...`.
        again: What some steps of each expert gave when they were predicted once more, after others,
            and the texts when they were encoded once more.
        effects: Where the text's length differs from the recorded one: text name to (prediction
            name, prediction made with the pipeline's own text). Rows of padding cannot be compared
            element by element, but what the model makes of them can.
    """

    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    again: dict[str, torch.Tensor] = field(default_factory=dict)
    effects: dict[str, tuple[str, torch.Tensor]] = field(default_factory=dict)

    def attempt(self, name: str, run: Callable[[], object]) -> None:
        """Run a stage; what it raises becomes its failure."""
        try:
            run()
        except TruestepError:  # a setting that cannot be, not a stage that went wrong
            raise
        except WroteIntoInputError as error:
            self.failures[name] = str(error)
        except FOREIGN as error:  # whatever a candidate's stage raises is that stage's outcome
            self.failures[name] = f"raised {one_line(error)}"

    def keep(self, name: str, run: Callable[[], Value], *, kept: bool = True) -> None:
        """Run a stage and keep a host copy of its output, where it is asked for."""
        watch = Kept(self.outputs) if kept else Observer()
        self.attempt(name, lambda: show(watch, name, run()))


class Kept(Observer):
    """Keeps host copies of what is shown, or of some names only."""

    def __init__(
        self, outputs: dict[str, torch.Tensor], names: Collection[str] | None = None
    ) -> None:
        super().__init__()
        self._outputs, self._names = outputs, names

    def tensor(self, name: str, value: torch.Tensor) -> None:
        """Keep a copy, where the name is wanted.

        Raises:
            TypeError: What a stage gave is no tensor, or one that cannot be read.
        """
        if self._names is not None and name not in self._names:
            return
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"no tensor came but {type(value).__name__}")
        try:
            value = plain(value, name)
        except UsageError as error:
            raise TypeError(error.what) from None
        if value.layout is not torch.strided:
            raise TypeError(f"a tensor of layout {value.layout} came")
        self._outputs[name] = value.to("cpu", copy=True)


@contextmanager
def unchanged_by(*inputs: Value) -> Iterator[None]:
    """What a prediction is given is given to the next pass, too, and to the update.

    Raises:
        WroteIntoInputError: Something wrote into it.
    """
    held = [tensor for value in inputs for tensor in tensors_of(value)]
    before = [plain(tensor).clone() for tensor in held]
    yield
    for tensor, value in zip(held, before, strict=True):
        if not same_bits(plain(tensor), value):
            raise WroteIntoInputError(list(value.shape))
