"""The verbs, imported when they are called or listed."""

from __future__ import annotations

import importlib
import os

import click

from truestep.text import say

VERBS = {
    "demo": "See all of it on the builtin digits model, in a minute.",
    "tiny": "Write a tiny pipeline of any diffusers class, with random weights, to try things on.",
    "record": "Record a case as its reference, with its measured noise floor.",
    "check": "Say whether a changed model is still the same as its reference.",
    "compare": "Compare two files: recordings, tensors, pictures, videos, sounds.",
    "weights": "Compare two checkpoints: renamed, fused, split, rounded, quantised.",
    "trace": "Record what every module of a model gives, and say where two traces part.",
    "ab": "Time a switch against a control, and say whether the model stays the same.",
    "bisect": "Find which commit, version, variable or weight made the difference.",
    "engine": "Record another engine, and say in which stage it parts from the trusted model.",
    "parity": "Component parity tests: scaffold, run, and a ledger of what is proven.",
    "gate": "Is a gate any good: damage a reference, lint and write threshold files.",
    "references": "Share references of a team: store, promote a draft with a reason, go back.",
    "show": "Show what a file or folder is and holds, or what profiles say.",
    "doctor": "Show machine, libraries, attention kernel and what is missing.",
}
"""Verbs in the order in which one needs them."""

FURTHER = {
    "new": "Write the first pytest file of a pipeline or a module.",
    "run": "Generate a case and save its latent and video.",
    "perf": "Keep a history of what a case costs, and say whether it costs more now.",
    "training": "Check a training step: forward, loss, backward, optimiser, LoRA merge.",
    "sensitivity": "Rank layers by what quantising each costs, and say which to leave as they are.",
    "bundle": "Make a file under 1 MB of a recording, for an issue thread.",
    "serve-check": "Ask a server of pictures or videos whether it does what it is asked for.",
    "comment": "Render results for a pull request: comment, summary, annotations, SARIF, JUnit.",
    "skill": "Write a SKILL.md that tells a coding agent how to use truestep.",
    "mcp": "Serve check, compare, record and what comes next to agents, by MCP on stdin.",
}
"""Verbs that few need: their names alone are listed."""

RENAMED = {
    "calibrate": ("record", "--runs", "30"),
    "ablate": ("ab", "ablate"),
    "selftest": ("gate", "selftest"),
    "thresholds": ("gate", "thresholds"),
    "recorder": ("trace", "recorder"),
}
"""What verbs of earlier versions are called now; they still work."""


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*VERBS, *FURTHER]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS and cmd_name not in FURTHER:
            return None
        module = importlib.import_module(f"truestep.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] in RENAMED:
            now = RENAMED[args[0]]
            if not ctx.resilient_parsing:
                say(f"note: truestep {args[0]} is now truestep {' '.join(now)}", err=True)
            args = [*now, *args[1:]]
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))
        with formatter.section("Further"):
            formatter.write_text(", ".join(FURTHER))


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
