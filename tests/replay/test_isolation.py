"""Modules on given inputs: other layouts, other arguments, fused outputs, lists written into."""

from __future__ import annotations

from typing import Any

import torch

from truestep.pairing.partners import Part
from truestep.replay.isolation import flow, laid_out, matched_slots

Tensor = torch.Tensor
X = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1))


class Apart(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * self.second(x)


class Fused(torch.nn.Module):
    def __init__(self, source: Apart) -> None:
        super().__init__()
        self.both = torch.nn.Linear(8, 8)
        for kind in ("weight", "bias"):
            parts = [getattr(layer, kind).data for layer in (source.first, source.second)]
            getattr(self.both, kind).data = torch.cat(parts)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.both(x * 2).chunk(2, dim=-1)  # wrong before the layer
        return first * second


def test_a_fused_module_is_recorded_as_its_parts() -> None:
    apart = Apart()
    fused = Fused(apart)
    reference = flow(apart, lambda: apart(X), place=(0, "main"))
    parts = {"both": (Part("first", (0, 1, 2, 3)), Part("second", (4, 5, 6, 7)))}
    seen = flow(
        fused,
        lambda: fused(X),
        place=(0, "main"),
        given=reference,
        parts=lambda fqn: parts.get(fqn, ()),
    )
    assert set(seen.tensors) == set(reference.tensors)
    for name in ("first", "second"):
        made = seen.tensors[f"module/{name}/0/main/out.0"]
        assert torch.allclose(made, reference.tensors[f"module/{name}/0/main/out.0"])
        assert torch.equal(seen.tensors[f"module/{name}/0/main/in.0"], X * 2)  # as received


def test_arguments_are_matched_by_place_then_by_size() -> None:
    text, time = torch.zeros(1, 3, 8), torch.zeros(1, 6, 8)
    theirs = {"in.0": X, "in.1": text, "in.2": time, "in.3.0": torch.zeros(5, 4)}
    ours = [("in.0", X), ("in.1", torch.zeros(5, 2)), ("in.time", time[:, None]), ("in.2", text)]
    assert matched_slots(ours, theirs) == ["in.0", None, "in.2", "in.1"]
    # Of two of the same sizes, each stays in its own place.
    pair = {"in.0": X, "in.1": X + 1}
    assert matched_slots([("in.0", X + 1), ("in.1", X)], pair) == ["in.0", "in.1"]
    # Angles are no cosines, though they have their sizes; a table that is only wrong is matched.
    angles = torch.linspace(0.1, 3.0, 20).reshape(5, 4)
    assert matched_slots([("in.1", angles.cos())], {"in.0": angles}) == [None]
    assert matched_slots([("in.1", angles + 1)], {"in.0": angles}) == ["in.0"]


def test_layouts_that_hold_the_same() -> None:
    video = torch.randn(1, 6, 2, 3, 4)
    tokens = video.flatten(2).transpose(1, 2)
    last = video.permute(0, 2, 3, 4, 1)  # `b f h w c`
    pairs = [(tokens, video), (video, tokens), (X[:, None], X), (last, tokens), (tokens, last)]
    for tensor, reference in pairs:
        seen = laid_out(tensor, reference)
        assert seen is not None
        assert torch.equal(seen, reference)
    assert laid_out(video, X) is None
    assert laid_out(tokens.transpose(1, 2), tokens) is None


class Wrapped(torch.nn.Module):
    """Another class with other arguments around the same layer."""

    def __init__(self, source: torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = source.weight, source.bias

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


def test_what_has_no_counterpart_is_left_out_of_other_classes_only() -> None:
    reference_net, net = Apart(), Apart()
    reference = flow(reference_net, lambda: reference_net(X), place=(0, "main"))
    inner = Wrapped(net.first)
    net.first = inner  # type: ignore[assignment]
    net.forward = lambda x: inner(x, torch.ones(5, 2)) * net.second(x)  # type: ignore[assignment]
    seen = flow(net, lambda: net(X), place=(0, "main"), given=reference)
    assert [(apart.label, apart.slot) for apart in seen.apart] == [("first", "in.1")]
    assert not seen.left_out
    assert set(seen.tensors) == set(reference.tensors)
    reference.classes["first"] = "Wrapped"  # the same class: an argument more is a difference
    seen = flow(net, lambda: net(X), place=(0, "main"), given=reference)
    assert set(seen.tensors) - set(reference.tensors) == {"module/first/0/main/in.1"}


def test_a_list_that_a_module_writes_into_stays_the_callers() -> None:
    class Caching(torch.nn.Module):
        def forward(self, x: Tensor, kept: list[Any]) -> Tensor:
            before = kept[0] if kept[0] is not None else torch.zeros_like(x)
            kept[0] = x
            return before + x

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = Caching()

        def forward(self, x: Tensor) -> Tensor:
            kept: list[Any] = [None]
            return self.cell(x, kept) + self.cell(2 * x, kept)

    net = Net()
    reference = flow(net, lambda: net(X), place=(0, "main"))
    seen = flow(net, lambda: net(X), place=(0, "main"), given=reference)
    assert set(seen.tensors) == set(reference.tensors)
    for name, tensor in reference.tensors.items():
        assert torch.equal(seen.tensors[name], tensor), name
