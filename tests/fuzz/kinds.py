"""Every kind of file that truestep reads: good ones, how they are damaged, what is done with them.

A use does what the verbs do with such a file. It may raise what is in the error tree, and nothing
else.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.fuzz import mutate
from truestep import check_latent, compare
from truestep.floors import NoiseFloor, NoiseRun, RunMetrics
from truestep.measure.moments import moments
from truestep.measure.sketch import sketch
from truestep.recording import readers as sources
from truestep.recording.format import Recording
from truestep.recording.header import digest, manifest_digest
from truestep.recording.manifest import Level, Manifest
from truestep.recording.table import tensor_table
from truestep.verdict import Results

if TYPE_CHECKING:
    from truestep.recording.spool import Spool

Files = Mapping[str, bytes]
Mutator = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        seeds: Makes good ones in an empty folder; each is a file, or a folder of them.
        mutators: By the end of a file's name.
        use: Reads the one that is given as the verbs do; the second is the good one.
    """

    seeds: Callable[[Path], None]
    mutators: Mapping[str, Mutator]
    use: Callable[[Path, Path], None]


# --- damage ----------------------------------------------------------------------------------


def _text(data: bytes, generator: random.Random) -> bytes:
    return (mutate.raw if generator.random() < 0.3 else mutate.tokens)(data, generator)


def _json(data: bytes, generator: random.Random) -> bytes:
    if generator.random() < 0.4:
        return _text(data, generator)
    return json.dumps(mutate.plain(json.loads(data), generator)).encode()


def _lines(data: bytes, generator: random.Random) -> bytes:
    """One line of JSON among several."""
    lines = data.split(b"\n")
    at = generator.randrange(len(lines))
    lines[at] = _json(lines[at], generator) if lines[at] else _text(data[:50], generator)
    if generator.random() < 0.2:
        lines.insert(generator.randrange(len(lines)), generator.choice(lines))
    return b"\n".join(lines)


def _numpy(data: bytes, generator: random.Random) -> bytes:
    return (mutate.raw if generator.random() < 0.5 else mutate.tokens)(data, generator)


def _zipped(data: bytes, generator: random.Random) -> bytes:
    if generator.random() < 0.3 or not data.startswith(b"PK"):
        return mutate.raw(data, generator)
    return mutate.archive(data, generator, _numpy)


def _recording(data: bytes, generator: random.Random) -> bytes:
    return mutate.safetensors(data, generator, digest=manifest_digest)


def _packed(data: bytes, generator: random.Random) -> bytes:
    if generator.random() < 0.3:
        return _recording(data, generator)
    return mutate.columns(data, generator, digest=digest, manifest_digest=manifest_digest)


# --- uses ------------------------------------------------------------------------------------


def _shown(path: Path) -> str:
    from truestep.cli.show import show_file

    with contextlib.redirect_stdout(io.StringIO()) as text:
        show_file(path, as_json=False)
        show_file(path, as_json=True)
    return text.getvalue()


def _judged(actual: object, reference: object) -> None:
    """Compare, and print and write what came out."""
    from truestep.report.terminal import lines

    result = compare(actual, reference)
    "\n".join(lines(result))
    Results.of([result]).model_dump_json()


def _use_recording(path: Path, good: Path) -> None:
    from truestep.replay.steps import require_run

    recording = Recording.open(path)
    for name in recording:
        recording[name]
    _shown(path)
    _judged(path, good)
    if good.stem == "full":
        require_run(recording, where=str(path))


def _use_trace(path: Path, good: Path) -> None:
    from truestep.replay.traces import compare_traces
    from truestep.report.terminal import lines

    recording = Recording.open(path)
    for name in recording:
        recording[name]
    _shown(path)
    for sides in ((path, good), (good, path)):
        result = compare_traces(*sides)
        "\n".join(lines(result))
        result.to_json()


def _use_tensors(path: Path, good: Path) -> None:
    source = sources.load(path, label="actual")
    for name in source.tensors:
        source.tensors[name]
    _shown(path)
    _judged(path, good)
    _judged(good, path)


def _use_weights(path: Path, good: Path) -> None:
    from truestep.parity.weights import load_state

    load_state(path)
    _use_tensors(path, good)


def _use_state(path: Path, _: Path) -> None:
    from truestep.parity.weights import load_state

    load_state(path)
    _shown(path)


