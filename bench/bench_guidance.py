"""Guidance plans and text attention on diffusers' own pipelines, as a multiple of the stock time.

Every sample is a whole call of `WanPipeline` or `CosmosTextToWorldPipeline` (no text encoder,
latent output) with random weights and 512 channels, paired in one process with the same call
inside `accelerate`. One thread: the time is that of the processor, which other work on the machine
does not add to; wall time is kept beside it. Cells that were measured before are kept; asked for
again, they are measured anew.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.common import emit
from truestep.experiment.statistics import interval
from truestep.runtime.accelerate import accelerate

RESULTS = Path(__file__).parent / "results"
ALL = "batched, collapsed, cache"
PLANS: dict[str, dict[str, Any]] = {
    "off (A/A)": {},
    "text cache": {"text_cache": True},
    "collapsed": {"text": "collapsed"},
    "batched": {"cfg": "batched"},
    ALL: {"cfg": "batched", "text": "collapsed", "text_cache": True},
}
SIZES = {256: (1, 32, 32), 1024: (4, 32, 32), 4096: (4, 64, 64), 8192: (8, 64, 64)}
"""Video tokens to latent frames, height and width; a patch is 1 x 2 x 2."""
STEPS = {256: 8, 1024: 4, 4096: 2, 8192: 2}
TEXTS = (8, 20, 128, 512)
LENGTH = 512
TEXT_CHANNELS = 128


class Unchecked:
    """What diffusers' Cosmos pipeline insists on; without prompts and frames it is not asked."""

    def to(self, device: object) -> Unchecked:
        return self


def wan(folder: Path) -> Any:
    """diffusers' Wan pipeline around a transformer of 512 channels."""
    import diffusers

    from bench.faults.tiny import build_tiny_wan

    pipe = diffusers.WanPipeline.from_pretrained(build_tiny_wan(folder / "wan", "wan21"))
    torch.manual_seed(0)
    pipe.transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=8,
        attention_head_dim=64,
        ffn_dim=1536,
        num_layers=2,
        in_channels=pipe.transformer.config.in_channels,
        out_channels=pipe.transformer.config.in_channels,
        text_dim=TEXT_CHANNELS,
        freq_dim=64,
        patch_size=(1, 2, 2),
        rope_max_seq_len=64,
        qk_norm="rms_norm_across_heads",
        cross_attn_norm=True,
    ).eval()
    return pipe


def cosmos(folder: Path) -> Any:
    """diffusers' Cosmos pipeline around a transformer of the same width, depth and patches."""
    import diffusers

    from bench.faults.tiny import build_tiny_cosmos

    pipe = diffusers.CosmosTextToWorldPipeline.from_pretrained(
        build_tiny_cosmos(folder / "cosmos"), safety_checker=Unchecked()
    )
    torch.manual_seed(0)
    pipe.transformer = diffusers.CosmosTransformer3DModel(
        num_attention_heads=8,
        attention_head_dim=64,
        mlp_ratio=3.0,
        num_layers=2,
        in_channels=pipe.transformer.config.in_channels,
        out_channels=pipe.transformer.config.in_channels,
        text_embed_dim=TEXT_CHANNELS,
        adaln_lora_dim=64,
        max_size=(16, 64, 64),
        concat_padding_mask=False,
    ).eval()
    return pipe


MODELS: dict[str, Callable[[Path], Any]] = {"wan": wan, "cosmos": cosmos}
FACTORS: dict[str, Callable[[Any], tuple[int, int]]] = {
    "wan": lambda pipe: (pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial),
    "cosmos": lambda pipe: (
        pipe.vae.config.temporal_compression_ratio,
        pipe.vae.config.spatial_compression_ratio,
    ),
}
"""Frames and pixels to one place of the latent."""


def call(pipe: Any, model: str, tokens: int, words: int) -> Callable[[], torch.Tensor]:
    """A whole call of the pipeline: a text of `words` rows, an empty negative one of 1 row."""
    generator = torch.Generator().manual_seed(1)
    texts = torch.zeros(2, 1, LENGTH, TEXT_CHANNELS)
    texts[0, :, :words] = torch.randn(1, words, TEXT_CHANNELS, generator=generator)
    texts[1, :, :1] = torch.randn(1, 1, TEXT_CHANNELS, generator=generator)
    frames, height, width = SIZES[tokens]
    temporal, spatial = FACTORS[model](pipe)
    shape = (1, pipe.transformer.config.in_channels, frames, height, width)
    given = {
        "prompt_embeds": texts[0],
        "negative_prompt_embeds": texts[1],
        "latents": torch.randn(shape, generator=generator),
        "num_inference_steps": STEPS[tokens],
        "guidance_scale": 5.0,
        "height": height * spatial,
        "width": width * spatial,
        "num_frames": (frames - 1) * temporal + 1,
        "max_sequence_length": LENGTH,
        "output_type": "latent",
    }

    def run() -> torch.Tensor:
        made: torch.Tensor = pipe(**given).frames
        return made

    return run


Times = tuple[float, float]


def now() -> Times:
    """Processor time of this process, and wall time."""
    return time.process_time(), time.perf_counter()


