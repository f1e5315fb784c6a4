"""What the bench of an accelerator found, as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def markdown(report: Mapping[str, Any]) -> str:
    """Everything of a report, the device first."""
    lines = ["# truestep on an accelerator", "", *_device(report), ""]
    for name, section in report["sections"].items():
        title, table = TABLES.get(name, (name, lambda section: []))
        lines += [f"## {title}", "", _status(section), ""]
        body = table(section) if section["rows"] else []
        lines += [*body, ""] if body else []
        lines += _said(section)
    return "\n".join(lines).rstrip() + "\n"


def _device(report: Mapping[str, Any]) -> Iterator[str]:
    here = report["environment"]
    libraries = ", ".join(
        f"{name} {here.get(f'library.{name}', '?')}" for name in ("torch", "diffusers", "truestep")
    )
    if report["scale"] == "tiny":
        yield (
            f"**Run on `{report['device']}` ({here['device.name']}), {libraries}, with tiny "
            "models. These numbers show that the bench runs; they are of its logic, not of an "
            "accelerator.**"
        )
        return
    yield (
        f"Run on {here['device.name']} (`{report['device']}`, driver "
        f"{here.get('device.driver', '?')}, CUDA {here.get('torch.cuda', '?')}, cuDNN "
        f"{here.get('torch.cudnn', '?')}), {libraries}; {report['created']}. Transformers of the "
        "width of Wan 2.1 1.3B (4 blocks), FLUX.1 (1 double and 2 single blocks) and Qwen-Image "
        "(2 blocks), random weights, tiny text encoders and decoders."
    )
    yield ""
    yield (
        f"TF32 in products: {here.get('torch.matmul_allow_tf32', '?')}, in convolutions: "
        f"{here.get('torch.cudnn_allow_tf32', '?')}; deterministic algorithms: "
        f"{here.get('torch.deterministic', '?')}, of cuDNN: "
        f"{here.get('torch.cudnn_deterministic', '?')}; CUBLAS_WORKSPACE_CONFIG "
        f"{here.get('variable.CUBLAS_WORKSPACE_CONFIG', '?')}. All else is in `accelerator.json`."
    )


def _status(section: Row) -> str:
    text = f"{section['status']}"
    if "seconds" in section:
        text += f"; {section['seconds']:.0f} of {section['allowed_s']:.0f} s"
    if section.get("cuts"):
        text += "; there was no time for what is listed as cut, if nothing else is said there"
    return f"Status: {text}."


def _said(section: Row) -> Iterator[str]:
    """What failed, and what was cut."""
    listed = [f"- FAILED: {section['error']}"] if "error" in section else []
    listed += [
        f"- FAILED: {_name(row)}: {row['failed']}" for row in section["rows"] if "failed" in row
    ]
    listed += [f"- cut: {cut}" for cut in section.get("cuts", ())]
    yield from [*listed, ""] if listed else []


def _name(row: Row) -> str:
    keys = ("model", "dtype", "kind", "detail", "entry", "plan", "work")
    return ", ".join(str(row[key]) for key in keys if key in row)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def _size(value: object) -> str:
    return f"{value:.1e}" if isinstance(value, float) and value else str(value or 0)


# --- floors ---------------------------------------------------------------------------------------


def _floors(section: Row) -> list[str]:
    rows = [row for row in section["rows"] if "failed" not in row]
    places = list(dict.fromkeys((row["model"], row["dtype"]) for row in rows))
    lines = [
        "Relative L2 of one prediction to that of the plain run; of several runs of a kind the "
        "largest. `truestep` measures the first kinds itself, for its noise floor; 16-bit models "
        "raised to float32 are in `accelerator.json`. `-`: not here, for the reason below.",
        "",
    ]
    groups = dict.fromkeys((row["kind"], _detail(row)) for row in rows)
    body = []
    for kind, detail in groups:
        cells = []
        for place in places:
            own = [
                row
                for row in rows
                if (row["model"], row["dtype"]) == place
                and (row["kind"], _detail(row)) == (kind, detail)
                and row.get("pair", f"{place[1]}/{place[1]}") == f"{place[1]}/{place[1]}"
            ]
            sizes = [row["rel_l2"] for row in own if "rel_l2" in row]
            cells.append(_size(max(sizes)) if sizes else "-" if own else "")
        body.append([f"{kind}: {detail}" if detail else kind, *cells])
    lines += _table(["change", *(f"{model} {dtype}" for model, dtype in places)], body)
    absent: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "not_here" in row:
            key = f"{row['kind']}: {_detail(row)}".removesuffix(": "), row["not_here"]
            absent.setdefault(key, []).append(f"{row['model']} {row['dtype']}")
    if absent:
        lines += [
            "",
            *(f"- not here: {k} ({', '.join(w)}): {why}" for (k, why), w in absent.items()),
        ]
    return lines


def _detail(row: Row) -> str:
    """Of the bench's own kinds what is changed; truestep's have one line a kind."""
    return str(row.get("detail", "")) if row.get("by") == "bench" else ""


# --- the others -----------------------------------------------------------------------------------


def _faults(section: Row) -> list[str]:
    lines = [
        f"- {dtype}: {n['found']} of {n['faults']} faults found ({n['found_undecided']} of them "
        f"inconclusive), {n['named']} at the right place, {n['missed']} missed; {n['accused']} of "
        f"{n['twins']} harmless twins accused ({n['accused_undecided']} of them inconclusive)."
        for dtype, n in section.get("counts", {}).items()
    ]
    rows = [row for row in section["rows"] if "entry" in row and "failed" not in row]
    body = []
    for row in rows:
        if "not_applicable" in row:
            said, where = "not applicable", row["not_applicable"]
        elif row.get("effect") == 0.0:
            said, where = "no effect here, not counted", ""
        elif row["kind"] == "fault":
            said, where = "MISSED" if row["passed"] else "found", row["place"]
        else:
            said, where = "passed" if row["passed"] else "ACCUSED", row["place"]
        said += " (inconclusive)" if row.get("verdict") == "inconclusive" else ""
        where = f"{where}, module `{row['module']}`" if row.get("module") else where
        kind = f"{row['kind']} `{row['entry']}`"
        effect = row.get("effect", "")
        body.append(
            [row["model"], row["dtype"], kind, _size(effect) if effect else "", said, where]
        )
    return [*lines, "", *_table(["model", "dtype", "entry", "size", "verdict", "at"], body)]


def _plans(section: Row) -> list[str]:
    body = [
        [
            f"{row['model']} {row['dtype']}",
            row["plan"],
            f"{row['times_stock']:.2f}",
            len(row["samples_s"]),
            "same bits" if row["same_bits"] else _size(row["rel_l2"]),
            row.get("verdict") or row.get("not_checked") or "failed",
        ]
        for row in section["rows"]
        if "plan" in row
    ]
    head = ["model", "plan", "time / stock", "rounds", "rel. L2 of the latent", "truestep's check"]
    return [
        "Time of a whole call as a multiple of the stock pipeline's, interleaved in one process, "
        "median of the rounds' own ratios; below 1 is faster, `off` is the same code twice.",
        "",
        *_table(head, body),
    ]


def _overhead(section: Row) -> list[str]:
    body = [
        [
            f"{row['model']} {row['dtype']}",
            row["work"],
            f"{row['times_plain']:.2f}",
            len(row["samples_s"]),
        ]
        for row in section["rows"]
        if "times_plain" in row
    ]
    return [
        "Time as a multiple of a plain generation that ends with the latent, median of the rounds' "
        "own ratios.",
        "",
        *_table(["model", "work", "time / plain", "rounds"], body),
    ]


def _memory(section: Row) -> list[str]:
    body = [
        [
            f"{row['model']} {row['dtype']}",
            row["work"],
            f"{row['peak_mb']:.0f}",
            f"{row['times_plain']:.2f}" if "times_plain" in row else "",
            " at ".join(filter(None, (row.get("verdict"), row.get("at")))),
        ]
        for row in section["rows"]
        if "peak_mb" in row
    ]
    return [
        "Peak of device memory (torch's allocator), or, on a CPU, of all resident memory of a "
        "process of its own; `modules` checks a planted fault down to the module.",
        "",
        *_table(["model", "work", "peak, MB", "peak / plain", "verdict"], body),
    ]


TABLES: dict[str, tuple[str, Callable[[Row], list[str]]]] = {
    "floors": ("Floors of harmless changes", _floors),
    "faults": ("Faults and harmless twins", _faults),
    "compiled": ("Floors of torch.compile", _floors),
    "plans": ("Guidance plans", _plans),
    "overhead": ("Overhead", _overhead),
    "memory": ("Memory", _memory),
}