def _use_bundle(path: Path, good: Path) -> None:
    _use_tensors(path, good)
    for sides in ((path, good), (good, path)):
        check_latent(*sides).to_json()


def _use_lock(path: Path, _: Path) -> None:
    from truestep.recording.lock import read_lock

    read_lock(path)


def _use_cases(path: Path, _: Path) -> None:
    from truestep.case import load_cases

    for tier in ("default", "full"):
        for case in load_cases(path, tier=tier).values():
            case.id, case.canonical(), case.run_settings()


def _use_known(path: Path, _: Path) -> None:
    from truestep.judge.known import read_ledger

    read_ledger(path, cases=["red-three"])


def _use_rename(path: Path, _: Path) -> None:
    from truestep.pairing.records import Pairing
    from truestep.pairing.rename import renamed

    rules = Pairing.read(str(path))
    for name in ("blocks.0.attn.q", "", "a" * 300, "blocks"):
        renamed(name, rules)


def _use_parity(path: Path, _: Path) -> None:
    from truestep.parity.ledger import block_of, markdown, read_ledger

    read_ledger(path)
    markdown([block_of(path, {}, date(2026, 1, 1))])


def _use_packet(path: Path, _: Path) -> None:
    from truestep.parity.packet import read_packet, write_packet

    packet = read_packet(path)
    assert packet is not None
    write_packet(path.with_name("again.toml"), packet)


def _use_history(path: Path, _: Path) -> None:
    from truestep.experiment.history import open_history

    with open_history(path, create=False) as history:
        for cohort, _count in history.cohorts():
            history.batches(cohort)
            cohort.differences(cohort)
    _shown(path)


def _use_experiment(path: Path, _: Path) -> None:
    from truestep.experiment.store import Store
    from truestep.experiment.table import summarise
    from truestep.report.ab import print_experiment, write_tables

    store = Store(path)
    experiment = summarise(store)
    experiment.model_dump_json()
    with contextlib.redirect_stdout(io.StringIO()):
        print_experiment(experiment, folder=str(path), report=None)
    write_tables(store, experiment, report=None)


def _use_spool(path: Path, _: Path) -> None:
    from truestep.recording.recovery import recover

    (spool,) = path.glob("*.spool")
    recording = recover(spool, output=path / "whole.safetensors")
    for name in recording:
        recording[name]


def _use_thresholds(path: Path, _: Path) -> None:
    from truestep.gates.thresholds.file import read
    from truestep.gates.thresholds.linting import lint

    thresholds = read(path)
    frames = torch.linspace(-1, 1, 1 * 3 * 1 * 16 * 16).reshape(1, 3, 1, 16, 16)
    lint(thresholds, {"video/frames": frames}, tried_on="", only=list(thresholds.cases)[:2])
    thresholds.overlaid(thresholds)


def _use_perf(path: Path, _: Path) -> None:
    from truestep.experiment.history import open_history
    from truestep.experiment.perf_importing import read_file

    file, items = read_file(path)
    file.model_dump_json()
    with open_history(path.with_name("h.sqlite")) as history:
        history.import_all(items)
        history.cohorts()


def _use_model(path: Path, _: Path) -> None:
    from truestep.case import Case
    from truestep.runtime.loading import model_index, resolve

    model_index(resolve(Case(model=str(path), prompt="p")))
    _shown(path)


def _use_any(path: Path, _: Path) -> None:
    _shown(path)


# --- good files ------------------------------------------------------------------------------


