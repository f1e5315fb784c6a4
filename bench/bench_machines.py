"""References recorded under one instruction set and checked under another.

    python -m bench.bench_machines [--subject NAME] [--dtype DTYPE] [--draws N] [--faults N]

What a processor can do is limited by variables that libraries read as they start, so that each side
is a process of its own. An unchanged model that does not pass is an alarm; a fault of the corpus
that does, of a true size of 1e-5 or more as `bench/results/verdict.jsonl.gz` has it, is missed. The
hardest faults are tried: those of the least size. One JSON line a check goes to `--output`, and
what is there already is not run again. Exit 1 where there is an alarm or a miss.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from bench.faults import subjects as corpus
from bench.faults.draws import DRAWS, Draw
from bench.faults.registry import FAULTS, NotApplicable
from truestep.calls.instructions import AVX2, LIMITS, OLDEST
from truestep.engines import pipelines
from truestep.recording.format import Recording
from truestep.replay.check import check_pipeline
from truestep.replay.functions import check_function, record_function
from truestep.replay.record import record_pipeline
from truestep.runtime.loading import quiet
from truestep.verdict import Comparison

SETS: Mapping[str, Mapping[str, str]] = {
    "all": {},
    "avx2": AVX2,
    "sse": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
    "oldest": OLDEST,
}
"""Variables by set, widest first; `all` is whatever the processor can do."""

LEAST = 1e-5
"""True size of the smallest fault that must be caught."""

EXAMPLES = Path(__file__).parents[1] / "examples" / "parity"


@dataclass(frozen=True)
class Silero:
    """A published TorchScript detector as a function; its ONNX port is the candidate beside it."""

    name: str = "silero"
    kind: str = "function"
    dtypes: tuple[str, ...] = ("float32",)

    def load(self, draw: Draw, dtype: str) -> Any:
        """Both implementations."""
        from truestep.parity.session import parity_of

        parity = parity_of(EXAMPLES / "silero" / "test_parity_silero_vad.py")
        return SimpleNamespace(official=parity.official(), port=parity.port(), parity=parity)

    def record(self, model: Any, draw: Draw, dtype: str) -> Recording:
        """The TorchScript module over a second and a half of sound."""
        inputs = model.parity.inputs(torch.Generator("cpu").manual_seed(draw.seed))
        return record_function(model.official.call, [inputs])

    def check(self, model: Any, recording: Recording, draw: Draw, dtype: str) -> Comparison:
        """The same module again; if it passes, the port."""
        same = check_function(model.official.call, recording)
        return same if not same.verdict.passed else check_function(model.port.call, recording)


@dataclass(frozen=True)
class Plain:
    """A tiny pipeline of a diffusers class, cut into its calls; no faults are planted."""

    models: ClassVar[Path] = Path("machines") / "models"

    name: str
    kind: str = "plain"
    dtypes: tuple[str, ...] = ("float32", "bfloat16")

    def load(self, draw: Draw, dtype: str) -> Any:
        """From the folder that the first process wrote."""
        from diffusers import DiffusionPipeline

        with quiet():
            pipe = DiffusionPipeline.from_pretrained(self.folder(draw), dtype=getattr(torch, dtype))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def folder(self, draw: Draw) -> Path:
        """Where its models are, one for each seed."""
        return self.models / f"{self.name}-{draw.seed}"

    def build(self, draw: Draw) -> None:
        """Write its model."""
        from truestep.testing import tiny

        folder = self.folder(draw)
        if not folder.exists():
            with quiet():
                tiny.save(self.name, folder, seed=draw.seed)

    def record(self, model: Any, draw: Draw, dtype: str) -> Recording:
        """Called with example arguments, which the recording keeps."""
        from truestep.testing import tiny

        call = tiny.example_call(self.name, seed=draw.seed)
        return pipelines.record_pipeline(model, call, floor="steps").recording

    def check(self, model: Any, recording: Recording, draw: Draw, dtype: str) -> Comparison:
        """Called with the recorded arguments."""
        reference = pipelines.opened(recording)
        call = pipelines.recorded_arguments(reference)
        return pipelines.check_pipeline(model, reference, call, pipelines.Judging())


PLAIN = tuple(
    Plain(f"{name}Pipeline")
    for name in (
        "Flux",
        "StableDiffusion3",
        "StableDiffusionXL",
        "StableDiffusionControlNet",
        "QwenImage",
        "ZImage",
        "Sana",
        "PixArtSigma",
        "CogVideoX",
        "HunyuanVideo",
        "WanImageToVideo",
        "LTX2",
        "AudioLDM2",
    )
)


@dataclass(frozen=True)
class Stages:
    """A subject of the corpus at depth `steps`."""

    subject: Any

    @property
    def name(self) -> str:
        """As in tables."""
        return str(self.subject.name)

    @property
    def kind(self) -> str:
        """Which entries of the corpus apply."""
        return str(self.subject.kind)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Working precisions."""
        found: tuple[str, ...] = self.subject.dtypes
        return found

    def load(self, draw: Draw, dtype: str) -> Any:
        """A fresh model."""
        return self.subject.load(draw, dtype)

    def record(self, model: Any, draw: Draw, dtype: str) -> Recording:
        """A reference with the floor of its stages."""
        if self.kind == "module":
            found: Recording = self.subject.record(model, draw, dtype)
            return found
        return record_pipeline(model, case=self.subject.case(draw, dtype))

    def check(self, model: Any, recording: Recording, draw: Draw, dtype: str) -> Comparison:
        """The verdict."""
        if self.kind == "module":
            found: Comparison = self.subject.check(model, recording, draw, dtype, "steps")
            return found
        return check_pipeline(model, recording, case=self.subject.case(draw, dtype))


