"""One HTML file for any number of comparisons, rendered from their JSON alone."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from truestep.files import write_text
from truestep.report.answer import following
from truestep.report.curves import curve, number, scored
from truestep.report.failing import failing
from truestep.report.sounds import PLAYED, outlines
from truestep.report.words import also_lines, recheck_line, said
from truestep.verdict import Comparison, Media, Results, Verdict

if TYPE_CHECKING:
    import jinja2

_TEMPLATES = Path(__file__).parent / "templates"

LABELS = {0: "pass", 1: "fail", 3: "blocked", 4: "unsure"}
SIGNS = {"pass": "✓", "fail": "✕", "blocked": "⊘", "unsure": "?"}


def embedded_json(text: str) -> str:
    """JSON that is safe inside a script element."""
    return (
        text.replace("&", "\\u0026")
        .replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )


def facts(case: Mapping[str, object]) -> list[tuple[str, str]]:
    """Key and value of everything a case says except its prompt, in its own order."""
    return [
        (key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for key, value in case.items()
        if key != "prompt" and value not in (None, "", {}, [])
    ]


def sides(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Key, candidate's value and reference's value of the environment that was recorded."""
    own, theirs = comparison.actual.environment, comparison.reference.environment
    return [(key, own.get(key, "-"), theirs.get(key, "-")) for key in sorted({*own, *theirs})]


@cache
def _templates() -> jinja2.Environment:
    """The templates, each compiled once a process."""
    import jinja2
    from markupsafe import Markup, escape

    def code(text: str) -> Markup:
        """Escape a text and set what it has between backticks as code."""
        return Markup(re.sub(r"`([^`\n]+)`", r"<code>\1</code>", str(escape(text))))

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, code=code, sign=SIGNS.__getitem__)
    return environment


def page(template: str, **fields: object) -> str:
    """Render a template with the filters, the script and the policy that all pages share."""
    script = (_TEMPLATES / "report.js").read_text("utf-8")
    return (
        _templates()
        .get_template(template)
        .render(
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            **fields,
        )
    )


def render(comparisons: Sequence[Comparison]) -> str:
    """Render comparisons as one self-contained page, failing ones first.

    Args:
        comparisons: Read back from their JSON they render the same.

    Returns:
        HTML whose content security policy lets it load nothing and run nothing but its own script.
    """
    ordered = sorted(comparisons, key=lambda c: c.exit_code == 0)
    slim = [c.model_copy(update={"media": _measured(c)}) for c in ordered]
    return page(
        "report.html",
        title=_title(ordered),
        items=[(c, curve(c.rows), LABELS[c.exit_code], outcome(c)) for c in ordered],
        label=label,
        effect=lambda finding: label(Verdict(finding.effect)),
        said=said,
        also=also_lines,
        recheck=recheck_line,
        following=following,
        scored=scored,
        broken=failing,
        outlines=outlines,
        played=PLAYED,
        facts=facts,
        sides=sides,
        data=embedded_json(Results.of(slim).model_dump_json()),
    )


def _measured(comparison: Comparison) -> tuple[Media, ...]:
    """What was measured of sounds; frames and sounds are on the page already."""
    return tuple(m.measured() for m in comparison.media if m.sound)


def label(verdict: Verdict) -> str:
    """Style class of a verdict: pass, fail, blocked or unsure."""
    return LABELS[verdict.exit_code]


def outcome(comparison: Comparison) -> str:
    """The verdict in a word, or what a ledger of known failures makes of it."""
    known = comparison.known
    return "known failure" if known and known.accepted else comparison.verdict.value


def _title(comparisons: Sequence[Comparison]) -> str:
    if len(comparisons) == 1:
        return comparisons[0].sentence
    if not comparisons:
        return "invalid: there was nothing to compare"
    failed = sum(c.exit_code != 0 for c in comparisons)
    counts = Counter(outcome(c) for c in comparisons)
    kinds = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    passed = len(comparisons) - failed
    return f"{len(comparisons)} checks: {failed} did not pass, {passed} passed ({kinds})"


def write_many(path: str | Path, comparisons: Iterable[Comparison]) -> None:
    """Render and write a report atomically.

    Raises:
        WriteError: It could not be written.
    """
    write_text(path, render(list(comparisons)), "the report")
