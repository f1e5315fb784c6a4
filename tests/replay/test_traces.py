"""Two traces: the module that introduced an error, and all that keeps traces from matching."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from bench.bench_memory import stats_trace
from tests.counting import peak_bytes
from truestep import capture
from truestep.cli.app import app
from truestep.errors import UsageError
from truestep.recording.format import Recording
from truestep.recording.manifest import Level, Manifest
from truestep.recording.table import tensor_table
from truestep.replay.traces import compare_traces
from truestep.report.terminal import lines
from truestep.verdict import Verdict


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(16), nn.Linear(16, 32)
        self.act, self.down = nn.GELU(), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.down(self.act(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Renamed(nn.Module):
    """The same sums under other names."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.layers = net.blocks
        self.final = net.head

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return self.final(x)


def net() -> Any:
    torch.manual_seed(0)
    return Net().eval()


def given(seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(seed))


def traced(model: nn.Module, x: torch.Tensor | None = None, **options: Any) -> Recording:
    options = {"level": "full", "inputs": True, **options}
    with torch.no_grad(), capture(model, **options) as trace:
        model(given() if x is None else x)
    assert trace.recording is not None
    return trace.recording


def broken() -> Any:
    model = net()
    with torch.no_grad():
        model.blocks[2].up.bias.zero_()
    return model


@pytest.mark.parametrize("level", ["full", "sketch", "stats"])
@pytest.mark.parametrize("inputs", [True, False])
def test_the_module_is_named_at_every_level(level: str, inputs: bool) -> None:
    options: dict[str, Any] = {"level": level, "inputs": inputs}
    result = compare_traces(traced(broken(), **options), traced(net(), **options))
    assert result.verdict is Verdict.DRIFTED
    assert result.first_divergence is not None
    assert result.first_divergence.fqn == "blocks.2.up"
    assert (result.first_divergence.step, result.first_divergence.branch) == (0, "main")
    if level == "full":
        assert result.first_divergence.kind == "a bias: the same offset everywhere in a channel"
    assert [r.origin for r in result.rows if r.fqn == "blocks.2.down" and "out" in r.name] == [
        "inherited"
    ]


def test_the_same_trace_is_identical() -> None:
    result = compare_traces(traced(net()), traced(net()))
    assert result.verdict is Verdict.IDENTICAL
    assert result.first_divergence is None


def test_moments_alone_never_pass() -> None:
    result = compare_traces(traced(net(), level="stats"), traced(net(), level="stats"))
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "permutation" in result.rows[0].note
    assert "--level sketch" in result.hint
    whole = compare_traces(traced(broken()), traced(net()))
    assert "--noise TRACE" in whole.hint


def test_other_names_pair_by_what_modules_return_and_say_so() -> None:
    result = compare_traces(traced(Renamed(broken())), traced(net()))
    assert result.first_divergence is not None
    assert result.first_divergence.fqn in ("blocks.2.up", "blocks.2")
    assert any("no module has the same name on both sides" in note for note in result.notes)


def test_a_rename_map_names_the_module_and_what_has_no_partner() -> None:
    rename = {"layers.*": "blocks.*"}
    result = compare_traces(traced(Renamed(broken())), traced(net()), rename=rename)
    assert result.first_divergence is not None
    assert result.first_divergence.fqn == "blocks.2.up"
    assert "without a partner in the reference: final" in result.notes
    assert "without a partner in the actual trace: head" in result.notes


def test_what_has_no_partner_may_be_at_fault_before_the_first_that_differs() -> None:
    """Without inputs: a module that was given what another one made is not accused alone."""
    rename = {"layers.*.down": "blocks.*.down"}
    result = compare_traces(
        traced(Renamed(broken()), inputs=False), traced(net(), inputs=False), rename=rename
    )
    assert result.first_divergence is not None
    assert result.first_divergence.fqn == "blocks.2.down"
    kind = "or in blocks.2.act before it, which has no partner"
    assert (result.first_divergence.kind or "").startswith(kind)
    rename = {"layers.*": "blocks.*"}
    whole = compare_traces(
        traced(Renamed(broken()), inputs=False), traced(net(), inputs=False), rename=rename
    )
    assert whole.first_divergence is not None
    assert whole.first_divergence.fqn == "blocks.2.up"
    assert "no partner" not in (whole.first_divergence.kind or "")


