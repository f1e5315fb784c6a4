"""`truestep gate`: whether a gate notices damage, and limits that come from a measured floor."""

from __future__ import annotations

import click

from truestep.cli.selftest import selftest
from truestep.cli.thresholds import thresholds


@click.group("gate")
def command() -> None:
    """Say whether a gate is any good, and write one that is."""


command.add_command(selftest)
command.add_command(thresholds)
