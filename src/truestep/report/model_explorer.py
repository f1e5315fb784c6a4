"""Results of modules as node data of Model Explorer, and the modules as a graph to lay them on.

Source:
    google-ai-edge/model-explorer, `ai-edge-model-explorer` 0.1.34: `node_data_builder.py`
    (`ModelNodeData`, `GraphNodeData`, `NodeDataResult`) and `graph_builder.py` (`GraphCollection`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from truestep.errors import UsageError
from truestep.files import write_text
from truestep.keys import key_of
from truestep.report.results_file import AnyResult
from truestep.verdict import Comparison, Results, Row

LARGEST = 1e12
"""A ratio that is not finite, or above this, is written so: JSON has no infinity."""

COLOURS = {0: "#b7e1c7", 1: "#f4b3ad", 3: "#f3ddb0", 4: "#d9ccf2"}
"""Background of a module by the exit code of its verdict."""

Json = dict[str, Any]


def write(path: Path, result: AnyResult) -> Path:
    """Write node data, and the graph of the modules beside it.

    Args:
        path: Of the node data.
        result: Of a check or trace with modules.

    Returns:
        Path of the graph.

    Raises:
        UsageError: No module was judged in it.
        WriteError: A file could not be written.
    """
    graphs = _graphs(result)
    if not graphs:
        raise UsageError(
            "the result holds no modules",
            measured="Model Explorer shows modules, and none was judged",
            likely="modules are in results of --depth modules, and of truestep trace",
        )
    graph = path.with_name(f"{path.stem}.graph.json")
    data = {name: node_data(rows) for name, rows in graphs.items()}
    nodes = {
        "label": path.stem,
        "graphs": [{"id": name, "nodes": _nodes(rows)} for name, rows in graphs.items()],
    }
    write_text(path, json.dumps(data, indent=1, allow_nan=False), "the node data")
    write_text(graph, json.dumps(nodes, indent=1, allow_nan=False), "the graph")
    return graph


def node_data(rows: Mapping[str, Row]) -> Json:
    """Of one forward: the ratio to the noise floor of every module, coloured by its verdict."""
    bounds = [
        row.floor.bound for row in rows.values() if row.floor and math.isfinite(row.floor.bound)
    ]
    return {
        "name": "truestep: multiples of the noise floor",
        "results": {
            fqn: {"value": _finite(row), "bgColor": COLOURS[row.verdict.exit_code]}
            for fqn, row in rows.items()
        },
        "thresholds": [
            {"value": 1.0, "bgColor": COLOURS[0]},
            {"value": max([*bounds, 1.0]), "bgColor": COLOURS[4]},
            {"value": LARGEST, "bgColor": COLOURS[1]},
        ],
    }


def _graphs(result: AnyResult) -> dict[str, dict[str, Row]]:
    """Forwards by name: of each module the worst of what it returned, in order of execution."""
    comparisons = result.comparisons if isinstance(result, Results) else (result,)
    found: dict[str, dict[str, Row]] = {}
    for at, comparison in enumerate(comparisons):
        if not isinstance(comparison, Comparison):
            continue
        several = f"{comparison.case_id or at}, " if len(comparisons) > 1 else ""
        for row in comparison.rows:
            key = key_of(row.name)
            if key.head != "module" or not row.fqn or not key.outward:
                continue
            name = f"{several}step {row.step}, {row.branch}"
            modules = found.setdefault(name, {})
            before = modules.get(row.fqn)
            if before is None or _order(row) > _order(before):
                modules[row.fqn] = row
    return found


def _order(row: Row) -> tuple[bool, float]:
    return not row.verdict.passed, _finite(row)


def _finite(row: Row) -> float:
    if row.ratio is None:
        return 0.0 if row.verdict.passed else LARGEST
    return min(row.ratio, LARGEST) if math.isfinite(row.ratio) else LARGEST


def _nodes(rows: Mapping[str, Row]) -> list[Json]:
    """Modules in order of execution, each below the modules that hold it."""
    nodes: list[Json] = []
    before = ""
    for fqn, row in rows.items():
        parent, _, last = fqn.rpartition(".")
        told = {"verdict": row.verdict.value, "rel_l2": row.metrics and row.metrics.rel_l2}
        told |= {"origin": row.origin, "note": row.note}
        node: Json = {
            "id": fqn,
            "label": last,
            "namespace": parent.replace(".", "/"),
            "attrs": [{"key": k, "value": str(v)} for k, v in told.items() if v not in (None, "")],
        }
        if before:
            node["incomingEdges"] = [{"sourceNodeId": before}]
        nodes.append(node)
        before = fqn
    return nodes