def test_a_trace_of_another_model_is_refused_with_both_sides_names() -> None:
    other = nn.Sequential(nn.Linear(16, 3), nn.Tanh())
    torch.manual_seed(5)
    with pytest.raises(UsageError, match="no module of the actual trace has a partner") as caught:
        compare_traces(traced(other, select="0,1"), traced(net(), select="blocks*"))
    assert "another model" in str(caught.value)
    assert "blocks.0" in str(caught.value)
    assert "--rename MAP.toml" in str(caught.value)


def test_a_side_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.ones(3)}, tmp_path / "plain.safetensors")
    with pytest.raises(UsageError, match="this side is no trace") as caught:
        compare_traces(tmp_path / "plain.safetensors", traced(net()))
    assert "plain.safetensors" in str(caught.value)
    assert "truestep trace record" in str(caught.value)


def test_other_steps_are_left_out_and_that_is_said() -> None:
    def two(model: Any) -> Recording:
        with torch.no_grad(), capture(model, level="full") as trace:
            model(given())
            model(given())
        assert trace.recording is not None
        return trace.recording

    result = compare_traces(traced(net()), two(net()))
    assert result.verdict is Verdict.IDENTICAL
    assert "steps 1 main (only the reference trace has them)" in result.not_looked_at
    assert "inputs of modules (only the actual trace has them)" in result.not_looked_at
    with pytest.raises(UsageError, match="nothing in common"):
        compare_traces(traced(net(), branch="cond"), traced(net(), branch="uncond"))


def test_a_module_that_one_side_lacks_is_never_silent() -> None:
    short = compare_traces(traced(net(), select="blocks*"), traced(net(), select="blocks*,head"))
    assert short.verdict is Verdict.MISSING
    assert {row.fqn for row in short.failing} == {"head"}
    more = compare_traces(traced(net(), select="blocks*,head"), traced(net(), select="blocks*"))
    assert more.verdict is Verdict.INCOMPARABLE


def test_calls_of_one_module_with_other_shapes_are_named() -> None:
    result = compare_traces(traced(net(), given()[:, :6]), traced(net()))
    assert result.verdict is Verdict.INCOMPARABLE
    assert "shape [2, 6, 16] against [2, 12, 16]" in result.rows[0].note


def test_nan_is_introduced_where_it_first_appears() -> None:
    model = net()
    with torch.no_grad():
        model.blocks[1].down.weight[0, 0] = float("nan")
    result = compare_traces(traced(model), traced(net()))
    assert result.verdict is Verdict.INVALID
    assert result.first_divergence is not None
    assert result.first_divergence.fqn == "blocks.1.down"


def test_rounding_that_grew_is_not_called_a_fault_without_a_measured_floor() -> None:
    def shaken(size: float) -> Recording:
        noise = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(9))
        return traced(net(), given() + size * noise)

    model = net()
    result = compare_traces(traced(model, given() * (1 + 1e-6)), traced(model))
    assert result.verdict is not Verdict.DRIFTED
    far = compare_traces(shaken(1e-2), traced(model))
    assert far.verdict is Verdict.DRIFTED
    assert far.first_divergence is not None
    assert far.first_divergence.kind is not None
    assert far.first_divergence.kind.startswith("given another input")


def test_noise_traces_measure_the_floor() -> None:
    def shaken(seed: int) -> Recording:
        noise = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(seed))
        return traced(net(), given() + 1e-5 * noise)

    benign = [shaken(seed) for seed in range(3)]
    held_out = compare_traces(shaken(7), traced(net()), noise=benign)
    assert held_out.verdict is Verdict.EQUIVALENT
    assert {row.floor.source for row in held_out.rows if row.floor} == {"measured"}
    wrong = traced(broken())
    assert compare_traces(wrong, traced(net()), noise=benign).verdict is Verdict.DRIFTED
    with pytest.raises(UsageError, match="measured on traces at level full"):
        compare_traces(wrong, traced(net()), noise=[traced(net(), level="stats")])


