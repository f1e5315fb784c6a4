"""Which cases a verb is asked for: by name, by file, or said in words; and their references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from truestep.cli.moving import byte_bar
from truestep.cli.words import SAYING, asked_for, case_words, option_words
from truestep.text import pasteable, quoted

if TYPE_CHECKING:
    from truestep.case import AnyCase, Case
    from truestep.errors import CaseError

DEFAULT_MODEL = "builtin:digits"
"""Of a case that is said without one."""

PROMPT = "a red three moving left"
"""Of a case that a hint says."""

CasesT = TypeVar("CasesT", bound="AnyCase")


def parse_changes(changes: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` options as a dictionary; `none` is None. The case validates them.

    Raises:
        UsageError: An option has no `=`.
    """
    from truestep.errors import UsageError

    parsed: dict[str, Any] = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key:
            raise UsageError(
                f"--set needs KEY=VALUE, got {change!r}", hint="e.g. --set guidance_scale=3.1"
            )
        parsed[key] = None if value.lower() == "none" else value
    return parsed


@dataclass(frozen=True)
class Words:
    """What this command says of cases.

    Attributes:
        names: Cases, case files, or one model.
        case_file, tier: Where cases are, and which table of them.
        prompt, pipeline, subject, inputs, loras, prepare: Of a case that is said on the command
            line.
        references: A folder of references, whose case ids are names, too.
        staged: The verb runs truestep's own stages alone.
    """

    names: Sequence[str]
    case_file: Path
    tier: str
    prompt: str | None = None
    pipeline: str | None = None
    subject: str | None = None
    inputs: Sequence[str] = ()
    references: Path | None = None
    loras: Sequence[str] = ()
    prepare: str | None = None
    staged: bool = False

    @property
    def says_case(self) -> bool:
        """Whether the case is said here, and not found by a name."""
        said = (self.prompt, self.pipeline, self.subject, self.prepare)
        return bool(self.inputs or self.loras) or any(word is not None for word in said)


def choose_cases(
    names: Sequence[str],
    *,
    case_file: Path,
    prompt: str | None,
    tier: str,
) -> dict[str, Case]:
    """Cases of the runtime by name; see `choose_any`.

    Raises:
        CaseError: A name is of no case, a case is not valid, or is one of any pipeline.
    """
    words = Words(names, case_file, tier, prompt=prompt, staged=True)
    return of_the_runtime(choose_any(words))


def of_the_runtime(cases: Mapping[str, AnyCase]) -> dict[str, Case]:
    """The cases, if this verb can run them all."""
    from truestep.case import Case

    own = {name: case for name, case in cases.items() if isinstance(case, Case)}
    for name, case in cases.items():
        if name not in own:
            words = case_words(name, verb="record", with_changes=True)
            what = f"{name!r} is a case of a plain pipeline"
            raise _not_staged(what, case, record=words, names=_said_names(name))
    return own


def refuse_plain(model: str) -> None:
    """Refuse a bare model that truestep has no stages of.

    Raises:
        CaseError: It is a plain pipeline; the hint judges it as one.
    """
    from truestep.call_case import CallCase

    case = CallCase(model=model, call={"prompt": PROMPT})
    if not _in_stages(case):
        words = pasteable([model, "--prompt", PROMPT])
        raise _not_staged(f"{model!r} is a plain pipeline", case, record=words, names=case.id)


def _said_names(name: str) -> str:
    """How check names a case once it is recorded: what the command line says goes by its id."""
    _, parameters = asked_for()
    said = any(parameters.get(key) for key in SAYING)
    return quoted(name) if said else case_words(name, verb="check")


def _not_staged(what: str, case: AnyCase, *, record: str, names: str) -> CaseError:
    """Why a verb of truestep's own stages does not run a plain pipeline, and what judges it.

    Args:
        what: What it is.
        case: Its case; what is recorded is not recorded again.
        record: What names the case in `truestep record`.
        names: What names it in `truestep check`.
    """
    from truestep.errors import CaseError
    from truestep.recording.store import DEFAULT_ROOT, Store
    from truestep.runtime.loading import SUPPORTED

    _, parameters = asked_for()
    root = parameters.get("references") or DEFAULT_ROOT
    known = any(place.case_id == case.id for place in Store(root).known())
    tested = pasteable(option_words(parameters, ("changes", "change"), "check"))
    check = f"truestep check {names} {tested}".rstrip()
    return CaseError(
        f"{what}, and this verb runs truestep's own stages",
        measured=f"stages there are of {', '.join(SUPPORTED)}",
        likely="stages can be timed and switched one by one; a plain pipeline is recorded and "
        "checked call by call",
        hint=check if known else f"truestep record {record} && {check}",
    )


