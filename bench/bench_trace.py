"""Tracing a Wan transformer of 217 module calls, as a multiple of the untraced time. One thread.

Every sample is four forwards (two steps, two branches) of one model, hooks put on before and taken
off after, the trace opened and closed. Peers: six statistics by plain hooks, as FastVideo's
activation trace does, and, where they can be imported, the debugger of transformers and msprobe.
msprobe brings tensorboard and pandas with it and is therefore no extra of ours:
`pip install mindstudio-probe`. `--no-peers` leaves both out, `--rounds N` sets the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.common import emit, paired, ratio, rounded
from truestep.replay.hooks import capture

FORWARDS = 4
BARS = {
    "stats, all modules": 1.25,
    "stats, blocks only": 1.03,
    "sketch, all modules": 1.5,
    "full, all modules": 4.0,
}


def build(width: int = 512) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A Wan transformer, and what one forward is given.

    Args:
        width: Channels. 512 with 480 tokens, or 1,536, that of Wan 2.1 1.3B, with 96 tokens: what a
            forward computes for each byte that its modules return grows with the width.
    """
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=width // 64,
        attention_head_dim=64,
        ffn_dim=3 * width,
        num_layers=8,
        in_channels=16,
        out_channels=16,
        text_dim=64,
        freq_dim=64,
        patch_size=(1, 2, 2),
        rope_max_seq_len=64,
        qk_norm="rms_norm_across_heads",
        cross_attn_norm=True,
    ).eval()
    given = {
        "hidden_states": torch.randn(1, 16, 5 if width == 512 else 1, 16, 24),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 16, 64),
        "return_dict": False,
    }
    return model, given


@contextmanager
def six_statistics(model: torch.nn.Module) -> Iterator[list[dict[str, Any]]]:
    """What FastVideo's activation trace does: six statistics of each output, read one by one."""
    rows: list[dict[str, Any]] = []

    def hook(name: str) -> Callable[..., None]:
        def record(_: object, __: object, output: object) -> None:
            for tensor in output if isinstance(output, tuple | list) else (output,):
                if not isinstance(tensor, torch.Tensor):
                    continue
                value = tensor.detach().float()
                rows.append(
                    {
                        "module": name,
                        "abs_mean": value.abs().mean().item(),
                        "sum": value.sum().item(),
                        "min": value.min().item(),
                        "max": value.max().item(),
                        "mean": value.mean().item(),
                        "std": value.std().item(),
                    }
                )

        return record

    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules()]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def transformers_debugger(model: torch.nn.Module, folder: Path) -> Iterator[None]:
    """The debugger of transformers, which writes JSON with values of every tensor."""
    from transformers.model_debugging_utils import model_addition_debugger_context

    quiet = contextlib.redirect_stdout(io.StringIO())
    with (
        quiet,
        model_addition_debugger_context(model, debug_path=str(folder), do_prune_layers=False),
    ):
        yield


@contextmanager
def msprobe_statistics(model: torch.nn.Module, folder: Path) -> Iterator[None]:
    """Statistics of every module by msprobe, the dumper of MindStudio."""
    import json

    from msprobe.pytorch import PrecisionDebugger

    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.json"
    settings = {
        "task": "statistics",
        "dump_path": str(folder / "dump"),
        "rank": [],
        "step": [],
        "level": "L0",
        "statistics": {"scope": [], "list": [], "data_mode": ["all"], "summary_mode": "statistics"},
    }
    config.write_text(json.dumps(settings))
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # One debugger a process: it refuses a second configuration.
        debugger = PrecisionDebugger(config_path=str(config))
        debugger.start(model=model)
        try:
            yield
        finally:
            debugger.stop()
            debugger.step()


@contextmanager
def empty_hooks(model: torch.nn.Module) -> Iterator[None]:
    """What hooks cost that do nothing."""
    handles = [m.register_forward_hook(lambda *_: None) for m in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


Peer = Callable[[torch.nn.Module, Path], contextlib.AbstractContextManager[None]]


def importable_peers() -> dict[str, Peer]:
    """Tracers of others that are installed; a sentence on stderr for each that is not."""
    known: dict[str, tuple[str, str, Peer]] = {
        "peer: transformers debugger": (
            "transformers.model_debugging_utils",
            "transformers",
            transformers_debugger,
        ),
        "peer: msprobe": ("msprobe.pytorch", "mindstudio-probe", msprobe_statistics),
    }
    found: dict[str, Peer] = {}
    for name, (module, package, peer) in known.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            print(f"left out, {name}: {error}; pip install {package}", file=sys.stderr)
        else:
            found[name] = peer
    return found


def main(rounds: int = 9, *, peers: bool = True, width: int = 512) -> None:
    torch.set_num_threads(1)
    model, given = build(width)
    folder = Path(tempfile.mkdtemp(prefix="bench-trace-"))

    def forwards() -> None:
        with torch.no_grad():
            for _ in range(FORWARDS):
                model(**given)

    def traced(**options: Any) -> Callable[[], object]:
        def run() -> None:
            with capture(model, **options):
                forwards()

        return run

    def within(make: Callable[[], contextlib.AbstractContextManager[object]]) -> Callable[[], None]:
        def run() -> None:
            with make():
                forwards()

        return run

    contenders: dict[str, Callable[[], object]] = {
        "untraced": forwards,
        "empty hooks": within(lambda: empty_hooks(model)),
        "stats, all modules": traced(path=folder / "stats.safetensors"),
        "stats, blocks only": traced(select="blocks.?", path=folder / "blocks.safetensors"),
        "sketch, all modules": traced(level="sketch", path=folder / "sketch.safetensors"),
        "full, all modules": traced(level="full", path=folder / "full.safetensors"),
        "peer: six statistics by hooks": within(lambda: six_statistics(model)),
    }
    if peers:
        contenders |= {
            name: within(lambda peer=peer, name=name: peer(model, folder / name.split()[-1]))
            for name, peer in importable_peers().items()
        }
    try:
        with capture(model, level="full") as trace:
            forwards()
        recorded = sum(t.nbytes for t in trace.recording.values()) if trace.recording else 0
        emit(
            "trace_model",
            width=width,
            modules_that_run=trace.fired,
            tensors_a_forward=len(trace.names) // FORWARDS,
            output_mb_a_forward=round(recorded / FORWARDS / 1e6, 1),
        )
        del trace
        busy: dict[str, list[float]] = {name: [] for name in contenders}

        def counted(name: str) -> Callable[[], None]:
            def run() -> None:
                start = time.process_time()
                contenders[name]()
                busy[name].append(time.process_time() - start)

            return run

        samples = paired({name: counted(name) for name in contenders}, rounds=rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    processor = {name: seconds[-rounds:] for name, seconds in busy.items()}
    for name, seconds in samples.items():
        times = ratio(samples, name, "untraced")
        bar = {"bar": BARS[name], "met": times <= BARS[name]} if name in BARS else {}
        emit(
            "trace_overhead",
            contender=name,
            times_untraced=round(times, 3),
            times_untraced_processor=round(ratio(processor, name, "untraced"), 3),
            **bar,
            median_ms_a_forward=round(statistics.median(seconds) / FORWARDS * 1000, 1),
            samples_s=rounded(seconds),
            samples_processor_s=rounded(processor[name]),
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Overhead of tracing, one thread.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--width", type=int, default=512, choices=[512, 1536])
    options = parser.parse_args()
    main(options.rounds, peers=options.peers, width=options.width)
