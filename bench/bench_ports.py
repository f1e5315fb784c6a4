"""Forty correct ports, judged as engines: how many are accused, and of what.

    python -m bench.bench_ports [--only NAME] [--output FOLDER]

Each is recorded in this process as `truestep engine run --depth modules` does it, and judged by
`truestep engine check --depth modules` against the model that it was made of. Three questions a
port: is it accused; is a module of it accused where it is opened without need; and, with one weight
made half as large again, is that module named. Rows go to ports.jsonl, and the table to ports.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import truestep
from bench.common import RESULTS, quiet, read
from truestep.engines import inner
from truestep.engines.assembling import left_by, targets, write
from truestep.engines.named import run_of
from truestep.engines.ordered import check_run
from truestep.engines.run import Run
from truestep.engines.watch.request import Looked, Request
from truestep.engines.watch.watcher import Watcher
from truestep.testing import corpus, tiny
from truestep.testing.corpus.editing import denoiser
from truestep.testing.corpus.porting import PORTS
from truestep.verdict import Comparison, Verdict

FAMILIES = (
    "flux",
    "qwen",
    "sd3",
    "wan-i2v",
    "mochi",
    "z-image",
    "sana",
    "hunyuan",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "AuraFlowPipeline",
    "LTXPipeline",
)
"""Of the corpus, or classes of diffusers."""

MORE = ("lumina2", "pixart", "cogvideox-i2v", "ltx-i2v")
"""Of these a seam cannot be judged yet: guidance that keeps the norm, a variance that is predicted
with the noise, tables of angles that the pipeline gives, a first frame that is kept."""

LOOPS = (
    "call",
    "lists",
    "reversed batch",
    "batch",
    "time of 0 to 1",
    "denoised",
    "other sign",
    "lists, denoised",
    "reversed batch, time of 0 to 1",
    "positional",
)
"""How an engine's own loop on Wan calls its model, and what that returns."""

FAULT = 1.5
STRONG = ("to_out.0", "net.2", "to_v", "linear_2", "fc2", "proj_out")
"""Ends of names of layers whose weights show in what a tiny random model gives."""


@dataclass(frozen=True)
class Port:
    """One port.

    Attributes:
        family: Of the corpus; `wan` for those with a loop of their own.
        port: What its modules have otherwise.
        loop: Of an engine; `pipeline` for that of diffusers.
    """

    family: str
    port: str
    loop: str = "pipeline"

    @property
    def name(self) -> str:
        """Unique."""
        return f"{self.family}, {self.port}, {self.loop}"


def ports() -> list[Port]:
    """All of them."""
    kinds = list(PORTS)
    found = [
        Port(family, kinds[(at + turn) % len(kinds)])
        for at, family in enumerate(FAMILIES)
        for turn in (0, 2)
    ]
    found += [Port(family, "everything") for family in (*FAMILIES[:6], *MORE)]
    found += [Port("wan", kinds[at % len(kinds)], loop) for at, loop in enumerate(LOOPS)]
    found += [Port("wan", kind) for kind in ("renamed", "exchanged names", "fused keys and values")]
    found += [Port("wan", "everything", "lists"), Port("wan", "norms by hand", "call")]
    found += [Port("wan", "fused keys and values", "other sign")]
    return list({port.name: port for port in found}.values())


@contextmanager
def watched(output: Path) -> Iterator[None]:
    """Record what runs in here as an engine's."""
    watcher = Watcher(Request(str(output), inside=Looked()))
    watcher.start()
    try:
        yield
    finally:
        watcher.stop()
        for left, target in targets(output, left_by(output)):
            write(left, target)