def choose_any(words: Words) -> dict[str, AnyCase]:
    """Cases by name, from a case file given as a name, or ad hoc from a model and what it is asked.

    No names (or `all`) means every case of the case file.

    Raises:
        CaseError: A name is none of these, or a case is not valid.
    """
    from truestep.case import read_cases

    if words.says_case:
        case = _said(words)
        return {case.id: case}
    names, case_file = words.names, words.case_file
    chosen: dict[str, AnyCase] = {}
    wanted = [name for name in names if name != "all"]
    files = [Path(name) for name in wanted if name.endswith(".toml")]
    for path in files or [case_file]:
        if files or not wanted or case_file.exists():
            chosen.update(read_cases(path, tier=words.tier))
    picked = [name for name in wanted if not name.endswith(".toml")]
    if not picked:
        return chosen
    return {
        name: _recorded(name, chosen, words.references) or _picked(name, chosen, words)
        for name in picked
    }


def _said(words: Words) -> AnyCase:
    """The case that the command line says: of the runtime where it has the model's stages."""
    from truestep.call_case import CallCase
    from truestep.case import Case
    from truestep.errors import UsageError

    if len(words.names) > 1:
        raise click.UsageError("--prompt makes one case: give one model (or none)")
    model = words.names[0] if words.names else DEFAULT_MODEL
    own = words.pipeline is not None or words.inputs or words.loras or words.prepare is not None
    if own and words.subject == "runtime":
        raise UsageError(
            "--pipeline, --input, --lora and --prepare are of a plain pipeline",
            measured="--subject runtime runs truestep's own stages",
            hint="--subject diffusers",
        )
    case = CallCase(
        model=model,
        pipeline=words.pipeline,
        call={} if words.prompt is None else {"prompt": words.prompt},
        input=_inputs(words.inputs),
        lora=tuple(words.loras),
        prepare=words.prepare,
    )
    if words.subject == "diffusers" or own:
        return case
    _refuse_no_folder(case)  # before its settings, which are not those of a plain pipeline
    if words.subject is None and not _in_stages(case):
        return case
    if words.prompt is None:
        raise click.UsageError("--subject runtime needs --prompt")
    return Case(model=model, prompt=words.prompt)


def _refuse_no_folder(case: AnyCase) -> None:
    if not case.model.startswith("builtin:"):
        from truestep.runtime.loading import refuse_no_folder

        refuse_no_folder(case)


def _in_stages(case: AnyCase) -> bool:
    if case.model.startswith("builtin:"):
        return True
    from truestep.runtime.loading import runs_in_stages

    return runs_in_stages(case)


def _inputs(given: Sequence[str]) -> dict[str, Any]:
    """`NAME=FILE` options as a dictionary; a name that is given twice has a list."""
    from truestep.errors import UsageError

    files: dict[str, list[str]] = {}
    for text in given:
        name, equals, file = text.partition("=")
        if not equals or not name or not file:
            raise UsageError(
                f"--input needs NAME=FILE, got {text!r}", hint="e.g. --input image=cat.png"
            )
        files.setdefault(name, []).append(file)
    return {name: tuple(each) if len(each) > 1 else each[0] for name, each in files.items()}


def chosen_or_recorded(
    names: Sequence[str],
    *,
    reference: Path | None,
    references: Path | None,
    case_file: Path,
    prompt: str | None,
    tier: str,
) -> dict[str, Case]:
    """Cases of the runtime of a verb that has references; see `any_or_recorded`."""
    words = Words(names, case_file, tier, prompt=prompt, references=references, staged=True)
    return of_the_runtime(any_or_recorded(words, reference))


def any_or_recorded(words: Words, reference: Path | None) -> dict[str, AnyCase]:
    """Cases of a verb that has references: also by the id of one that is stored, or by the file of
    one alone, which holds its case."""
    from truestep.recording.store import DEFAULT_ROOT

    if reference is not None and not words.names and not words.says_case:
        case = case_of(reference)
        return {case.id: case}
    if reference is not None and not words.names:
        _refuse_unnamed(words, reference)
    return choose_any(replace(words, references=words.references or DEFAULT_ROOT))


def _refuse_unnamed(words: Words, reference: Path) -> None:
    """Refuse to say a case beside a reference of another model without naming that model.

    Raises:
        UsageError: What is said would be a case of builtin:digits.
    """
    from truestep.errors import UsageError

    said = {
        "--prompt": words.prompt,
        "--pipeline": words.pipeline,
        "--input": words.inputs,
        "--lora": words.loras,
        "--prepare": words.prepare,
        "--subject": words.subject,
    }
    given = [option for option, value in said.items() if value]
    model = case_of(reference).model
    if given in (["--prompt"], ["--subject"]) and model == DEFAULT_MODEL:
        return
    raise UsageError(
        f"{', '.join(given)} would say a case, and no model is named",
        where=str(reference),
        measured=f"the reference is of {model}",
        likely=f"name {model} and the whole call, as it was recorded; --set changes one value",
        hint=f"truestep check --reference {quoted(str(reference))}  # takes its own case",
    )