def main() -> None:
    options = _options()
    if options.role:
        _child(options)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    _build(options)
    for own in options.sets:
        _run("record", own, own, options)
        for other in options.sets:
            if other != own:
                _run("check", other, own, options)
    sys.exit(_told(_rows(options.output)))


def _options() -> Any:
    parser = argparse.ArgumentParser(description="Check references across instruction sets.")
    parser.add_argument("--subject", action="append", default=[])
    parser.add_argument("--dtype")
    parser.add_argument("--draws", type=int, default=2, help="only the first so many")
    parser.add_argument("--faults", type=int, default=20, help="the smallest so many a reference")
    parser.add_argument("--sets", nargs="+", default=available(), choices=list(SETS))
    parser.add_argument("--output", type=Path, default=Path("machines"))
    parser.add_argument("--role", choices=["record", "check"], help=argparse.SUPPRESS)
    parser.add_argument("--of", help=argparse.SUPPRESS)
    return parser.parse_args()


def available() -> list[str]:
    """Sets that differ on this processor."""
    widest = torch.backends.cpu.get_cpu_capability()
    return [name for name in SETS if name != "avx2" or widest not in ("DEFAULT", "AVX2")]


def environment(name: str) -> dict[str, str]:
    """This process's variables, limited to a set."""
    return {k: v for k, v in os.environ.items() if k not in LIMITS} | dict(SETS[name])