def cell(
    pipe: Any, model: str, tokens: int, words: int, *, rounds: int, plans: list[str]
) -> list[dict[str, Any]]:
    """Plans at one size, in turn, forwards and backwards; a first run of each is not counted."""
    run = call(pipe, model, tokens, words)
    plain = run()
    apart: dict[str, float] = {}

    def planned(name: str) -> None:
        with accelerate(pipe, **PLANS[name]) as done:
            made = run()
        apart[name] = float((made - plain).norm() / plain.norm())
        assert not done.reasons or words == LENGTH, done.reasons

    for name in plans:
        planned(name)
    samples: dict[str, list[tuple[Times, Times]]] = {name: [] for name in plans}
    for index in range(rounds):
        for name in plans[:: 1 if index % 2 else -1]:
            pair = []
            for arm in ("stock", name) if index % 2 else (name, "stock"):
                start = now()
                if arm == "stock":
                    run()
                else:
                    planned(name)
                pair.append((now()[0] - start[0], now()[1] - start[1]))
            stock, own = pair if index % 2 else pair[::-1]
            samples[name].append((stock, own))
    rows = []
    for name, pairs in samples.items():
        rows.append(
            {
                "model": model,
                "tokens": tokens,
                "text": words,
                "plan": name,
                "rel_l2": apart[name],
                "cpu_s": [[round(times[0], 4) for times in pair] for pair in pairs],
                "wall_s": [[round(times[1], 4) for times in pair] for pair in pairs],
            }
        )
        emit("guidance", **rows[-1], shown=shown(rows[-1]))
    return rows


def shown(row: dict[str, Any]) -> str:
    """Median ratio and its interval; the whole range where the pairs are too few for one."""
    ratios = [own / stock for stock, own in row.get("cpu_s") or row["wall_s"]]
    found = interval(ratios)
    low, high = (found.low, found.high) if found.low > 0 else (min(ratios), max(ratios))
    mark = ("" if found.low > 0 else "*") + ("" if "cpu_s" in row else "†")
    return f"{found.ratio:.2f} ({low:.2f} to {high:.2f}){mark}"


def table(rows: list[dict[str, Any]]) -> str:
    """One line a size, one column a plan: median ratio to the stock pipeline."""
    lines = [
        "# Guidance plans against the stock pipeline",
        "",
        "Time of a whole call of diffusers' `WanPipeline` or `CosmosTextToWorldPipeline` (random "
        f"weights, 512 channels, two blocks, text padded to {LENGTH}, float32, one CPU thread; 2 "
        "to 8 guided steps) as a multiple of the same call without `accelerate`, paired in one "
        "process: processor time, on two shared cores of a virtual machine. Median of the paired "
        "ratios and its 99 % interval (sign test). Below 1 is faster; `off` is the same code "
        "twice. *: fewer than 8 pairs, so the whole range. †: wall time.",
        "",
        "| model | video tokens | text tokens | pairs | "
        + " | ".join(PLANS)
        + " | largest rel. L2 |",
        "|---|---|---|---|" + "---|" * (len(PLANS) + 1),
    ]
    for key in dict.fromkeys(place(row) for row in rows):
        own = {row["plan"]: row for row in rows if place(row) == key}
        cells = [shown(own[plan]) if plan in own else "" for plan in PLANS]
        pairs = len(own[ALL]["wall_s"])
        worst = max(row["rel_l2"] for row in own.values())
        name, tokens, text = key
        lines.append(
            f"| {name} | {tokens} | {text} | {pairs} | {' | '.join(cells)} | {worst:.1e} |"
        )
    return "\n".join([*lines, ""])


def place(row: dict[str, Any]) -> tuple[str, int, int]:
    """Model, video tokens and text tokens of a result."""
    return row["model"], row["tokens"], row["text"]


def stored() -> list[dict[str, Any]]:
    """Results so far."""
    path = RESULTS / "guidance.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else []


def store(rows: list[dict[str, Any]]) -> None:
    """Write results and table."""
    rows = sorted(rows, key=lambda r: (list(MODELS).index(r["model"]), r["tokens"], r["text"]))
    (RESULTS / "guidance.md").write_text(table(rows), "utf-8")
    lines = ",\n".join(json.dumps(row) for row in rows)
    (RESULTS / "guidance.json").write_text(f"[\n{lines}\n]\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tokens", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--text", type=int, nargs="*", default=list(TEXTS))
    parser.add_argument("--plan", nargs="*", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--table", action="store_true", help="only write the table anew")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.table:
        store(stored())
        return
    with tempfile.TemporaryDirectory() as folder:
        for model in options.model:
            pipe = MODELS[model](Path(folder))
            pipe.set_progress_bar_config(disable=True)
            for tokens in options.tokens:
                for text in options.text:
                    made = cell(
                        pipe, model, tokens, text, rounds=options.rounds, plans=options.plan
                    )
                    new = {(place(row), row["plan"]) for row in made}
                    store([r for r in stored() if (place(r), r["plan"]) not in new] + made)
    print(table(stored()), file=sys.stderr)


if __name__ == "__main__":
    main()