def said_with(words: Words, cases: dict[str, AnyCase], changes: Sequence[str]) -> Sequence[str]:
    """What of `--set` is a change under test.

    Nothing but `compile`, where the command line says the call of a pipeline: then its arguments
    are part of the case, in a check as in the record before it.
    """
    said = words.says_case and any(map(of_calls, cases.values()))
    return [change for change in changes if change.startswith("compile=")] if said else changes


def changed_cases(cases: dict[str, CasesT], changes: Sequence[str]) -> dict[str, CasesT]:
    """The cases as --set changes them; one that goes by its id goes by its new one."""
    changed = {
        name: (case, case.replace(**values_of(case, changes))) for name, case in cases.items()
    }
    return {new.id if name == old.id else name: new for name, (old, new) in changed.items()}  # type: ignore[misc]


def values_of(case: AnyCase, changes: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` options as a case takes them.

    A case of the runtime knows of which kind each value is; for the call of a pipeline, what is
    JSON is read as such (`3`, `true`, `["a", "b"]`), all else is text.
    """
    from truestep.case import Case

    values = parse_changes(changes)
    return values if isinstance(case, Case) else {k: _value(v) for k, v in values.items()}


def _value(text: str | None) -> Any:
    from truestep.reading import parse_json

    if text is None:
        return None
    try:
        return parse_json(text.encode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return {"True": True, "False": False}.get(text, text)


def _recorded(name: str, cases: dict[str, AnyCase], references: Path | None) -> AnyCase | None:
    """The case of this id that a reference holds, where no case file has it."""
    from truestep.recording.store import Store

    if references is None or name in cases or name in {case.id for case in cases.values()}:
        return None
    store = Store(references)
    place = next((place for place in store.known() if place.case_id == name), None)
    return None if place is None else case_of(store.present(place))


def case_of(path: Path) -> AnyCase:
    """The case that a recording is of.

    Raises:
        UsageError: It is not a recording of a case.
    """
    from truestep.case import case_from
    from truestep.errors import UsageError
    from truestep.recording.manifest_reading import read_manifest

    manifest = read_manifest(path)
    if manifest is None or manifest.case is None:
        raise UsageError(
            "the reference is not a recording of a case",
            where=str(path),
            hint=f"truestep show {quoted(str(path))}  # says what it is",
        )
    return case_from(manifest.case)


def case_device_class(case: AnyCase) -> str:
    """Device class that a case runs on here."""
    from truestep.environment import device_class, usable_device

    return device_class(usable_device(case.device))


def of_calls(case: AnyCase) -> bool:
    """Whether a case is the call of a pipeline."""
    from truestep.call_case import CallCase

    return isinstance(case, CallCase)


def find_reference(name: str, case: AnyCase, *, references: Path | None, tier: str) -> Path:
    """The stored reference of a case on the device class it runs on here.

    Raises:
        ReferenceNotFoundError: There is none; the hint is the command that seeds it.
    """
    from truestep.recording.store import DEFAULT_ROOT, Store

    words = case_words(name, verb="record", with_changes=of_calls(case))
    with byte_bar() as progress:
        return Store(references or DEFAULT_ROOT, progress=progress).find(
            case,
            tier=tier,
            device_class=case_device_class(case),
            seed_command=f"truestep record {words}",
        )


def _picked(name: str, cases: dict[str, AnyCase], words: Words) -> AnyCase:
    import difflib

    from truestep.errors import CaseError

    if name in cases:
        return cases[name]
    by_id = {case.id: case for case in cases.values()}
    if name in by_id:
        return by_id[name]
    if words.staged and Path(name).is_dir():
        refuse_plain(name)
    near, case_file = difflib.get_close_matches(name, cases, n=1), words.case_file
    raise CaseError(
        f"no case named {name!r}",
        where=str(case_file),
        measured=f"it holds: {', '.join(cases)}" if cases else "there is no such file",
        likely=f"did you mean {near[0]!r}?" if near else "",
        hint=_instead(name, cases, case_file),
    )


def _instead(name: str, cases: dict[str, AnyCase], case_file: Path) -> str:
    """What to type for a case that there is not."""
    from truestep.environment import command_line

    if cases:
        return f"grep '^.case' {quoted(str(case_file))}  # lists them"
    _, parameters = asked_for()
    if "prompt" not in parameters:
        return "write one with a table [case.NAME] that has model and prompt"
    command = command_line()
    if not (Path(name).is_dir() or ":" in name or "/" in name):  # it is no model, either
        command = command.replace(f" {quoted(name)}", "", 1)
    return f"{command} --prompt '{PROMPT}'  # a case without a file"
