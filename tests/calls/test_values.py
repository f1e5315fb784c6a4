"""What calls take and give, as trees, and back."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from truestep.calls.rebuilding import (
    CannotBuildError,
    Swaps,
    build,
    known_class,
    laid_over,
    written_back,
)
from truestep.calls.recording import host_copy
from truestep.calls.trees import check_tree
from truestep.calls.values import encode, holds_state, leaves, opaque, tensors

HERE = {__name__.partition(".")[0]}

Point = namedtuple("Point", "x y")


@dataclasses.dataclass
class Pair:
    first: Any
    second: Any = None


@dataclasses.dataclass
class Output(OrderedDict):  # type: ignore[type-arg]
    sample: Any = None

    def __post_init__(self) -> None:
        self["sample"] = self.sample


class Named(dict[str, Any]):
    """A dict of a class of its own, as guiders return it."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Distribution:
    """An object that is no more than its attributes, as a VAE returns it."""

    def __init__(self, mean: torch.Tensor) -> None:
        self.mean, self.deterministic = mean, False


class Cruel:
    def __init__(self) -> None:
        self.tensor = torch.ones(1)

    def __del__(self) -> None: ...


def stored(value: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    kept: dict[str, torch.Tensor] = {}

    def keep(path: tuple[str, ...], tensor: torch.Tensor) -> str:
        kept[".".join(path)] = host_copy(tensor)
        return ".".join(path)

    tree = encode(value, keep)
    again = json.loads(json.dumps(tree, allow_nan=False))
    check_tree(again, {name: tensor.ndim for name, tensor in kept.items()})
    return again, kept


def there_and_back(value: Any) -> Any:
    tree, kept = stored(value)
    return build(tree, kept.__getitem__, HERE)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda part: (
        st.lists(part, max_size=3)
        | st.lists(part, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 3), part, max_size=3)
    ),
    max_leaves=8,
)


@given(PLAIN)
def test_plain_values_come_back_as_they_were(value: Any) -> None:
    again = there_and_back(value)
    assert again == value
    assert repr(again) == repr(value)  # types too: a tuple is no list, True is not 1


@pytest.mark.parametrize(
    "value",
    [
        torch.bfloat16,
        torch.device("cpu"),
        torch.Size([2, 3]),
        slice(1, None, 2),
        complex(1, -2),
        math.inf,
    ],
)
def test_scalars_of_torch_and_python_come_back(value: Any) -> None:
    assert there_and_back(value) == value
    assert math.isnan(there_and_back(math.nan))


def test_objects_come_back_by_their_fields() -> None:
    tensor = torch.randn(2, 3)
    named = there_and_back(Point(tensor, 1))
    assert isinstance(named, Point)
    assert named.x.equal(tensor)
    pair = there_and_back(Pair({"a": [tensor]}, (1, 2.5)))
    assert isinstance(pair, Pair)
    assert pair.first["a"][0].equal(tensor)
    output = there_and_back(Output(sample=tensor))
    assert isinstance(output, Output)
    assert output["sample"].equal(output.sample)
    mapping = there_and_back(Named(pred=tensor, scale=2.0))
    assert isinstance(mapping, Named)
    assert mapping.pred.equal(tensor)
    other = torch.ones(1)
    assert laid_over(mapping, Swaps({id(mapping.pred): other})).pred is other
    gaussian = there_and_back(Distribution(tensor))
    assert isinstance(gaussian, Distribution)
    assert gaussian.mean.equal(tensor)


def test_arrays_pictures_and_generators_come_back() -> None:
    array = np.arange(6, dtype=np.float64).reshape(2, 3)
    assert np.array_equal(there_and_back(array), array)
    assert there_and_back(np.float32(2.5)) == np.float32(2.5)
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    again = there_and_back(picture)
    assert again.mode == "RGB"
    assert again.tobytes() == picture.tobytes()
    generator = there_and_back(torch.Generator().manual_seed(7))
    assert torch.rand(3, generator=generator).equal(
        torch.rand(3, generator=torch.Generator().manual_seed(7))
    )


def test_memory_order_is_kept() -> None:
    tensor = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    again = there_and_back(tensor)
    assert again.equal(tensor)
    assert again.stride() == tensor.stride()


def test_complex_tensors_are_kept_in_real_numbers() -> None:
    tensor = torch.randn(3, 4, dtype=torch.complex64).conj()
    tree, kept = stored(tensor)
    assert kept[""].dtype is torch.float32
    again = build(tree, kept.__getitem__, HERE)
    assert again.equal(tensor.resolve_conj())


