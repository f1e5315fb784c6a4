"""Results as Markdown for a pull request: a comment that is replaced, and the summary of a job.

What files, prompts and models say is set as code, and every character of it that Markdown, HTML or
GitHub could act on is an entity: no mention, no link, no reference, no tag comes of it. Pictures
cannot be drawn: GitHub takes `data:` addresses out, so they are linked where the report is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from truestep.records import Ladder
from truestep.report.brief import brief_of, shortened
from truestep.report.html import LABELS, SIGNS, outcome
from truestep.report.items import Item, items_of
from truestep.report.results_file import AnyResult
from truestep.report.words import change_text
from truestep.text import visible
from truestep.verdict import Comparison, Results, Rows

MOST_COMMENT = 60_000
"""Characters of a comment; GitHub takes 65,536."""

MOST_SUMMARY = 900_000
"""Characters of a summary; GitHub takes 1 MiB."""

_LETTERS, _MOST_ITEMS, _MOST_PROOFS, _MOST_RUNS, _MOST_STEPS = 500, 200, 12, 20, 120
_ACTING = re.compile(r"[^\w\s(),;%+/.-]|_|(?<=(?i:www))\.|-(?=-)", re.ASCII)
"""What Markdown, HTML or GitHub may act on; letters of any script are left as they are."""

_BARS = "▁▂▃▄▅▆▇█"
_HIGHEST = 1e4
"""Ratio to the floor that is a full bar."""


@dataclass(frozen=True)
class Frame:
    """What stands around a result.

    Attributes:
        key: Tells the comments of several workflows apart.
        link: Address of the artifact with report and results.
        claimed_by: Commit of a run that nobody vouches for, whose results these are.
    """

    key: str = "truestep"
    link: str = ""
    claimed_by: str = ""


def marker(key: str) -> str:
    """The first line of a comment, which is not seen; by it the comment is found again."""
    return f"<!-- truestep:{re.sub(r'[^A-Za-z0-9_.-]', '', key)[:60]} -->"


def code(text: str, letters: int = _LETTERS) -> str:
    """Text that is not ours, as code in which nothing acts."""
    plain = shortened(visible(text), letters)
    return f"<code>{_entities(plain) or '&#32;'}</code>"


def _entities(text: str) -> str:
    def entity(found: re.Match[str]) -> str:
        return f"&#{ord(found[0])};" if found[0].isascii() else found[0]

    return _ACTING.sub(entity, text)


def comment(result: AnyResult, frame: Frame) -> str:
    """A comment of a pull request."""
    return "\n".join([marker(frame.key), *_lines(result, frame, MOST_COMMENT, opened=False)]) + "\n"


def summary(result: AnyResult, frame: Frame) -> str:
    """The summary of a job: the same, with all that did not pass unfolded."""
    return "\n".join(_lines(result, frame, MOST_SUMMARY, opened=True)) + "\n"


def _lines(result: AnyResult, frame: Frame, most: int, *, opened: bool) -> Iterator[str]:
    """Lines while there is room; what has none is counted."""
    items = sorted(items_of(result), key=lambda item: item.exit_code == 0)
    brief = brief_of(result)
    head = [f"### truestep: {_sign(brief.exit_code)} {brief.verdict}", "", code(brief.sentence), ""]
    head += _claim(frame)
    head += _changed(result)
    head += ["| | case | verdict | where |", "|---|---|---|---|"] if items else []
    tail = ["", *_tail(result, frame)]
    room = most - sum(len(line) + 1 for line in (*head, *tail)) - 200
    told = [_table_row(item, _word(result, item)) for item in items[:_MOST_ITEMS]]
    shown, left = _fitting(told, room // 2)
    room -= room // 2 - left
    yield from [*head, *shown]
    if len(shown) < len(items):
        yield f"\n{len(items) - len(shown)} more are in the results."
    failed = (item for item in items if item.exit_code)
    parts = (_details(result, i, frame, whole=brief.sentence, opened=opened) for i in failed)
    blocks = ["\n".join(part) for part in parts]
    folded, _ = _fitting(blocks, room)
    yield from folded
    if len(folded) < len(blocks):
        yield f"\nDetails of {len(blocks) - len(folded)} more are in the results."
    yield from tail


def _fitting(texts: Sequence[str], room: int) -> tuple[list[str], int]:
    """The first texts that there is room for, and the room that is left."""
    kept = []
    for text in texts:
        if len(text) + 1 > room:
            break
        kept.append(text)
        room -= len(text) + 1
    return kept, room


def _sign(exit_code: int) -> str:
    return SIGNS[LABELS[exit_code]]


def _word(result: AnyResult, item: Item) -> str:
    """The verdict of an item, or what a ledger of known failures makes of it."""
    found = _comparison(result, item)
    return item.verdict if found is None else outcome(found)


def _comparison(result: AnyResult, item: Item) -> Comparison | None:
    if isinstance(result, Comparison):
        return result
    return result.comparisons[int(item.id[1:])] if isinstance(result, Results) else None


def _claim(frame: Frame) -> list[str]:
    if not frame.claimed_by:
        return []
    return [
        f"> This is what the run of {code(frame.claimed_by, 40)} says of itself. The code under "
        "test wrote it, and could have written anything: nothing of it was run or measured again "
        "here.",
        "",
    ]


def _changed(result: AnyResult) -> list[str]:
    """What decides and was changed: before all that passes by it."""
    every = result.comparisons if isinstance(result, Results) else (result,)
    found = [c for each in every if isinstance(each, Comparison) for c in each.rule_changes]
    told = [f"- {code(change_text(change), 400)}" for change in dict.fromkeys(found)]
    more = [f"- {len(told) - _MOST_PROOFS} more"] if len(told) > _MOST_PROOFS else []
    first = "**What decides was changed, too:**"
    return [first, "", *told[:_MOST_PROOFS], *more, ""] if told else []


def _table_row(item: Item, word: str) -> str:
    where = code(item.place.text, 160) if item.place else ""
    return f"| {_sign(item.exit_code)} | {code(item.name, 100)} | {word} | {where} |"


def _details(
    result: AnyResult, item: Item, frame: Frame, *, whole: str, opened: bool
) -> Iterator[str]:
    """What is known of one part that did not pass.

    Args:
        whole: The sentence above, which is not said twice.
    """
    yield f"\n<details{' open' if opened else ''}><summary>{code(item.name, 100)}</summary>\n"
    if item.sentence != whole:
        yield f"{code(item.sentence)}\n"
    if item.cause:
        yield f"- **cause** {code(item.cause)}"
    if item.place and item.place.file:
        yield f"- **line** {code(f'{item.place.file}:{item.place.line}')}"
    for proof in item.evidence[:_MOST_PROOFS]:
        yield f"- {code(proof.id)} {code(proof.text, 300)}"
    if len(item.evidence) > _MOST_PROOFS:
        yield f"- {len(item.evidence) - _MOST_PROOFS} more"
    found = _comparison(result, item)
    if found is not None:
        yield from _steps(found)
        yield from _pictures(found, frame)
        if found.evidence is not None and found.evidence.ladder is not None:
            yield from _ladder(found.evidence.ladder)
    if found is not None and found.shift is not None:
        yield f"- **ends** {code(found.shift.ladder, 300)}"
    for label, text in (("cost", item.cost), ("next", item.next)):
        if text:
            yield f"- **{label}** {code(text)}"
    if item.decide:
        yield f"- **to decide** {item.decide}"
    yield "\n</details>"


def _steps(comparison: Comparison) -> Iterator[str]:
    """Largest ratio to the floor at every step, a bar each."""
    worst: dict[int, float] = {}
    fields = Rows.of(comparison.rows).each("step", "stage", "ratio", "verdict")
    for step, stage, ratio, verdict in fields:
        if step is not None and step >= 0 and not stage.endswith("module"):
            height = ratio if ratio is not None else 0.0 if verdict.passed else math.inf
            worst[step] = max(worst.get(step, 0.0), math.inf if math.isnan(height) else height)
    if len(worst) < 2:
        return
    steps = sorted(worst)[:_MOST_STEPS]
    bars = "".join(_bar(worst[step]) for step in steps)
    highest = max(worst, key=lambda step: worst[step])
    yield (
        f"- **steps** {steps[0]} to {steps[-1]}: {bars} (largest at step {highest}: "
        f"{worst[highest]:.3g} x the noise floor; the lowest bar is within it)"
    )


def _bar(ratio: float) -> str:
    share = math.log10(min(max(ratio, 1.0), _HIGHEST)) / math.log10(_HIGHEST)
    return _BARS[math.ceil(share * (len(_BARS) - 1))]


def _pictures(comparison: Comparison, frame: Frame) -> Iterator[str]:
    """Which pictures and sounds there are to see, and where."""
    where = f"in [the report]({frame.link})" if frame.link else "in the report of the run"
    for media in comparison.media:
        numbers = ", ".join(str(triple.index) for triple in media.frames[:20])
        frames = f", frames {numbers}: both sides and their difference" if numbers else ""
        sound = ", with its sound" if media.sound is not None else ""
        yield f"- **to see** {code(media.name, 80)}{frames}{sound}, {where}"


def _ladder(ladder: Ladder) -> Iterator[str]:
    """Where the run lies between reruns and other seeds of the trusted side."""
    yield f"- **other runs** {code(ladder.text)}"
    yield ""
    yield "| distance | run | |"
    yield "|---:|---|---|"
    for run in ladder.runs[:_MOST_RUNS]:
        role = f"**{run.role}**" if run.role == "actual" else run.role
        yield f"| {run.distance:.3g} | {role} | {code(run.label, 80)} |"
    if len(ladder.runs) > _MOST_RUNS:
        yield f"| | {len(ladder.runs) - _MOST_RUNS} more | |"
    yield ""


def _tail(result: AnyResult, frame: Frame) -> list[str]:
    version = code(_versions(result), 40)
    link = f" · [report and results]({frame.link})" if frame.link else ""
    return [f"<sub>truestep {version}{link}</sub>"]


def _versions(result: AnyResult) -> str:
    if isinstance(result, Results):
        found: Mapping[str, None] = dict.fromkeys(c.tool_version for c in result.comparisons)
        return ", ".join(filter(None, found))
    return str(getattr(result, "tool_version", ""))