def test_a_partial_trace_says_so(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    model = net()

    def run_out_of_memory() -> None:
        with torch.no_grad(), capture(model, level="full", inputs=True, path=path):
            model(given())
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        run_out_of_memory()
    result = compare_traces(path, traced(model))
    assert result.verdict is Verdict.IDENTICAL
    assert any(note.startswith("actual: partial") for note in result.notes)


def test_a_candidate_that_broke_off_does_not_pass(tmp_path: Path) -> None:
    """The reference goes on; one that was cut at the same place, or has fewer steps, is judged."""

    def run(steps: int, fail_at: int | None, file: str, *, inputs: bool = False) -> Path:
        path, model = tmp_path / file, net()
        tracing = capture(model, level="full", path=path, inputs=inputs)
        with suppress(RuntimeError), torch.no_grad(), tracing:
            for step in range(steps):
                if step == fail_at:
                    raise RuntimeError("out of memory")
                model(given())
        return path

    whole, cut = run(3, None, "whole.safetensors"), run(3, 1, "cut.safetensors")
    result = compare_traces(cut, whole)
    assert result.verdict is Verdict.INVALID
    assert "grown" not in (result.first_divergence.kind or "" if result.first_divergence else "")
    assert result.failing[0].note == (
        "actual: partial: the traced block raised RuntimeError, before what the reference goes on "
        "with"
    )
    assert compare_traces(cut, run(3, 1, "also.safetensors")).verdict is Verdict.IDENTICAL
    short = run(1, None, "short.safetensors", inputs=True)
    assert compare_traces(cut, short).verdict is Verdict.IDENTICAL  # its inputs are no further step
    longer = compare_traces(cut, run(3, None, "inputs.safetensors", inputs=True))
    assert longer.verdict is Verdict.INVALID
    fewer = compare_traces(run(1, None, "fewer.safetensors"), whole)
    assert fewer.verdict is Verdict.IDENTICAL
    assert fewer.not_looked_at == ("steps 1 main, 2 main (only the reference trace has them)",)


class Told:
    """An output that is no nest."""

    def __init__(self, value: object) -> None:
        self.value = value


class Wrapped(torch.nn.Module):
    """Returns what its layer gives in some form, times a factor."""

    def __init__(self, form: Callable[[torch.Tensor], object], factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.form, self.factor = torch.nn.Linear(8, 8), form, factor

    def forward(self, x: torch.Tensor) -> object:
        return self.form(self.layer(x) * self.factor)


def wrapped(form: Callable[[torch.Tensor], object], factor: float) -> Recording:
    """A trace of one call."""
    model = Wrapped(form, factor)
    with torch.no_grad(), capture(model, level="full") as trace:
        model(torch.linspace(-1, 1, 64).reshape(8, 8))
    assert trace.recording is not None
    return trace.recording


def test_what_no_trace_holds_passes_nothing() -> None:
    """A sparse tensor, or objects in objects, at the end: what is inside cannot vouch for it."""
    for form, words in (
        (torch.Tensor.to_sparse, "(root) has tensors that cannot be stored: torch.sparse_coo"),
        (lambda t: Told(Told(t)), "(root) returned no tensor (Told)"),
    ):
        for factor in (1.0, 2.0):
            result = compare_traces(wrapped(form, factor), wrapped(form, 1.0))
            assert result.verdict is Verdict.INCOMPARABLE
            assert words in result.failing[0].note
            assert any(words in text for text in result.not_looked_at)


def test_plain_objects_and_arrays_are_read() -> None:
    forms: tuple[Callable[[torch.Tensor], object], ...] = (
        Told,
        lambda t: {"sample": t.numpy()},
        lambda t: (t * 0 + 1, Told(t)),
    )
    for form in forms:
        assert compare_traces(wrapped(form, 1.0), wrapped(form, 1.0)).verdict is Verdict.IDENTICAL
        result = compare_traces(wrapped(form, 2.0), wrapped(form, 1.0))
        assert result.verdict is Verdict.DRIFTED, form


def test_what_is_returned_beside_tensors_is_not_looked_at() -> None:
    result = compare_traces(
        wrapped(lambda t: (t, Told(Told(t))), 1.0), wrapped(lambda t: (t, Told(Told(t))), 1.0)
    )
    assert result.verdict is Verdict.IDENTICAL
    assert result.not_looked_at == ("(root) returned, beside tensors, a Told",)


def test_the_command_prints_growth_and_exits_by_verdict(tmp_path: Path) -> None:
    actual, reference = str(tmp_path / "a.safetensors"), str(tmp_path / "r.safetensors")
    traced(broken(), path=actual)
    traced(net(), path=reference)
    page = tmp_path / "report.html"
    found = CliRunner().invoke(app, ["trace", actual, reference, "--report", str(page)])
    assert found.exit_code == 1
    said = " ".join(found.output.split())
    assert "first divergence: `blocks.2.up`, step 0, main: a bias" in said
    found = CliRunner().invoke(app, ["trace", actual, reference, "-v"])
    growth = [line for line in found.output.splitlines() if line.startswith("  growth")]
    assert any("blocks.2.up" in line and line.endswith("<- introduced") for line in growth)
    assert "Growth over the modules of a forward" in page.read_text()
    same = CliRunner().invoke(app, ["trace", "--tolerance", "0.1", reference, reference])
    assert same.exit_code == 0
    gone = CliRunner().invoke(app, ["trace", str(tmp_path / "none.safetensors"), reference])
    assert gone.exit_code != 0


@pytest.mark.parametrize("level", ["full", "stats"])
def test_a_row_takes_a_bounded_number_of_bytes(level: Level, tmp_path: Path) -> None:
    """There may be a million. What does not grow with them (the interpreter, a window) is left out.

    It was 7.5 kB, of which 1.4 kB said which fields of a row had been given.
    """

    def trace(rows: int, factor: float) -> Path:
        tensors = {
            f"module/blocks.{at % 50}.attn1.to_out.0/{at // 50}/cond/out.0": factor
            * torch.randn(8, generator=torch.Generator().manual_seed(at))
            for at in range(rows)
        }
        table = tensor_table(tensors)
        manifest = Manifest(tool_version="0", created="", level=level, tensors=table)
        path = tmp_path / f"{rows}-{factor}.safetensors"
        Recording.in_memory(tensors, manifest).save(path)
        return path

    def peak(rows: int) -> int:
        sides = trace(rows, 1 + 1e-7), trace(rows, 1.0)
        return peak_bytes(lambda: compare_traces(*sides))

    peak(50)
    assert (peak(3600) - peak(2400)) / 1200 < 5500


@pytest.mark.parametrize(
    ("sizes", "factor"),
    [
        ((1_000, 3_000), 1.0),
        ((1_000, 3_000), 1.05),
        pytest.param((6_000, 10_000), 1.05, marks=pytest.mark.bar),
    ],
)
def test_a_row_of_moments_takes_less_than_a_kilobyte(
    sizes: tuple[int, int], factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both tables, the rows, and all that is told of them: it was 5 kB."""
    monkeypatch.setattr("truestep.recording.spool.PLAIN", 0)

    def peak(rows: int) -> int:
        sides = [
            stats_trace(tmp_path / f"{rows}-{gain}.safetensors", rows, gain)
            for gain in (factor, 1 + 1e-12)
        ]
        found: list[str] = []

        def told() -> None:
            found.extend(lines(compare_traces(*sides)))

        told()  # names that were read are remembered, up to a number
        assert found[0].startswith("UNDECIDED" if factor == 1.0 else "FAILED drifted")
        return peak_bytes(told)

    few, many = sizes
    assert (peak(many) - peak(few)) / (many - few) < 1000


def test_moments_of_two_traces_are_compared_without_a_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million rows took 0.5 ms each, half of that to make tensors of eight numbers."""
    reads = []
    monkeypatch.setattr("truestep.recording.format._mapped", lambda *a: reads.append(a))
    sides = [stats_trace(tmp_path / f"{gain}.safetensors", 2000, gain) for gain in (1.0, 1.05)]
    assert compare_traces(*sides).verdict is Verdict.DRIFTED
    assert reads == []
