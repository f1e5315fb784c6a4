"""A sample of `make bench-ports`: correct ports are not accused, and a fault in each is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.bench_ports import PORTS, Port, Subject, judged, ports, table
from truestep.engines.named import run_of
from truestep.engines.ordered import check_run
from truestep.testing import tiny
from truestep.verdict import Verdict

SAMPLE = [
    Port("wan", "exchanged names", "lists, denoised"),
    Port("wan", "fused keys and values", "reversed batch, time of 0 to 1"),
    Port("wan", "everything", "other sign"),
    Port("wan", "exchanged names"),
    Port("wan", "split layers", "positional"),
]


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject("wan", tmp_path_factory.mktemp("wan"))


@pytest.mark.parametrize("port", SAMPLE, ids=lambda port: port.name)
def test_a_right_port_is_not_accused_and_its_twin_with_a_fault_is(port: Port, wan: Subject) -> None:
    row = judged(port, wan)
    assert row["verdict"] == "equivalent", row["why"]
    assert not row["module accused"]
    assert row["opened"]
    assert row["fault"] == "drifted"
    assert row["named"].partition("[")[0] == row["planted"]


@pytest.mark.parametrize("loop", ["lists, denoised", "other sign"])
def test_wrong_guidance_of_another_convention_is_named(loop: str, wan: Subject) -> None:
    run, _ = wan.ran(Port("wan", "renamed", loop), fault=False)
    steps = [
        step.but(guided=step.guided * 1.01) if step.guided is not None else step
        for step in run.steps
    ]
    result = check_run(run.but(steps=tuple(steps)), wan.folder, reference=run_of(wan.reference))
    assert result.verdict is Verdict.DRIFTED
    assert result.first_divergence is not None
    assert result.first_divergence.stage == "guidance"


def test_texts_of_two_lengths_tell_the_branches(tmp_path: Path) -> None:
    subject = Subject("qwen", tmp_path)
    row = judged(Port("qwen", "renamed"), subject)
    assert not row["accused"], row["accused"]
    assert row["fault"] == "drifted"


@pytest.mark.parametrize("kind", PORTS)
def test_ports_compute_the_same_under_other_names(kind: str) -> None:
    model = tiny.pipeline("WanPipeline").transformer
    dice = torch.Generator().manual_seed(0)
    given = {
        "hidden_states": torch.randn(1, 16, 3, 8, 8, generator=dice),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 10, 32, generator=dice),
    }
    before = {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        expected = model(**given, return_dict=False)[0]
        PORTS[kind](model)
        made = model(**given, return_dict=False)[0]
    assert float((made - expected).norm() / expected.norm()) < 1e-5
    after = {name for name, _ in model.named_parameters()}
    assert after == before if kind == "exchanged names" else after != before


def test_there_are_forty_ports_and_the_table_counts_what_is_accused() -> None:
    assert len(ports()) >= 40
    assert len({port.name for port in ports()}) == len(ports())
    row = {
        "port": "a", "verdict": "equivalent", "accused": "", "why": "", "predictions": 6,
        "module accused": "", "fault": "drifted", "planted": "x.0", "named": "x.0[0:4]",
    }  # fmt: skip
    accused = {**row, "verdict": "drifted", "accused": "it is", "why": "it is", "named": "y"}
    undecided = {**row, "verdict": "inconclusive", "why": "a seam"}
    text = table([row, accused, undecided, {"port": "b", "error": "no"}])
    assert "3 ports" in text
    assert "**1 are accused.**" in text
    assert "of 2 the very module is named first" in text
    assert "Of 1 a seam cannot be judged" in text
    assert "1 could not be run" in text
