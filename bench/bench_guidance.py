"""Guidance plans and text attention on diffusers' own pipelines, as a multiple of the stock time.

Every sample is a whole call of `WanPipeline` (no text encoder, latent output) with random weights
and 512 channels, paired in one process with the same call inside `accelerate`. One thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.common import emit
from truestep.runtime.accelerate import accelerate

RESULTS = Path(__file__).parent / "results"
PLANS: dict[str, dict[str, Any]] = {
    "off (A/A)": {},
    "text cache": {"text_cache": True},
    "collapsed": {"text": "collapsed"},
    "batched": {"cfg": "batched"},
    "batched, collapsed, cache": {"cfg": "batched", "text": "collapsed", "text_cache": True},
}
SIZES = {256: (1, 32, 32), 1024: (4, 32, 32), 4096: (4, 64, 64), 8192: (8, 64, 64)}
"""Video tokens to latent frames, height and width; a patch is 1 x 2 x 2."""
STEPS = {256: 8, 1024: 4, 4096: 2, 8192: 2}
TEXTS = (8, 20, 128, 512)
LENGTH = 512


def pipeline(folder: Path) -> Any:
    """diffusers' pipeline around a transformer of 512 channels."""
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
        text_dim=128,
        freq_dim=64,
        patch_size=(1, 2, 2),
        rope_max_seq_len=64,
        qk_norm="rms_norm_across_heads",
        cross_attn_norm=True,
    ).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cell(pipe: Any, tokens: int, words: int, rounds: int) -> list[dict[str, Any]]:
    """All plans at one size, in turn, forwards and backwards."""
    generator = torch.Generator().manual_seed(1)
    texts = torch.zeros(2, 1, LENGTH, 128)
    texts[0, :, :words] = torch.randn(1, words, 128, generator=generator)
    texts[1, :, :1] = torch.randn(1, 1, 128, generator=generator)
    frames, height, width = SIZES[tokens]
    shape = (1, pipe.transformer.config.in_channels, frames, height, width)
    latents = torch.randn(shape, generator=generator)
    given = {
        "prompt_embeds": texts[0],
        "negative_prompt_embeds": texts[1],
        "latents": latents,
        "num_inference_steps": STEPS[tokens],
        "guidance_scale": 5.0,
        "height": height * pipe.vae_scale_factor_spatial,
        "width": width * pipe.vae_scale_factor_spatial,
        "num_frames": (frames - 1) * pipe.vae_scale_factor_temporal + 1,
        "max_sequence_length": LENGTH,
        "output_type": "latent",
    }

    def run() -> torch.Tensor:
        made: torch.Tensor = pipe(**given).frames
        return made

    plain = run()
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in PLANS}
    apart: dict[str, float] = {}
    for index in range(rounds):
        names = list(PLANS)[:: 1 if index % 2 else -1]
        for name in names:
            pair = []
            for arm in ("stock", name) if index % 2 else (name, "stock"):
                start = time.perf_counter()
                if arm == "stock":
                    run()
                else:
                    with accelerate(pipe, **PLANS[name]) as done:
                        made = run()
                    apart[name] = float((made - plain).norm() / plain.norm())
                    assert not done.reasons or words == LENGTH, done.reasons
                pair.append(time.perf_counter() - start)
            stock, own = pair if index % 2 else pair[::-1]
            samples[name].append((stock, own))
    rows = []
    for name, pairs in samples.items():
        ratios = sorted(own / stock for stock, own in pairs)
        rows.append(
            {
                "tokens": tokens,
                "text": words,
                "plan": name,
                "times_stock": round(statistics.median(ratios), 3),
                "low": round(ratios[len(ratios) // 8], 3),
                "high": round(ratios[-1 - len(ratios) // 8], 3),
                "rel_l2": apart[name],
                "samples_s": [[round(value, 4) for value in pair] for pair in pairs],
            }
        )
        emit("guidance", **rows[-1])
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """One line a size, one column a plan: median ratio to the stock pipeline."""
    lines = [
        "# Guidance plans against the stock pipeline",
        "",
        "Time of a whole `WanPipeline` call (random weights, 512 channels, two blocks, text padded "
        f"to {LENGTH}, float32, one CPU thread; 2 to 8 guided steps) as a multiple of the same "
        "call without `accelerate`, paired in one process: median (lowest to highest eighth). "
        "Below 1 is faster; `off` is the same code twice.",
        "",
        "| video tokens | text tokens | " + " | ".join(PLANS) + " | largest rel. L2 |",
        "|---|---|" + "---|" * (len(PLANS) + 1),
    ]
    keys = list(dict.fromkeys((row["tokens"], row["text"]) for row in rows))
    for tokens, text in keys:
        own = {r["plan"]: r for r in rows if (r["tokens"], r["text"]) == (tokens, text)}
        cells = [
            f"{own[p]['times_stock']:.2f} ({own[p]['low']:.2f} to {own[p]['high']:.2f})"
            for p in PLANS
        ]
        worst = max(r["rel_l2"] for r in own.values())
        lines.append(f"| {tokens} | {text} | {' | '.join(cells)} | {worst:.1e} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--text", type=int, nargs="*", default=list(TEXTS))
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    stored = RESULTS / "guidance.json"
    rows: list[dict[str, Any]] = json.loads(stored.read_text("utf-8")) if stored.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        pipe = pipeline(Path(folder))
        for tokens in options.tokens:
            for text in options.text:
                rounds = options.rounds if tokens <= 1024 else max(3, options.rounds // 3)
                kept = [r for r in rows if (r["tokens"], r["text"]) != (tokens, text)]
                made = [*kept, *cell(pipe, tokens, text, rounds)]
                rows = sorted(made, key=lambda r: (r["tokens"], r["text"]))
                (RESULTS / "guidance.md").write_text(table(rows), "utf-8")
                stored.write_text(json.dumps(rows) + "\n", "utf-8")
    print(table(rows), file=sys.stderr)


if __name__ == "__main__":
    main()