def _tensors(scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    tensors = {"text/cond": noise(1, 4, 8), "text/uncond": noise(1, 4, 8)}
    tensors["schedule/sigmas"] = torch.tensor([1.0, 0.5, 0.0])
    tensors["schedule/timesteps"] = torch.tensor([1000.0, 500.0])
    tensors["schedule/experts"] = torch.tensor([1, 1])
    tensors["latent/initial"] = noise(1, 4, 1, 4, 4)
    for step in range(2):
        for what in ("latent", "cond", "uncond", "guided"):
            tensors[f"step/{step:04d}/{what}"] = noise(1, 4, 1, 4, 4)
    tensors["latent/final"] = noise(1, 4, 1, 4, 4)
    tensors["audio/latent/final"] = noise(1, 4, 6).half()
    tensors["video/frames"] = noise(1, 3, 2, 8, 8).clamp(-1, 1)
    tensors["mask"] = torch.tensor([True, False])
    return tensors


CASE = {
    "model": "builtin:digits",
    "prompt": "a red three moving left",
    "seed": 3,
    "steps": 2,
    "dtype": "float32",
    "settings": {"device": "cpu"},
}


def _manifest(tensors: Mapping[str, torch.Tensor], level: Level, **more: Any) -> Manifest:
    table = tensor_table(tensors)
    metrics = tuple(
        RunMetrics(name=e.name, rel_l2=1e-6, max_abs=1e-5, structure={"gain": 1e-7})
        for e in table[5:9]
    )
    runs = [
        NoiseRun(kind=kind, detail="d", pair="float32/float32", tensors=metrics)
        for kind in ("repeat", "threads")
    ]
    return Manifest(
        tool_version="0",
        created="2026-01-01T00:00:00+00:00",
        level=level,
        tensors=table,
        noise_floor=NoiseFloor(runs=tuple(runs)),
        timings_s={"step": (0.1, 0.2)},
        environment={"device.name": "cpu", "library.torch": "2"},
        settings={"sample_rate": 16000, "guidance_scale": 5.0},
        **more,
    )


def _write(path: Path, tensors: dict[str, torch.Tensor], level: Level, **more: Any) -> None:
    Recording.in_memory(tensors, _manifest(tensors, level, **more)).save(path)


def _seed_recordings(folder: Path) -> None:
    tensors = _tensors()
    _write(folder / "full.safetensors", tensors, "full", case_id="c", case=CASE)
    few = {name: tensors[name] for name in list(tensors)[:7]}
    _write(folder / "few.safetensors", few, "full")
    _write(folder / "stats.safetensors", few, "stats", case_id="c", case=CASE)
    final = tensors["latent/final"]
    _write(folder / "b.safetensors", {"latent/final": final, "signature": final[0, :, 0]}, "full")


def _seed_sketches(folder: Path) -> None:
    tensors = _tensors()
    _write(folder / "one.safetensors", {"latent/final": tensors["latent/final"]}, "sketch")
    few = {name: tensors[name] for name in list(tensors)[5:9]}
    _write(folder / "few.safetensors", few, "sketch", case_id="c", case=CASE)


def _module_tensors() -> dict[str, torch.Tensor]:
    values = list(_tensors().values())
    names = [
        f"module/{fqn}/{step}/cond/{slot}"
        for step in range(2)
        for fqn in ("blocks.0", "blocks.1", "blocks.1#1", "(root)")
        for slot in ("in.0", "out.0")
    ]
    return dict(zip(names, values, strict=False))


def _seed_traces(folder: Path) -> None:
    levels: tuple[Level, ...] = ("full", "stats", "sketch")
    for level in levels:
        tensors = _module_tensors()
        if level == "sketch":
            tensors = dict(list(tensors.items())[:4])
        _write(folder / f"{level}.safetensors", tensors, level)


def _seed_packed(folder: Path) -> None:
    """Traces that keep their table in columns."""
    from unittest import mock

    levels: tuple[Level, ...] = ("full", "sketch")
    for level in levels:
        spool = _spool(folder / f"{level}.safetensors", level)
        manifest = _manifest({}, level)
        with mock.patch("truestep.recording.spool.PLAIN", 0):
            spool.close(manifest)


def _seed_plain(folder: Path) -> None:
    save_file({"x": torch.arange(6.0), "y": torch.zeros(2, 2).bfloat16()}, folder / "p.safetensors")


def _seed_npy(folder: Path) -> None:
    np.save(folder / "a.npy", np.arange(12, dtype="f4").reshape(3, 4))
    np.save(folder / "f.npy", np.asfortranarray(np.arange(6, dtype=">f8").reshape(2, 3)))
    np.save(folder / "s.npy", np.float16(2))
    with (folder / "v2.npy").open("wb") as file:
        np.lib.format.write_array(file, np.arange(4), version=(2, 0))


def _seed_npz(folder: Path) -> None:
    arrays: dict[str, Any] = {
        "a": np.arange(12, dtype="f4"),
        "b": np.ones((2, 3)),
        "c": np.array(True),
    }
    np.savez(folder / "s.npz", **arrays)
    np.savez_compressed(folder / "c.npz", **arrays)


def _seed_gguf(folder: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(folder / "a.gguf", "flux")
    values = np.linspace(-1, 1, 256, dtype="f4").reshape(4, 64)
    kinds = gguf.GGMLQuantizationType
    writer.add_array("comfy.gguf.orig_shape.plain", [8, 32])
    writer.add_tensor("plain", values)
    for kind in (kinds.Q8_0, kinds.Q4_1):
        packed = gguf.quants.quantize(values, kind)
        writer.add_tensor(kind.name, packed, raw_dtype=kind)
    writer.add_tensor("Q4_K", np.zeros((1, 144), np.uint8), raw_dtype=kinds.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _without_addresses(data: bytes) -> bytes:
    """A .pt file of the old form with one storage, which is called by its address there."""
    return re.sub(rb"X.\0\0\0\d{5,}", b"X\1\0\0\x000", data, flags=re.DOTALL)


def _seed_pt(folder: Path) -> None:
    shared = torch.arange(8.0)
    content = {"a": shared, "b": [shared[2:4], {"c": torch.ones(2, 2).bfloat16()}], "n": 3}
    torch.save(content, folder / "new.pt")
    old = io.BytesIO()
    one = {"a": shared, "b": [shared[2:4], {"c": shared[:2]}], "n": 3}
    torch.save(one, old, _use_new_zipfile_serialization=False)
    (folder / "old.pt").write_bytes(_without_addresses(old.getvalue()))
    torch.save({"model": {"w": torch.nn.Parameter(torch.ones(2))}}, folder / "state.pt")


def _seed_onnx(folder: Path) -> None:
    import onnx

    weights = {"w": np.ones((2, 3), "f4"), "w_q": np.ones(3, "i1"), "w_scale": np.ones(1, "f4")}
    held = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], held)), folder / "m.onnx"
    )


