"""`truestep serve-check`: does a server make the pictures that it is asked for?"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from truestep.cli.common import Command, end, finish, output_options, print_screen, progress_bar
from truestep.screen import Entries
from truestep.serving.plan import KINDS, PARAMETERS
from truestep.text import say, wrapped
from truestep.verdict import Verdict

if TYPE_CHECKING:
    from truestep.serving.client import Endpoint
    from truestep.serving.judging import Answers
    from truestep.serving.plan import Ask, Plan
    from truestep.verdict import Comparison

_PROMPT = "a red fox in the snow"


def _asked_options(function: Command) -> Command:
    """Options that say what is asked."""
    for option in (
        click.option(
            "--without", multiple=True, type=click.Choice(PARAMETERS), help="Do not try it."
        ),
        click.option("--seeds", type=int, help="Other seeds, the far end.  [default: 2]"),
        click.option("--repeats", type=int, help="Repeats, the floor.  [default: 3]"),
        click.option("--frames", type=int, help="Frames of a video.  [default: 17]"),
        click.option("--size", metavar="WxH", help="Size.  [default: 512x512]"),
        click.option("--guidance", type=float, help="Guidance scale.  [default: 5]"),
        click.option("--steps", type=int, help="Steps.  [default: 20]"),
        click.option("--seed", type=int, help="Seed.  [default: 0]"),
        click.option("--negative", help="Negative prompt.  [default: none]"),
        click.option("--prompt", help=f"Prompt.  [default: {_PROMPT}]"),
        click.option("--kind", type=click.Choice(KINDS), help="Which API.  [default: image]"),
    ):
        function = option(function)
    return function


@click.command("serve-check")
@click.argument("url", metavar="URL")
@click.option(
    "--reference",
    metavar="FILE|URL",
    help="Answers that --output wrote, or the address of a trusted server, which is asked too.",
)
@click.option(
    "--benign",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Answers of another healthy set-up (hardware, kernels): as far off as they are is no "
    "fault. May be given several times.",
)
@click.option(
    "--output", type=click.Path(path_type=Path), help="Write the answers, for --reference."
)
@_asked_options
@click.option("--model", default="", help="What is asked for as model.")
@click.option(
    "--field",
    "fields",
    multiple=True,
    metavar="NAME=FIELD",
    help="What a parameter is called, e.g. guidance=true_cfg_scale.",
)
@click.option("--set", "more", multiple=True, metavar="FIELD=VALUE", help="A further field.")
@click.option("--key-env", metavar="NAME", help="Variable of the environment that holds the key.")
@click.option("--reference-key-env", metavar="NAME", help="The same for the trusted server.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.1),
    default=600.0,
    show_default=True,
    help="Seconds that one request may take.",
)
@click.option("--most", type=int, default=40, show_default=True, help="Most requests of all.")
@click.option("--dry-run", is_flag=True, help="Say what would be asked, and ask nothing.")
@output_options
def command(  # 15 parameters: the options of the verb
    url: str,
    reference: str | None,
    benign: tuple[Path, ...],
    output: Path | None,
    model: str,
    fields: tuple[str, ...],
    more: tuple[str, ...],
    key_env: str | None,
    reference_key_env: str | None,
    timeout: float,
    most: int,
    dry_run: bool,
    json_path: str | None,
    report: Path | None,
    **asked: Any,
) -> None:
    """Ask an OpenAI-style server (SGLang, vLLM-Omni) and say whether it ignores what it is asked
    for, and with --reference whether its pictures are those of the trusted model.

    Its own repeats are the floor, other seeds the far end. A picture shows no more than a picture:
    `truestep check` looks into a model.
    """
    from truestep.serving.client import Endpoint, address
    from truestep.serving.judging import judge

    plan, stored = _plan(reference, asked)
    healthy = _healthy(benign, plan, reference)
    server = Endpoint(
        address(url),
        plan.kind,
        model,
        _key(key_env),
        timeout,
        _pairs(fields, "--field"),
        _values(more),
    )
    _untouched(server, plan)
    trusted = None
    if reference is not None and stored is None:
        trusted = replace(server, url=address(reference), key=_key(reference_key_env))
    _announce(plan, server, trusted, most=most, err=not dry_run)
    if dry_run:
        return
    theirs = stored if trusted is None else _ask(trusted, plan)
    ours = _ask(server, plan)
    if output is not None:
        from truestep.serving.answers import write

        write(output, plan, ours)
        say(f"answers: {output}", err=True)
    result = judge(plan, ours, theirs, benign=healthy)
    hint = _hint(result, shown=report is not None)
    result = result.model_copy(update={"hint": hint})
    end(finish([result], json_path=json_path, report=report))


def _hint(result: Comparison, *, shown: bool) -> str:
    """What comes next where the answers did not pass."""
    from truestep.environment import command_line

    if result.exit_code == 0:
        return ""
    ignored = [row.name for row in result.rows if row.verdict is result.verdict and not row.metrics]
    if result.verdict is Verdict.INCONCLUSIVE and not result.media:
        return "give --reference the answers or the address of a server that you trust"
    if ignored and result.exit_code == 1:
        name = ignored[0].rpartition("/")[2]
        said = f"--field {name}=... if the server calls it otherwise"
        return f"{command_line()} --dry-run  # what is asked; {said}"
    if shown or not result.media:
        return "what is inside of the model is judged by truestep check"
    return f"{command_line()} --report serve-check.html  # shows the pictures of both"


def _plan(reference: str | None, asked: dict[str, Any]) -> tuple[Plan, Answers | None]:
    """What is asked; with a file of answers what was asked then, and the answers."""
    from truestep.errors import UsageError
    from truestep.serving.plan import Ask, Plan, check

    given = {key: value for key, value in asked.items() if value not in (None, ())}
    if reference is not None and not reference.startswith(("http://", "https://")):
        from truestep.serving.answers import read

        if given:
            raise UsageError(
                "what is asked is what the reference was asked",
                measured=f"{', '.join('--' + key for key in given)} beside --reference {reference}",
                hint="leave the options out, or give the reference's address",
            )
        return read(Path(reference))
    kind = given.get("kind", "image")
    width, height = _size(given.get("size", "512x512"))
    own = {key: given[key] for key in ("negative", "seed", "steps", "guidance") if key in given}
    frames = given.get("frames", 17 if kind == "video" else 1)
    base = Ask(given.get("prompt", _PROMPT), width=width, height=height, frames=frames, **own)
    rest = {key: given[key] for key in ("repeats", "seeds", "without") if key in given}
    plan = Plan(kind, base, **rest)
    check(plan)
    return plan, None


def _healthy(files: tuple[Path, ...], plan: Plan, reference: str | None) -> list[Answers]:
    """Answers of set-ups that are known to be healthy, to the same requests."""
    from truestep.errors import UsageError
    from truestep.serving.answers import read

    if files and reference is None:
        raise UsageError("--benign is set beside a reference", hint="give --reference too")
    read_all = [read(path) for path in files]
    for path, (other, _) in zip(files, read_all, strict=True):
        if other != plan:
            raise UsageError(
                "a healthy set-up was asked something else than the reference",
                where=str(path),
                hint="write its answers with --reference beside --output",
            )
    return [answers for _, answers in read_all]


def _size(text: str) -> tuple[int, int]:
    from truestep.errors import UsageError

    width, by, height = text.partition("x")
    if not (by and width.isdecimal() and height.isdecimal()):
        raise UsageError(f"--size needs two numbers like 512x512, got {text!r}")
    return int(width), int(height)


def _pairs(texts: tuple[str, ...], option: str) -> Mapping[str, str]:
    from truestep.errors import UsageError
    from truestep.serving.client import FIELDS

    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UsageError(f"{option} needs NAME=VALUE, got {text!r}")
        if option == "--field" and name not in FIELDS:
            raise UsageError(f"no parameter {name!r}", measured=f"known: {', '.join(FIELDS)}")
        found[name] = value
    return found


def _values(texts: tuple[str, ...]) -> Mapping[str, Any]:
    """Further fields: JSON where it is, else text."""
    from truestep.reading import parse_json

    found: dict[str, Any] = {}
    for name, text in _pairs(texts, "--set").items():
        try:
            found[name] = parse_json(text)
        except ValueError:
            found[name] = text
    return found


def _untouched(server: Endpoint, plan: Plan) -> None:
    """Refuse further fields that would be one value in every request where they are to change."""
    from truestep.errors import UsageError

    body = replace(server, more={}).body(replace(plan.base, negative="x"))
    taken = sorted(body.keys() & server.more.keys())
    if taken:
        raise UsageError(
            f"--set {taken[0]} would hold still what is to change",
            hint="say it by the option of its name",
        )


def _key(variable: str | None) -> str:
    from truestep.errors import UsageError

    if variable is None:
        return ""
    key = os.environ.get(variable, "")
    if not key:
        raise UsageError(f"the variable {variable} of --key-env is not set, or empty")
    return key


def _announce(
    plan: Plan, server: Endpoint, trusted: Endpoint | None, *, most: int, err: bool
) -> None:
    """Say what will be asked before anything is; refuse more than was allowed."""
    from truestep.errors import UsageError

    asks, servers = plan.asks(), [side for side in (trusted, server) if side is not None]
    total = len(asks) * len(servers)
    places = " and ".join(side.place for side in servers)
    if total > most:
        raise UsageError(
            f"{total} requests are more than --most allows",
            measured=f"{total} to {places}; at most {most}",
        )
    for side in servers:
        if side.key and not side.private:
            say(f"the key is sent to {side.url} unencrypted: its address is no https", err=True)
    head = f"{total} requests to {places}, each at most {server.timeout_s:g} s"
    entries = [wrapped(name, _asked(plan, name, ask)) for name, ask in asks.items()]
    if not err:
        print_screen(head, Entries(entries, "requests"))
        return
    for line in (*wrapped("", head, split=False), *(row for entry in entries for row in entry)):
        say(line, err=True)


def _asked(plan: Plan, name: str, ask: Ask) -> str:
    """A request in words: the first whole, every other one by what differs from it."""
    said, first = _words(plan, ask), _words(plan, plan.base)
    if name == next(iter(plan.asks())):
        return ", ".join(said.values())
    return ", ".join(said[key] for key in said if said[key] != first.get(key)) or "the same again"


def _words(plan: Plan, ask: Ask) -> dict[str, str]:
    frames = {"frames": f"{ask.frames} frames"} if plan.kind == "video" else {}
    negative = {"negative": f"negative {ask.negative!r}"} if ask.negative else {}
    return {
        "seed": f"seed {ask.seed}",
        "steps": f"{ask.steps} steps",
        "guidance": f"guidance {ask.guidance:g}",
        "size": f"{ask.width}x{ask.height}",
        **frames,
        "prompt": repr(ask.prompt),
        **negative,
    }


def _ask(endpoint: Endpoint, plan: Plan) -> Answers:
    from truestep.serving.answers import gather
    from truestep.serving.client import connected

    with connected(endpoint) as asker, progress_bar() as progress:
        return gather(plan, asker.ask, label=endpoint.url, progress=progress)
