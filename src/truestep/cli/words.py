"""Hints as commands that can be pasted: with the case, the tier and the files of this command."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable
from typing import Any

import click

from truestep.errors import TruestepError
from truestep.text import pasteable

BRIEF = "brief_path"
"""Where a click context keeps what --brief is given: no verb has to pass it on."""

_OF_A_CASE = re.compile(r"\btruestep ((?:(?:trace|perf) )?[a-z]+) CASE(?![\w-])")
SAYING = ("prompt", "pipeline", "subject", "inputs", "loras", "prepare")
"""Options that say a case on the command line."""

_CARRIED = ("case_file", "tier", "references", "history")
"""Options that say which case, and which reference of it: a hint needs them as this command did."""


def asked_for() -> tuple[str, dict[str, Any]]:
    """The verb (`trace record`) and its arguments and options, as this process's command line gives
    them; nothing where it cannot be read."""
    from truestep.cli.app import app

    command: click.Command = app
    context: click.Context | None = None
    args = sys.argv[1:]
    verb: list[str] = []
    try:
        while True:
            context = command.make_context(None, list(args), parent=context, resilient_parsing=True)
            if not isinstance(command, click.Group):
                brief = {BRIEF: context.meta[BRIEF]} if BRIEF in context.meta else {}
                return " ".join(verb), {**context.params, **brief}
            state = vars(context)  # the attribute's public name is deprecated since click 8.2
            rest = state.get("_protected_args", state.get("protected_args", []))
            words = [*rest, *context.args]
            name, found, args = command.resolve_command(context, words) if words else ("", None, [])
            if found is None:
                return "", {}
            verb.append(name or "")
            command = found
    except click.ClickException:
        return "", {}


def spell_out(hint: str, name: str | None = None, *, with_changes: bool = False) -> str:
    """A hint with this command's own case in the place of CASE, or this command before an option.

    Args:
        hint: As the library gives it.
        name: The case concerned, where the command has several.
        with_changes: See `case_words`.
    """
    from truestep.environment import command_line

    own, _ = asked_for()
    if not own:
        return hint
    if hint.startswith("--"):
        option, mark, prose = hint.partition("  # ")
        given = sys.argv[1:]
        at = given.index("--") if "--" in given else len(given)  # behind it, it is the program's
        program = f" {pasteable(given[at:])}" if given[at:] else ""
        return f"{command_line(_without(given[:at], option, own))} {option}{program}{mark}{prose}"
    chosen = sole_case() if name is None else name
    if chosen is None:
        return hint

    def spelled_out(found: re.Match[str]) -> str:
        verb = found[1]
        return f"truestep {verb} {case_words(chosen, verb=verb, with_changes=with_changes)}"

    return _OF_A_CASE.sub(spelled_out, hint)


def _without(words: list[str], hint: str, verb: str) -> list[str]:
    """Words of a command without the options that a hint gives another value."""
    single = {
        name
        for option in _options(verb).values()
        if isinstance(option, click.Option) and not option.multiple and not option.is_flag
        for name in option.opts
    }
    changed = single & {word.partition("=")[0] for word in shlex.split(hint)}
    kept: list[str] = []
    value = False
    for word in words:
        name, equals, _ = word.partition("=")
        if not value and name not in changed:
            kept.append(word)
        value = not value and name in changed and not equals
    return kept


def spelled(error: TruestepError, name: str | None = None) -> TruestepError:
    """The error, its hint spelled out."""
    error.hint = spell_out(error.hint, name)
    return error


def case_words(name: str, *, verb: str, with_changes: bool = False) -> str:
    """What chooses a case of this command in another verb, quoted for a shell.

    Args:
        name: As this command names it.
        verb: The other verb; the same one is given the same changes.
        with_changes: Of a case that the command line says, --set is a part: so for any verb.
    """
    own, parameters = asked_for()
    options = _options(verb)
    prompt, names = parameters.get("prompt"), _names(parameters)
    said = [key for key in SAYING if parameters.get(key)]
    if said or prompt is not None:
        words = [*names, *option_words(parameters, said, verb)]
    else:
        words = [*(n for n in names if n.endswith(".toml") and n != name), name]
    if _of_reference(parameters) and "reference" in options:
        words = ["--reference", str(parameters["reference"])]
    for key in _CARRIED:
        option, value = options.get(key), parameters.get(key)
        needed = key != "case_file" or not (said or prompt is not None)
        if needed and option is not None and value is not None and value != option.default:
            words += [option.opts[0], str(value)]
    carried: tuple[str, ...] = ("changes", "change", "model") if verb == own else ()
    if with_changes and said and not carried:
        carried = ("changes",)
    return pasteable([*words, *option_words(parameters, carried, verb)])


def option_words(parameters: dict[str, Any], keys: Iterable[str], verb: str) -> list[str]:
    """Options of a command as another verb's, each as often as it was given."""
    options, words = _options(verb), []
    for key in (key for key in keys if key in options):
        value = parameters.get(key)
        for text in (value,) if isinstance(value, str) else value or ():
            words += [options[key].opts[0], text]
    return words


def _options(verb: str) -> dict[str, click.Parameter]:
    from truestep.cli.app import app

    command: click.Command | None = app
    for name in verb.split():
        if isinstance(command, click.Group):
            command = command.get_command(click.Context(command), name)
    return {p.name: p for p in command.params if p.name} if command is not None else {}


def _names(parameters: dict[str, Any]) -> list[str]:
    one = parameters.get("name")
    return [one] if one else list(parameters.get("names") or ())


def _of_reference(parameters: dict[str, Any]) -> bool:
    """Whether the case is the one that a recording holds, which no other command finds by name."""
    return bool(parameters.get("reference")) and not _names(parameters)


def sole_case() -> str | None:
    """The one case that this command names, as it names it."""
    _, parameters = asked_for()
    names = [name for name in _names(parameters) if not name.endswith(".toml")]
    if _of_reference(parameters):
        return ""
    if any(parameters.get(key) for key in SAYING):
        return names[0] if names else ""
    return names[0] if len(names) == 1 and names[0] != "all" else None
