"""The verbs, imported when they are called or listed."""

from __future__ import annotations

import importlib
import os

import click

VERBS = {
    "demo": "Tell the whole story on the builtin digits model, in about two minutes.",
    "run": "Generate a case and save its latent and video.",
    "record": "Record a case as its reference, with its measured noise floor.",
    "references": "Share references of a team: store, promote a draft with a reason, go back.",
    "check": "Say whether a changed model is still the same as its reference.",
    "trace": "Record what every module of a model gives, step by step.",
    "calibrate": "Add benign runs to a reference's noise floor, and measure the false alarms.",
    "compare": "Compare two files of tensors: recordings, safetensors, npy, npz, pt.",
    "weights": "Compare two checkpoints: renamed, fused, split, rounded, quantised.",
    "ab": "Time a switch against a control, and say whether the model stays the same.",
    "ablate": "Say which difference between two audio-video references matters, and how much.",
    "perf": "Keep a history of what a case costs, and say whether it costs more now.",
    "selftest": "Damage a reference in standard ways and say which gates notice.",
    "thresholds": "Lint SGLang-Diffusion's threshold files, and write them from a measured floor.",
    "engine": "Record another engine, and say in which stage it parts from the trusted model.",
    "parity": "Component parity tests: scaffold, run, and a ledger of what is proven.",
    "tiny": "Write a tiny pipeline of any diffusers class, with random weights, to try things on.",
    "recorder": "Write one file that records where truestep cannot be installed.",
    "bundle": "Make a file under 1 MB of a recording, for an issue thread.",
    "serve-check": "Ask a server of pictures or videos whether it does what it is asked for.",
    "show": "Show what a file or folder is and holds, or what profiles say.",
    "doctor": "Show machine, libraries, attention kernel and what is missing.",
}


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"truestep.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 identical or equivalent, 1 drifted or invalid (also where the code that "
    "is run ends the process), 2 usage or unreadable file, 3 missing or incomparable, "
    "4 inconclusive, 130 interrupted.",
)
@click.version_option(package_name="truestep", prog_name="truestep")
@click.pass_context
def app(context: click.Context) -> None:
    """Is it still the same model? Record a trusted run, replay it on the candidate, and judge the
    difference against a measured noise floor."""
    if os.environ.get("NO_COLOR"):
        context.color = False