def _run(role: str, under: str, of: str, options: Any) -> None:
    """One side of the comparison, in a process that is limited to a set."""
    arguments = [word for name in options.subject for word in ("--subject", name)]
    arguments += ["--dtype", options.dtype] if options.dtype else []
    for key in ("draws", "faults", "output"):
        arguments += [f"--{key}", str(getattr(options, key))]
    done = subprocess.run(
        [sys.executable, "-m", "bench.bench_machines", *arguments, "--role", role, "--of", of],
        env={**environment(under), "TRUESTEP_BENCH_SET": under},
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{role} under {under} ended with {done.returncode}")


def _child(options: Any) -> None:
    torch.set_num_threads(1)
    _share(options.output)
    for subject, dtype, draw in _references(options):
        try:
            model = subject.load(draw, dtype)
        except (ImportError, NotApplicable) as error:
            print(f"{subject.name}: {error}", file=sys.stderr)
            continue
        where = _place(options, subject.name, dtype, draw)
        if options.role == "record":
            if not where.exists():
                where.parent.mkdir(parents=True, exist_ok=True)
                subject.record(model, draw, dtype).save(where)
        else:
            _checked(options, subject, dtype, draw, Recording.open(where))


def _checked(options: Any, subject: Any, dtype: str, draw: Draw, recording: Recording) -> None:
    path, under = options.output / "machines.jsonl", os.environ["TRUESTEP_BENCH_SET"]
    done = {_key(row) for row in _rows(options.output)}
    for entry, size in ({"": 0.0} | hardest(subject.name, dtype, draw, options.faults)).items():
        row: dict[str, Any] = {
            "subject": subject.name,
            "dtype": dtype,
            "draw": draw.name,
            "recorded": options.of,
            "checked": under,
            "entry": entry,
            "size": size,
        }
        if _key(row) in done:
            continue
        torch.manual_seed(0)
        model = subject.load(draw, dtype)
        try:
            model = (FAULTS[entry].apply(model) or model) if entry else model
            result = subject.check(model, recording, draw, dtype)
        except NotApplicable:
            continue
        worst = max(
            (r for r in result.rows if r.ratio is not None), key=lambda r: r.ratio, default=None
        )
        row |= {
            "verdict": result.verdict.value,
            "worst": worst.ratio if worst else 0.0,
            "tensor": worst.name if worst else "",
            "metric": worst.ratio_metric if worst else "",
        }
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(_line(row), file=sys.stderr, flush=True)


def _references(options: Any) -> Iterator[tuple[Any, str, Draw]]:
    every = [*(Stages(subject) for subject in corpus.SUBJECTS), Silero(), *PLAIN]
    for subject in every:
        if options.subject and subject.name not in options.subject:
            continue
        for dtype in subject.dtypes:
            if options.dtype in (None, dtype):
                for draw in DRAWS[: options.draws]:
                    yield subject, dtype, draw


def _place(options: Any, name: str, dtype: str, draw: Draw) -> Path:
    file = f"{name}-{dtype}-{draw.name.replace('/', '_').replace(' ', '-')}.safetensors"
    found: Path = options.output / options.of / file
    return found


def hardest(subject: str, dtype: str, draw: Draw, count: int) -> dict[str, float]:
    """The faults of the least true size of `LEAST` or more, with it."""
    found = {
        row["entry"]: float(row["effect"])
        for row in _known()
        if (row["subject"], row["dtype"], row["draw"]) == (subject, dtype, draw.name)
        and row["family"] != "benign"
        and not row.get("not_applicable")
        and row["entry"] in FAULTS
        and float(row["effect"]) >= LEAST
    }
    return dict(sorted(found.items(), key=lambda item: item[1])[:count])


@cache
def _known() -> list[dict[str, Any]]:
    path = Path(__file__).parent / "results" / "verdict.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _build(options: Any) -> None:
    """Make the tiny models once: random weights differ between instruction sets, too."""
    _share(options.output)
    for subject, dtype, draw in _references(options):
        if subject.kind in ("wan", "ltx2"):
            subject.subject.case(draw, dtype)
        elif subject.kind == "plain":
            subject.build(draw)


def _share(output: Path) -> None:
    """Have every process use the models and pictures of the first."""
    original, picture = corpus._tiny, corpus._picture
    Plain.models = output.resolve() / "models"

    def kept(name: str, make: Callable[[], str]) -> str:
        note = output.resolve() / "models" / f"{name}.txt"
        if not note.exists():
            note.parent.mkdir(parents=True, exist_ok=True)
            corpus._folder = lambda kind: _made(note.parent / f"{name}-{kind}")
            note.write_text(make(), "utf-8")
        return note.read_text("utf-8")

    corpus._tiny = cache(lambda kind: kept(kind, lambda: original(kind)))  # type: ignore[assignment]
    corpus._picture = cache(lambda: kept("picture", picture))  # type: ignore[assignment]


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _rows(output: Path) -> list[dict[str, Any]]:
    path = output / "machines.jsonl"
    return [json.loads(line) for line in path.open(encoding="utf-8")] if path.exists() else []


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    keys = ("subject", "dtype", "draw", "recorded", "checked", "entry")
    return tuple(str(row[key]) for key in keys)


def _line(row: Mapping[str, Any]) -> str:
    sides = f"{row['recorded']} -> {row['checked']}"
    head = f"{row['subject']:15s} {row['dtype']:8s} {sides:16s} {row['entry'] or '(unchanged)':28s}"
    return f"{head} {row['size']:8.1e} {row['verdict']:12s} {row['worst']:.2g} x {row['tensor']}"


def _told(rows: list[dict[str, Any]]) -> int:
    """Say what was found; 1 where there is an alarm or a miss."""
    passed = {"identical", "equivalent"}
    plain = [row for row in rows if not row["entry"]]
    alarms = [row for row in plain if row["verdict"] not in passed]
    faults = [row for row in rows if row["entry"]]
    missed = [row for row in faults if row["verdict"] in passed]
    for row in (*alarms, *missed):
        print(_line(row))
    references = {(row["subject"], row["dtype"], row["draw"], row["recorded"]) for row in plain}
    highest = max((row["worst"] for row in plain), default=0.0)
    print(
        f"{len(references)} references, {len(plain)} checks under another instruction set: "
        f"{len(alarms)} alarms, at most {highest:.2f} x the floor; "
        f"{len(faults)} faults of {LEAST:g} or more: {len(missed)} missed"
    )
    return 1 if alarms or missed or not plain else 0


if __name__ == "__main__":
    main()