def _seed_hdf5(folder: Path) -> None:
    import h5py

    with h5py.File(folder / "m.h5", "w") as file:
        file["a/b"] = np.ones((2, 3), "f4")
        file.create_dataset("c", data=np.arange(100), chunks=(10,), compression="gzip")


def _seed_bundle(folder: Path) -> None:
    latent = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    content = {
        "latent": latent.half(),
        "shape": list(latent.shape),
        "dtype_original": "torch.bfloat16",
        "expected_slice": latent[0, :, 0, :3, :3].flatten(),
        "slice_spec": {"kind": "corner_3x3_first_frame", "version": 1},
        "metadata": {"model_id": "m"},
        "format_version": 1,
    }
    torch.save(content, folder / "b.pt")


def _seed_lock(folder: Path) -> None:
    entry = {"sha256": "ab" * 32, "pending": None}
    references = {f"default/cpu/flash/{name}.safetensors": entry for name in "ab"}
    (folder / "r").mkdir()
    text = json.dumps({"lock_version": 1, "references": references}, indent=2)
    (folder / "r" / "truestep.lock").write_text(text, "utf-8")


def _seed_cases(folder: Path) -> None:
    (folder / "c.toml").write_text(
        '[case.red-three]\nmodel = "builtin:digits"\nprompt = "a red three"\nsteps = 20\n'
        'seed = 1\nguidance_scale = 5.0\n[case.red-three.settings]\ndevice = "cpu"\n'
        '[case.red-three.full]\nsteps = 50\n[case.two]\nmodel = "./m"\nprompt = "b"\n'
        'negative_prompt = ""\nheight = 32\nwidth = 32\nnum_frames = 1\ndtype = "float32"\n'
        "[case.two.full]\nsteps = 3\n",
        "utf-8",
    )


def _seed_known(folder: Path) -> None:
    (folder / "k.toml").write_text(
        '[known.red-three]\nreason = "the bias is dropped"\nsince = 2026-10-01\n'
        'stage = "prediction"\nrel_l2 = 1.2e-2\ntolerance = 0.4\n',
        "utf-8",
    )


def _seed_rename(folder: Path) -> None:
    (folder / "m.toml").write_text(
        '# a map\n[rename]\n"blocks.*.attn" = "layers.*.attention"\n"head" = "proj_out"\n', "utf-8"
    )


