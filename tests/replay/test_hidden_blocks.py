"""Other code around the same layers: what cannot be compared is not, and what is in it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from truestep.pairing.partners import partners_of
from truestep.replay.drill import Subject, drill
from truestep.replay.functions import record_function
from truestep.replay.isolation import matched_slots

X, TEXT = (torch.randn(1, n, 8, generator=torch.Generator().manual_seed(n)) for n in (5, 3))


class Block(torch.nn.Module):
    """Picture and text, each by itself."""

    def __init__(self, **names: str) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.cat([text, x], dim=1)
        both = both + self.last(torch.tanh(self.first(both)))
        return both[:, text.shape[1] :], both[:, : text.shape[1]]


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(3))
        self.out = torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x, text = block(x, text)
        made: torch.Tensor = self.out(x)
        return made


class Joined(torch.nn.Module):
    """The same block with picture and text in one tensor, and under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.factor = 1.0

    def forward(self, both: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = both + self.leave(torch.tanh(self.factor * self.enter(both)))
        return made


class Port(torch.nn.Module):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Joined() for _ in net.blocks)
        self.head = net.out
        for own, block in zip(self.layers, net.blocks, strict=True):
            own.enter.load_state_dict(block.first.state_dict())
            own.leave.load_state_dict(block.last.state_dict())

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        both = torch.cat([text, x], dim=1)
        for layer in self.layers:
            both = layer(both)
        made: torch.Tensor = self.head(both[:, text.shape[1] :])
        return made


def _bias(port: Port) -> None:
    with torch.no_grad():
        port.layers[1].leave.bias.zero_()


def _between(port: Port) -> None:
    port.layers[1].factor = 1.3


@pytest.mark.parametrize(
    ("change", "fqn", "kind"),
    [
        (lambda port: None, None, ""),
        (_bias, "blocks.1.last", "a bias"),
        (_between, "blocks.1", "before blocks.1.last"),
    ],
)
def test_a_block_that_cannot_be_compared_is_looked_into(
    change: Callable[[Port], Any], fqn: str | None, kind: str
) -> None:
    trusted = Net()
    port = Port(trusted)
    partners = partners_of(port, trusted)
    change(port)
    drilled = drill(
        Subject(port, lambda: port(X, TEXT)),
        Subject(trusted, lambda: trusted(X, TEXT)),
        place=(0, "main"),
        partners=partners,
    )
    place = drilled.divergence
    assert (place.fqn if place else None) == fqn, place
    assert ((place.kind if place else "") or "").startswith(kind), place


def test_results_are_paired_by_order_only_where_both_sides_have_as_many() -> None:
    six = [(f"out.0.{name}", torch.ones(1, 1, 8)) for name in "abcdef"]
    four = {"out.0": torch.ones(1, 5, 8), **{f"out.{i}": torch.ones(1, 8) for i in range(1, 5)}}
    assert matched_slots(six, four) == [None] * 6
    assert matched_slots(six[:4], four) == ["out.1", "out.2", "out.3", "out.4"]
    given = [(name.replace("out", "in"), tensor) for name, tensor in six]
    theirs = {slot.replace("out", "in"): tensor for slot, tensor in four.items()}
    assert matched_slots(given, theirs)[:4] == ["in.1", "in.2", "in.3", "in.4"]


def test_positions_of_all_samples_are_no_neighbours_of_their_own() -> None:
    class Shared(torch.nn.Linear):
        """Takes the positions of the first sample for all, as some models do."""

        def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x) + torch.sin(ids[0])

    ids = torch.arange(40, dtype=torch.float32).reshape(1, 5, 8)
    floor = record_function(Shared(8, 8), [{"x": X, "ids": ids}]).manifest.noise_floor
    assert floor is not None
    rows = [run for run in floor.runs if run.kind == "batch"]
    assert len(rows) == 2
    assert max(run.tensors[0].rel_l2 for run in rows) < 1e-5