@pytest.mark.parametrize("value", [len, Cruel(), object(), torch.nn.Linear(1, 1), 2**80])
def test_what_cannot_be_kept_is_opaque_and_says_so(value: Any) -> None:
    tree, _ = stored({"a": value})
    assert [path for path, _ in opaque(tree)] == [("a",)]
    with pytest.raises(CannotBuildError, match="was not kept"):
        build(tree, {}.__getitem__, HERE)


def test_a_structure_that_holds_itself_has_an_end() -> None:
    loop: list[Any] = []
    loop.append(loop)
    tree, _ = stored(loop)
    assert any(opaque(tree))


def test_only_what_may_change_counts_as_state() -> None:
    assert holds_state(stored([object()])[0])
    assert not holds_state(stored([len, torch.nn.Linear(1, 1), int])[0])


def test_classes_are_built_from_given_packages_only(tmp_path: Path) -> None:
    name = f"{__name__}.Pair"
    assert known_class(name, "dataclass", HERE) is Pair
    for wrong in (("os.path", "plain"), (name, "plain"), ("no.such.Class", "plain")):
        with pytest.raises(CannotBuildError):
            known_class(*wrong, HERE)
    with pytest.raises(CannotBuildError):
        known_class(name, "dataclass", {"diffusers"})
    with pytest.raises(CannotBuildError):
        known_class(f"{__name__}.Cruel", "plain", HERE)


@pytest.mark.parametrize(
    "tree",
    [
        [1],
        {},
        {"tensor": "gone"},
        {"tensor": "t", "order": [0, 0]},
        {"tensor": "t", "order": [0]},
        {"tensor": "t", "more": 1},
        {"tensor": "t", "complex": 1.5},
        {"tensor": "t", "complex": True, "order": [1, 0]},
        {"image": "t", "mode": "P"},
        {"list": {"a": 1}},
        {"list": [1], "tuple": [1]},
        {"dict": [[1]]},
        {"dict": [[{"list": []}, 1]]},
        {"dtype": "nn"},
        {"device": "nowhere"},
        {"size": [-1]},
        {"slice": ["a", 1, 2]},
        {"float": "1"},
        {"complex": [1]},
        {"generator": {"device": "cpu", "seed": "x"}},
        {"object": "os.system", "kind": "call", "fields": []},
        {"object": 1, "kind": "plain", "fields": []},
        {"opaque": "x"},
        {"dropped": [2**40], "dtype": "float32"},
        {"dropped": [2], "dtype": "nn"},
        {"dropped": ["a"], "dtype": "float32"},
        {"dropped": [1]},
        {"pickle": "gASV"},
    ],
)
def test_hostile_trees_are_refused(tree: Any) -> None:
    with pytest.raises(ValueError, match="value"):
        check_tree(tree, {"t": 2})


def test_deep_trees_are_refused() -> None:
    tree: Any = 1
    for _ in range(100):
        tree = {"list": [tree]}
    with pytest.raises(ValueError, match="nested"):
        check_tree(tree, {})


def test_leaves_have_the_paths_of_their_tensors() -> None:
    tree, _ = stored({"a": [torch.ones(1), 2.0], "b": Pair("x")})
    assert [path for path, _ in tensors(tree)] == [("a", "0")]
    assert {path: leaf.value for path, leaf in leaves(tree)} == {
        ("a", "0"): "a.0",
        ("a", "1"): 2.0,
        ("b", "first"): "x",
        ("b", "second"): None,
    }


def test_what_is_laid_over_a_value_keeps_the_objects_that_callers_hold() -> None:
    old, new, other = torch.zeros(2), torch.ones(2), torch.zeros(1)
    cache = [old, {"deep": old}]
    swaps = Swaps({id(old): new}, {("1",): 3.0})
    assert laid_over(cache, swaps) is cache
    assert cache[0] is new
    assert cache[1] == {"deep": new}
    untouched = (other, "a")
    assert laid_over(untouched, swaps) is untouched
    assert laid_over((old, 2.0), swaps) == (new, 3.0)
    output = laid_over(Output(sample=old), swaps)
    assert output.sample is output["sample"] is new


def test_what_a_call_wrote_is_written_into_the_callers_own_objects() -> None:
    tensor, items, table = torch.zeros(2), [None], {"a": 1}
    written_back((tensor, items, table), (torch.ones(2), [5], {"b": 2}))
    assert tensor.tolist() == [1.0, 1.0]
    assert (items, table) == ([5], {"b": 2})