def _seed_parity(folder: Path) -> None:
    from truestep.parity.evidence import Evidence, MissingPart
    from truestep.parity.ledger import LEDGER, Component, Ledger
    from truestep.parity.tomlfile import dumps

    (folder / "p").mkdir()
    parts = [
        Component(
            family="wan",
            component=name,
            kind="dit",
            test=f"test_{name}.py::test",
            coverage_scope="both",
            concerns=("c",),
            evidence=evidence,
        )
        for name, evidence in (
            ("a", Evidence(date="2026-01-01", raised="ValueError: no")),
            ("b", Evidence(date="2026-01-01", missing=MissingPart(kind="weights", what="w"))),
        )
    ]
    text = dumps(Ledger(component=tuple(parts)).model_dump(mode="json", exclude_none=True))
    (folder / "p" / LEDGER).write_text(text, "utf-8")


def _seed_packet(folder: Path) -> None:
    from truestep.parity.packet import Packet, write_packet

    packet = Packet(model_family="wan", component="vae", component_type="vae", port_files=("a.py",))
    write_packet(folder / "p.packet.toml", packet)


def _seed_history(folder: Path) -> None:
    from truestep.experiment.history import open_history
    from truestep.experiment.perf_records import Cohort, PerfRun

    path = folder / "h.sqlite"
    with open_history(path) as history:
        cohort = Cohort(case_id="c", values={"device.name": "cpu"})
        for _ in range(2):
            batch = history.begin(cohort, started="2026-01-01", label="l", tool_version="1")
            for _ in range(2):
                history.add(
                    batch,
                    PerfRun(e2e_ms=10.0, stages_ms={"denoise": 8.0}, denoise_step_ms={"0": 4.0}),
                )
            history.finish(batch, baseline=1)
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = DELETE")  # all in one file


def _seed_experiment(folder: Path) -> None:
    from truestep.experiment.planning import parse_matrix, pinned_cases, planned_cases
    from truestep.experiment.records import ARMS, Failure, Plan, Sameness, Sample
    from truestep.experiment.store import Store

    (cell,) = parse_matrix([])
    cases = planned_cases(pinned_cases("builtin:digits", most=1))
    plan = Plan(
        cases=cases,
        cells=(cell,),
        candidate={"guidance_scale": "3.5"},
        rounds=2,
        most_rounds=2,
        margin=0.05,
    )
    store = Store(folder / "e")
    store.begin(plan, resume=False)
    store.write_environment({"device.name": "cpu"})
    for number in range(2):
        for place, arm in enumerate((*ARMS, *ARMS)):
            store.append(
                cell,
                Sample(
                    arm=arm,
                    case=cases[0].name,
                    round=number,
                    session=0,
                    place=place,
                    seconds=1.0 + place / 10,
                    stages_s={"step": (0.5, 0.5)},
                    forwards=4,
                    latent="a",
                    frames="b",
                ),
            )
    store.append(cell, Failure(arm="candidate", doing="loading", text="ValueError: no"))
    store.save_check(cell, Sameness(case=cases[0].name, psnr_db=30.0, ssim_worst=0.9))
    for arm in ARMS:
        frames = {"video/frames": torch.zeros(1, 3, 1, 8, 8), "latent/final": torch.ones(1, 2)}
        store.save_tensors(cell, arm, cases[0].name, frames)


def _spool(target: Path, level: Level) -> Spool:
    """A spool with every tensor of a small trace."""
    from truestep.recording.spool import Blob, Spool

    head = _manifest({}, level).model_dump(mode="json", exclude={"tensors"})
    spool = Spool(target, head=head, level=level)
    for order, (name, tensor) in enumerate(_module_tensors().items()):
        if tensor.dtype is not torch.float32:
            continue
        _, fqn, step, branch, _ = name.split("/")
        shape = tuple(tensor.shape)
        stored = [tensor] if level == "full" else [moments(tensor), sketch(tensor)]
        blobs = [
            Blob(str(t.dtype).removeprefix("torch."), tuple(t.shape), t.numpy().tobytes())
            for t in stored
        ]
        spool.add((name, order, "float32", shape, int(step), branch, fqn, 0), blobs)
    return spool


