"""`truestep doctor`: machine, libraries, the attention kernel that really runs, what is missing."""

from __future__ import annotations

from pathlib import Path

import click

from truestep.cli.common import end, print_screen, verbose, verbose_option
from truestep.screen import Entries, rows
from truestep.text import say, say_json, wrapped

EXTRAS = {
    "diffusers": ("diffusers", "running models"),
    "transformers": ("diffusers", "running models"),
    "accelerate": ("diffusers", "running models"),
    "ftfy": ("diffusers", "cleaning prompts exactly as the models ask"),
    "av": ("media", "writing videos"),
    "pillow": ("media", "frames in reports"),
    "httpx2": ("serve", "asking servers"),
}


@click.command("doctor")
@click.argument("folder", required=False, metavar="[MODEL]")
@click.option("--model", help="The same as MODEL.")
@click.option("--json", "as_json", is_flag=True, help="The environment as JSON.")
@click.option(
    "--recipe",
    metavar="CASE",
    help="Audit the text embeddings that this case's pipeline really makes.",
)
@click.option("--prompt", help="With --recipe and a model instead of a case.")
@click.option("--apply", "change", metavar="FILE.py:FUNCTION", help="Change the pipeline first.")
@verbose_option
def command(
    folder: str | None,
    model: str | None,
    as_json: bool,
    recipe: str | None,
    prompt: str | None,
    change: str | None,
) -> None:
    """Show the environment that decides numbers, and what is missing with how to install it.

    With MODEL (a folder or hub id) also whether it is complete, and whether all that it needs can
    be imported.
    """
    import json

    from truestep.environment import Environment, attention_kernel, library_version

    if recipe is not None:
        end(_audit(recipe, prompt, change))

    environment = Environment.current(attention=attention_kernel())
    problems = []
    for package, (extra, purpose) in EXTRAS.items():
        if library_version(package) is None:
            problems.append(f"{package} is missing ({purpose}): pip install 'truestep[{extra}]'")
    model = model or folder
    if model is not None:
        problems += _model_problems(model)
    head = f"{len(problems)} problem{'s' if len(problems) != 1 else ''} found"
    head = head if problems else "nothing is missing"
    if as_json:
        say_json(json.dumps(dict(environment), indent=2))
        for line in (*(f"PROBLEM {problem}" for problem in problems), head):
            say(line, err=True)
        end(2 if problems else 0)
    known = dict(environment)
    for dtype in ("float32", "bfloat16"):
        known[f"attention in {dtype}"] = attention_kernel(dtype=dtype) or "-"
    told = [f"  {key:<26} {value}" for key, value in _first(known).items()]
    found = [
        wrapped("", f"PROBLEM {problem}", most=None if verbose() else 3) for problem in problems
    ]
    print_screen(head, Entries(found, "problems"), rows(told), exit_code=2 if problems else 0)
    end(2 if problems else 0)


_TELLING = ("device.name", "attention.kernel", "torch.threads", "library.torch")
"""What of an environment decides numbers most often, and is shown first."""


def _first(known: dict[str, str]) -> dict[str, str]:
    """The environment, what tells most at its head."""
    order = sorted(known, key=lambda key: (key not in _TELLING, not key.startswith("attention")))
    return {key: known[key] for key in order}


def _model_problems(model: str) -> list[str]:
    """What is absent from a model folder, by its own model_index.json."""
    from truestep.case import Case
    from truestep.errors import ModelLoadError
    from truestep.runtime.loading import NOTES, folder_of, model_index

    try:
        folder = folder_of(Case(model=model, prompt="doctor"))
        index = model_index(folder)
    except ModelLoadError as error:
        return [f"{error.what} ({error.where}): {error.hint}"]
    if index.get("_class_name") in NOTES:
        say(f"NOTE {NOTES[index['_class_name']]}", err=True)
    problems = _class_problems(str(index.get("_class_name")))
    for part, kind in index.items():
        if part.startswith("_") or part == "safety_checker":
            continue  # none is run: see NOTES
        if not isinstance(kind, list) or kind[:1] in ([], [None]):
            continue
        problems += _import_problems(part, kind)
        problems += _component_problems(folder / part)
    return problems


def _class_problems(name: str) -> list[str]:
    """Why no pipeline of a class can be had here."""
    try:
        import diffusers
    except ImportError:
        return []  # told as a package that is missing
    if name in dir(diffusers):  # named without its imports: what fails there is its part's
        return []
    return [f"diffusers {diffusers.__version__} has no class {name}: pip install -U diffusers"]


def _import_problems(part: str, kind: list[str]) -> list[str]:
    """Why a component's class cannot be had here; nothing of its weights is read."""
    from truestep.errors import one_line
    from truestep.runtime.loading import component_class, import_error

    try:
        component_class(part, kind)
    except (ValueError, RuntimeError, ImportError, AttributeError) as error:
        absent = import_error(error)
        if absent is None:
            return [f"{part}: {one_line(error)}"]
        package = (absent.name or "").partition(".")[0]
        lacks = package and isinstance(absent, ModuleNotFoundError)
        fix = f": pip install {package}" if lacks else ""
        return [f"{part}: {'.'.join(kind)} cannot be imported: {one_line(absent)}{fix}"]
    return []


def _component_problems(folder: Path) -> list[str]:
    from truestep.errors import FileFormatError
    from truestep.recording.header import read_header

    if not folder.is_dir():
        return [f"component folder {folder} is missing"]
    problems = []
    for weights in folder.glob("*.safetensors"):
        try:
            read_header(weights)
        except FileFormatError as error:
            problems.append(f"{weights}: {error.what}")
    if not any(folder.glob("*.json")):
        problems.append(f"{folder} has no configuration")
    return problems


def _audit(name: str, prompt: str | None, change: str | None) -> int:
    """Print what a case's text embeddings are, beside what its recipe says; 1 if they differ."""
    from truestep.case import CASE_FILE
    from truestep.cli.cases import choose_cases
    from truestep.cli.common import load_change
    from truestep.runtime.applying import apply_change
    from truestep.runtime.audit import audit
    from truestep.runtime.loading import load

    cases = choose_cases((name,), case_file=Path(CASE_FILE), prompt=prompt, tier="default")
    apply = load_change(change)
    wrong = 0
    lines: list[str] = []
    for case in cases.values():
        pipe = apply_change(load(case), apply)
        lines.append(f"  {case.id}: text recipe {pipe.settings.text_recipe}")
        for finding in audit(pipe):
            wrong += not finding.right
            word = "ok   " if finding.right else "WRONG"
            text = (
                finding.found if finding.right else f"{finding.found}; expected {finding.expected}"
            )
            lines.append(f"  {word} {finding.branch:<7} {finding.what:<7} {text}")
    head = f"WRONG: {wrong} properties differ from the recipe"
    lines = lines if verbose() or not wrong else sorted(lines, key=lambda x: "  WRONG" not in x)
    print_screen(head if wrong else "the recipe is followed", rows(lines), exit_code=bool(wrong))
    return 1 if wrong else 0