class Subject:
    """The trusted model of a family, its recording, and ports of it.

    Args:
        family: Of the corpus, a class of diffusers, or `wan`.
        place: Folder for what is written.
    """

    def __init__(self, family: str, place: Path) -> None:
        self.family, self.place = family, place
        self._subject = corpus.SUBJECTS.get(family)
        self.folder = place / "model"
        pipe = self.build()
        pipe.save_pretrained(str(self.folder))
        self.reference = place / "reference.safetensors"
        truestep.record(self.build(), call=self.call(), floor="none", path=self.reference)

    def build(self) -> Any:
        """A fresh pipeline, the same each time."""
        if self._subject is not None:
            return self._subject.build()
        pipe = tiny.pipeline("WanPipeline" if self.family == "wan" else self.family)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline."""
        if self._subject is not None:
            given = self._subject.inputs()
        elif self.family != "wan":
            given = tiny.example_call(self.family)
        else:
            dice = torch.Generator().manual_seed(0)
            texts = [torch.randn(1, 10, 32, generator=dice) for _ in range(2)]
            names = ("prompt_embeds", "negative_prompt_embeds")
            given = dict(zip(names, texts, strict=True))
            given["latents"] = torch.randn(1, 16, 3, 8, 8, generator=dice)
            given |= {"num_inference_steps": 3, "height": 64, "width": 64, "num_frames": 9}
        return {**given, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}

    def ran(self, port: Port, *, fault: bool) -> tuple[Run, str]:
        """A port's run, and the trusted name of the module that is wrong in it."""
        pipe = self.build()
        model = denoiser(pipe)
        wrong = planted(model) if fault else ""
        PORTS[port.port](model)
        output = self.place / f"{len(list(self.place.iterdir()))}.safetensors"
        with torch.no_grad(), watched(output):
            if port.loop == "pipeline":
                pipe(**self.call())
            else:
                generated(model, pipe.scheduler, self.call(), port.loop)
        return run_of(output), wrong