def _seed_spool(folder: Path) -> None:
    spool = _spool(folder / "s" / "t.safetensors", "full")
    spool.flush()
    # As if its process were gone.
    spool.folder.rename(spool.folder.with_name("t.safetensors.4194305.spool"))


def _seed_thresholds(folder: Path) -> None:
    case = {"clip_threshold": 0.5, "ssim_threshold": 0.9, "psnr_threshold": 20, "truestep": {}}
    data = {"cases": {"one": case, "two": {"mean_abs_diff_threshold": 8.0}}}
    data["default_ssim_threshold_video"] = 0.9  # type: ignore[assignment]
    (folder / "t.json").write_text(json.dumps(data), "utf-8")


def _seed_perf(folder: Path) -> None:
    scenario = {
        "stages_ms": {"DenoisingStage": 900.0, "DecodingStage": 90.0},
        "denoise_step_ms": {"0": 450.0, "1": 450.0},
        "expected_e2e_ms": 1000.0,
        "expected_avg_denoise_ms": 450.0,
        "expected_median_denoise_ms": 450.0,
        "runtime_peak_vram_mb": 100,
    }
    data: Any = {"metadata": {"model": "m", "hardware": "h"}, "scenarios": {"a": scenario}}
    (folder / "s.json").write_text(json.dumps(data), "utf-8")
    data = [
        {
            "benchmark_id": "b",
            "avg_generation_time_s": 1.5,
            "individual_times_s": [1.4, 1.6],
            "max_peak_memory_mb": 100.0,
            "individual_peak_memories_mb": [90.0, 100.0],
            "device": "d",
            "timestamp": "2026-01-01",
            "dit_time_s": 1.0,
        }
    ]
    (folder / "f.json").write_text(json.dumps(data), "utf-8")


def _seed_model(folder: Path) -> None:
    model = folder / "m"
    for part in ("transformer", "vae"):
        (model / part).mkdir(parents=True)
        (model / part / "config.json").write_text('{"_class_name": "X", "dim": 4}', "utf-8")
        save_file({"w": torch.ones(2)}, model / part / "model.safetensors")
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": "0.36",
        "transformer": ["diffusers", "X"],
        "vae": ["diffusers", "X"],
        "transformer_2": [None, None],
    }
    (model / "model_index.json").write_text(json.dumps(index), "utf-8")


