"""The help of a verb of many options has them in groups, each once."""

from __future__ import annotations

import click
from click.testing import CliRunner

from truestep.cli.check import GROUPS, command
from truestep.cli.grouped import Grouped


def test_every_option_of_check_is_in_one_group() -> None:
    options = {p.name for p in command.params if isinstance(p, click.Option) and not p.hidden}
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(str(name) for name in options)


def test_the_help_of_check_has_its_groups_in_order_and_each_option_once() -> None:
    shown = CliRunner().invoke(command, ["--help"]).output
    places = [shown.index(f"{title}:\n") for title in (*GROUPS, "Other options")]
    assert places == sorted(places)
    begun = [line.split()[0] for line in shown.splitlines() if line.startswith("  -")]
    assert len(begun) == len(set(begun)) == len(command.params)  # CASES and --remade have no line
    assert "--remade" not in shown
    assert shown.index("--apply") < shown.index("--depth") < shown.index("--ray")


def test_an_option_of_no_group_is_printed_last() -> None:
    @click.command(cls=Grouped, groups={"First": ("second",)})
    @click.option("--first", help="One.")
    @click.option("--second", help="Two.")
    def verb(first: str, second: str) -> None:
        """Do it."""

    shown = CliRunner().invoke(verb, ["--help"]).output
    assert shown.index("First:") < shown.index("--second") < shown.index("Other options:")
    assert shown.index("Other options:") < shown.index("--first")
