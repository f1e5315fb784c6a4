"""Modules of a result as Model Explorer reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jsonschema
import pytest

from tests.commands import Run, runner
from tests.report.results_to_show import fault
from truestep.errors import UsageError
from truestep.report.model_explorer import LARGEST, write
from truestep.verdict import Comparison, Results, Row, Verdict

COLOUR = {"type": "string", "pattern": "^#[0-9a-f]{6}$"}
NODE_DATA = {
    "type": "object",
    "additionalProperties": {
        "type": "object",
        "required": ["results"],
        "additionalProperties": False,
        "properties": {
            "name": {"type": "string"},
            "results": {
                "type": "object",
                "additionalProperties": {
                    "type": "object",
                    "required": ["value"],
                    "additionalProperties": False,
                    "properties": {"value": {"type": "number"}, "bgColor": COLOUR},
                },
            },
            "thresholds": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["value", "bgColor"],
                    "additionalProperties": False,
                    "properties": {"value": {"type": "number"}, "bgColor": COLOUR},
                },
            },
        },
    },
}
"""`ModelNodeData` of `ai-edge-model-explorer` 0.1.34, as its `to_json_string` writes it."""


def module(fqn: str, slot: str, *, ratio: float | None, step: int = 0) -> Row:
    failed = ratio is None or not ratio <= 4
    return (
        fault()
        .rows[0]
        .model_copy(
            update={
                "name": f"module/{fqn}/{step}/cond/{slot}",
                "stage": "prediction module" if step else "module",
                "fqn": fqn,
                "step": step,
                "ratio": ratio,
                "verdict": Verdict.DRIFTED if failed else Verdict.EQUIVALENT,
            }
        )
    )


def traced() -> Comparison:
    rows = (
        module("net.a", "in.0", ratio=900.0),
        module("net.a", "out.0", ratio=0.5),
        module("net.b", "out.0", ratio=70.0),
        module("net.b", "out.1", ratio=math.inf),
        module("net", "out.0", ratio=None),
        module("net.a", "out.0", ratio=2.0, step=1),
    )
    return fault().model_copy(update={"rows": (*fault().rows, *rows)})


def test_node_data_is_as_its_schema_says(tmp_path: Path) -> None:
    graph = write(tmp_path / "drift.json", Results.of([traced()]))
    data = json.loads((tmp_path / "drift.json").read_text())
    jsonschema.validate(data, NODE_DATA)
    assert [*data] == ["step 0, cond", "step 1, cond"]
    first = data["step 0, cond"]["results"]
    assert first["net.a"]["value"] == 0.5  # of what it returned, not of what it was given
    assert first["net.b"]["value"] == LARGEST
    assert first["net"]["value"] == LARGEST
    assert first["net.a"]["bgColor"] != first["net.b"]["bgColor"]
    values = [each["value"] for each in data["step 0, cond"]["thresholds"]]
    assert values == sorted(values)
    drawn = json.loads(graph.read_text())
    nodes = {each["id"]: [n["id"] for n in each["nodes"]] for each in drawn["graphs"]}
    assert nodes == {name: [*each["results"]] for name, each in data.items()}


def test_edges_lead_to_modules_that_there_are(tmp_path: Path) -> None:
    drawn = json.loads(write(tmp_path / "a.json", traced()).read_text())
    for graph in drawn["graphs"]:
        names = {node["id"] for node in graph["nodes"]}
        edges = [e["sourceNodeId"] for n in graph["nodes"] for e in n.get("incomingEdges", ())]
        assert len(edges) == len(names) - 1
        assert names.issuperset(edges)


def test_a_result_without_modules(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no modules"):
        write(tmp_path / "a.json", fault())
    assert [*tmp_path.iterdir()] == []


def test_show_writes_it_and_says_how_it_is_opened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    show: Run = runner(monkeypatch, capsys, "show")
    (tmp_path / "r.json").write_text(Results.of([traced()]).model_dump_json())
    path = tmp_path / "nodes.json"
    code, out, _ = show(str(tmp_path / "r.json"), "--model-explorer", str(path))
    assert code == 0
    assert path.exists()
    graph = tmp_path / "nodes.graph.json"
    assert out.splitlines()[-1] == f"open: model-explorer {graph} --node_data_paths={path}"
    code, _, err = show(str(tmp_path / "r.json"), "c0", "--model-explorer", str(path))
    assert code == 2
    assert "takes one file of results" in err