def planted(model: torch.nn.Module) -> str:
    """Make one weight of a layer in the middle larger; the name of that layer."""
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and any(part.isdecimal() for part in name.split("."))
    ]
    shown = [each for each in layers if each[0].endswith(STRONG) and "context" not in each[0]]
    layers = shown or layers
    name, layer = layers[len(layers) // 2]
    with torch.no_grad():
        layer.weight *= FAULT
    return name


class Called(torch.nn.Module):
    """An engine's model: other arguments, and another convention of what it returns."""

    def __init__(self, model: torch.nn.Module, loop: str) -> None:
        super().__init__()
        self.net, self.loop = model, loop
        self.sigma = 1.0

    def forward(self, x: Any, t: torch.Tensor, context: Any) -> Any:
        """x `b c f h w` or a list of `c f h w`."""
        lists = "lists" in self.loop
        latent, text = (torch.stack(x), torch.stack(context)) if lists else (x, context)
        time = t * 1000 if "0 to 1" in self.loop else t
        made = self.net(latent, time.expand(len(latent)), text, return_dict=False)[0]
        if "denoised" in self.loop:
            made = latent - self.sigma * made
        if "other sign" in self.loop:
            made = -made
        return list(made) if lists else made


class Euler:
    """Flow matching by Euler."""

    def set_timesteps(self, sigmas: torch.Tensor) -> None:
        """Take a schedule."""
        self.sigmas, self.timesteps = sigmas, sigmas[:-1] * 1000

    def step(self, velocity: torch.Tensor, number: int, latent: torch.Tensor) -> torch.Tensor:
        """The latent after a step."""
        return latent + (self.sigmas[number + 1] - self.sigmas[number]) * velocity


def generated(model: torch.nn.Module, scheduler: Any, call: dict[str, Any], loop: str) -> None:
    """One generation by an engine's own loop, with the pipeline's schedule."""
    steps, engine = Euler(), Called(model, loop)
    scheduler.set_timesteps(call["num_inference_steps"])
    steps.set_timesteps(scheduler.sigmas.clone())
    texts = [call["prompt_embeds"], call["negative_prompt_embeds"]]
    latent = call["latents"]
    for number, at in enumerate(steps.timesteps):
        engine.sigma = float(steps.sigmas[number])
        given = at[None] / (1000 if "0 to 1" in loop else 1)
        if "batch" in loop:
            order = [1, 0] if "reversed" in loop else [0, 1]
            both = engine(torch.cat([latent] * 2), given, torch.cat([texts[i] for i in order]))
            parts = both.chunk(2)
            cond, uncond = (parts[order.index(i)] for i in (0, 1))
        elif "lists" in loop:
            cond, uncond = (engine([latent[0]], given, [text[0]])[0][None] for text in texts)
        elif loop == "positional":
            cond, uncond = (engine(latent, given, text) for text in texts)
        else:
            cond, uncond = (engine(x=latent, t=given, context=text) for text in texts)
        guided = uncond + 5.0 * (cond - uncond)
        if "denoised" in loop:
            guided = (latent - guided) / engine.sigma
        if "other sign" in loop:
            guided = -guided
        latent = steps.step(guided, number, latent)


def judged(port: Port, subject: Subject) -> dict[str, Any]:
    """What is said of a port, right and with a fault."""
    began = time.perf_counter()
    known = run_of(subject.reference)

    def check(run: Run) -> Comparison:
        return check_run(run, subject.folder, reference=known, depth="modules")

    right, _ = subject.ran(port, fault=False)
    result = check(right)
    with mock.patch.object(inner, "FAILED", (Verdict.EQUIVALENT, Verdict.IDENTICAL)):
        opened = check(right)
    wrong, module = subject.ran(port, fault=True)
    found = check(wrong)
    place = found.first_divergence
    told = [note for note in opened.notes if note.startswith("no module named")]
    inside = next((n for n in opened.notes if "is wrong by itself" in n), "")
    if not inside and not told and opened.first_divergence is not None:
        inside = str(opened.first_divergence)
    return {
        "port": port.name,
        "verdict": result.verdict.value,
        "accused": result.sentence if result.verdict.exit_code == 1 else "",
        "why": "" if result.verdict.passed else result.sentence,
        "predictions": sum(row.stage == "prediction" for row in result.rows),
        "undecided": [row.name for row in result.rows if row.verdict is Verdict.INCONCLUSIVE],
        "opened": told[0] if told else "",
        "module accused": inside,
        "planted": module,
        "fault": found.verdict.value,
        "named": (place.fqn or place.name) if place else "",
        "kind": (place.kind or "") if place else "",
        "paired": next((n for n in found.notes if n.startswith("paired")), ""),
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> int:
    """Judge all that are not in the file yet, and write the table."""
    options = _options()
    torch.set_num_threads(1)
    quiet()
    path = options.output / "ports.jsonl"
    done = {row["port"] for row in read(path)}
    chosen = [p for p in ports() if p.name not in done and options.only in p.name]
    for family in dict.fromkeys(port.family for port in chosen):
        with tempfile.TemporaryDirectory() as folder:
            subject = Subject(family, Path(folder))
            for port in (p for p in chosen if p.family == family):
                row = tried(port, subject)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    rows = read(path)
    (options.output / "ports.md").write_text(table(rows), encoding="utf-8")
    return 0


def tried(port: Port, subject: Subject) -> dict[str, Any]:
    """A row, or what was raised: a port that cannot be judged is told, and counted."""
    try:
        return judged(port, subject)
    except Exception as error:
        return {"port": port.name, "error": f"{type(error).__name__}: {error}"[:400]}


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    whole = [row for row in rows if "error" not in row]
    accused = [row for row in whole if row["accused"]]
    modules = [row for row in whole if row["module accused"]]
    faults = [row for row in whole if row["fault"] == "drifted"]
    named = [row for row in whole if row["named"].partition("[")[0] == row["planted"]]
    open_ = [row for row in whole if not row["accused"] and row["why"]]
    lines = [
        "# Correct ports, judged as engines",
        "",
        f"{len(whole)} ports of tiny random models (float32, CPU), recorded with their modules and "
        "judged by the model that they were made of. "
        f"**{len(accused)} are accused.** Opened without need, a module of {len(modules)} is "
        f"accused. With one weight of each made half as large again {len(faults)} are `drifted`, "
        f"and of {len(named)} the very module is named first. Of {len(open_)} a seam cannot "
        f"be judged: they are `inconclusive`. {len(rows) - len(whole)} could not be run.",
        "",
        "| port | verdict | predictions | opened without need | with a fault | planted | named |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['port']} | {row['error']} | | | | | |")
            continue
        opened = row["module accused"] or "no module"
        cells = [row["port"], row["verdict"], str(row["predictions"]), opened, row["fault"]]
        lines.append(f"| {' | '.join(cells)} | `{row['planted']}` | `{row['named']}` |")
    return "\n".join(lines) + "\n"


def _options() -> Any:
    parser = argparse.ArgumentParser(description="Judge correct ports.")
    parser.add_argument("--only", default="", help="Ports with this in their name.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