def _seed_index(folder: Path) -> None:
    data = {"metadata": {"total_size": 12}, "weight_map": {"a": "1.safetensors", "b": "2.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(data), "utf-8")


def _seed_latent(folder: Path) -> None:
    latent = {"latent_tensor": torch.arange(64.0).reshape(1, 4, 4, 4)}
    mark = {"latent_format_version_0": torch.tensor([])}
    save_file(latent | mark, folder / "new.latent", metadata={"prompt": "{}"})
    save_file(latent, folder / "old.latent")


def _seed_activations(folder: Path) -> None:
    known = {"abs_mean": 0.5, "sum": 2.0, "max": 1.0, "shape": [1, 4], "dtype": "torch.bfloat16"}
    records = [
        {"module": f"blocks.{i}", "tensor": f"out[{i}]", "step": step, **known}
        for step in (None, 0, 1)
        for i in range(2)
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def _seed_trajectory(folder: Path) -> None:
    latents, times = torch.arange(96.0).reshape(1, 3, 2, 4, 4), torch.arange(3.0)
    after = {"trajectory_latents": latents, "trajectory_timesteps": times}
    torch.save(after, folder / "after.pt")
    torch.save({"latents": latents, "timesteps": times, "sigmas": times}, folder / "before.pt")
    dump = {"value": [latents, {"a": times}], "meta": {"name": "q", "rank": 0, "step": 1}}
    torch.save(dump, folder / "dump.pt")


def _seed_dumps(folder: Path) -> None:
    for name in ("one", "two"):
        (folder / name).mkdir()
        for index in range(2):
            content = {"value": torch.arange(4.0) + index, "meta": {"name": "q", "step": 0}}
            torch.save(content, folder / name / f"step=0___dump_index={index}___name=q.pt")
        torch.save({"x": torch.arange(3.0)}, folder / name / "Pass00000.pt")


def _seed_answers(folder: Path) -> None:
    from truestep.serving.answers import write
    from truestep.serving.judging import Answers
    from truestep.serving.plan import Ask, Plan

    plan = Plan("image", Ask("a fox", steps=2, width=16, height=16), repeats=2, seeds=1)
    pictures = {
        name: torch.full((1, ask.height, ask.width, 3), 7, dtype=torch.uint8)
        for name, ask in plan.asks().items()
    }
    write(folder / "a.safetensors", plan, Answers("x", pictures))


def _use_answers(path: Path, good: Path) -> None:
    from truestep.serving.answers import read
    from truestep.serving.judging import judge

    plan, answers = read(path)
    same, trusted = read(good)
    judge(plan, answers).to_json()
    if plan == same:
        judge(plan, answers, trusted, benign=[answers]).to_json()
    _shown(path)


def _seed_any(folder: Path) -> None:
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 50)
    (folder / "a.model").write_bytes(b"\x08\x07\x12\x07pytorch" + b"\0" * 20)
    (folder / "a.gguf").write_bytes(b"GGUF\3\0\0\0" + b"\0" * 50)
    (folder / "a.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + b"\0" * 50)
    (folder / "a.wav").write_bytes(b"RIFF\x24\0\0\0WAVEfmt " + b"\0" * 50)
    (folder / "a.txt").write_text("hello\n", "utf-8")


_LEDGER_LIKE = {".toml": _text}

KINDS: dict[str, Kind] = {
    "recording": Kind(_seed_recordings, {"": _recording}, _use_recording),
    "trace": Kind(_seed_traces, {"": _recording}, _use_trace),
    "packed": Kind(_seed_packed, {"": _packed}, _use_trace),
    "sketch": Kind(_seed_sketches, {"": _recording}, _use_recording),
    "safetensors": Kind(_seed_plain, {"": mutate.safetensors}, _use_weights),
    "npy": Kind(_seed_npy, {"": _numpy}, _use_tensors),
    "npz": Kind(_seed_npz, {"": _zipped}, _use_tensors),
    "gguf": Kind(_seed_gguf, {"": mutate.raw}, _use_weights),
    "pt": Kind(_seed_pt, {"": _zipped}, _use_weights),
    "bundle": Kind(_seed_bundle, {"": _zipped}, _use_bundle),
    "latent": Kind(_seed_latent, {"": mutate.safetensors}, _use_tensors),
    "activations": Kind(_seed_activations, {"": _lines}, _use_tensors),
    "trajectory": Kind(_seed_trajectory, {"": _zipped}, _use_tensors),
    "dumps": Kind(_seed_dumps, {"": _zipped}, _use_tensors),
    "answers": Kind(_seed_answers, {"": mutate.safetensors}, _use_answers),
    "onnx": Kind(_seed_onnx, {"": mutate.raw}, _use_state),
    "hdf5": Kind(_seed_hdf5, {"": mutate.raw}, _use_state),
    "lock": Kind(_seed_lock, {"": _json}, _use_lock),
    "cases": Kind(_seed_cases, _LEDGER_LIKE, _use_cases),
    "known": Kind(_seed_known, _LEDGER_LIKE, _use_known),
    "rename": Kind(_seed_rename, _LEDGER_LIKE, _use_rename),
    "parity": Kind(_seed_parity, _LEDGER_LIKE, _use_parity),
    "packet": Kind(_seed_packet, _LEDGER_LIKE, _use_packet),
    "history": Kind(_seed_history, {"": mutate.raw}, _use_history),
    "history-rows": Kind(_seed_history, {"": mutate.sqlite}, _use_history),
    "experiment": Kind(
        _seed_experiment,
        {".jsonl": _lines, ".json": _json, ".safetensors": mutate.safetensors},
        _use_experiment,
    ),
    "spool": Kind(_seed_spool, {".jsonl": _lines, "": mutate.raw}, _use_spool),
    "thresholds": Kind(_seed_thresholds, {"": _json}, _use_thresholds),
    "perf": Kind(_seed_perf, {"": _json}, _use_perf),
    "model": Kind(_seed_model, {".json": _json, ".safetensors": mutate.safetensors}, _use_model),
    "index": Kind(_seed_index, {"": _json}, _use_any),
    "other": Kind(_seed_any, {"": mutate.raw}, _use_any),
}

MAIN = ("recording", "trace", "packed", "sketch")
"""Kinds of which most mutants are made."""
