"""Text of files, models and users, made harmless before it reaches a terminal or a log.

Names of tensors, prompts, paths and texts of exceptions are not ours. What acts on a terminal in
them (escape sequences, C1 controls), begins a line of its own, or hides and turns round what is
read (zero-width and bidirectional characters) is shown as its escape; letters of any script stay.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence

_ACTING = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\u3164\ud800-\udfff\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e0fff]"
)
"""Unicode's Cc, Zl, Zp and Cs, what of Cf is not seen, and the letters that are blank."""


def visible(text: str, *, lines: bool = False) -> str:
    r"""Text in which nothing acts: `\x1b`, `\n`, `\u202e` are shown so.

    Args:
        text: Any text; what is visible already stays as it is.
        lines: Keep its line breaks: for text that we have put together of visible parts.
    """
    if lines:
        return "\n".join(map(visible, text.split("\n")))
    return _ACTING.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


LONGEST = 299
"""Letters of a `repr`."""


def short(text: str, most: int = LONGEST) -> str:
    """A text in which nothing acts, cut at its end."""
    text = visible(text[: 2 * most])
    return text if len(text) <= most else text[: most - 1] + "…"


def quoted(word: str) -> str:
    r"""A word as a shell takes it back: quoted where that is needed, `$'a\nb'` where something in
    it would act."""
    if not _ACTING.search(word):
        return shlex.quote(word)
    parts = (_escaped(c) if _ACTING.match(c) else "\\" + c if c in "\\'" else c for c in word)
    return f"$'{''.join(parts)}'"


def pasteable(words: Iterable[str]) -> str:
    """Words as one line that can be pasted into a shell."""
    return " ".join(map(quoted, words))


def columns() -> int:
    """How wide lines may be: of COLUMNS or the terminal, 80 where neither says it."""
    return min(max(shutil.get_terminal_size((80, 24)).columns, 40), 120)


def wrapped(
    label: str, text: str, *, most: int | None = None, indent: int = 0, split: bool = True
) -> list[str]:
    """Text as lines no wider than `columns`, the first after a label.

    Args:
        label: Begins the first line; empty: the text begins it, and what follows is indented.
        text: What is said; nothing in it acts afterwards.
        most: Lines; what is beyond is cut off, with dots at the end.
        indent: Spaces before the first line, where it has no label.
        split: Break words longer than a line; a path that is not broken can be copied.
    """
    lead = f"  {label:<12} " if label else " " * indent
    lines = textwrap.wrap(
        visible(text),
        width=columns(),
        initial_indent=lead,
        subsequent_indent=" " * (len(lead) if label else indent + 2),
        break_on_hyphens=False,
        break_long_words=split,
    )
    if most is None or len(lines) <= most:
        return lines
    last = lines[most - 1][: columns() - 4].rstrip()
    return [*lines[: most - 1], f"{last} ..."]


def command_lines(line: str) -> list[str]:
    """A line with a command as lines no wider than the terminal, with a backslash at each end that
    is not the last: still to be pasted. One line where nobody says how wide it may be."""
    if len(line) <= columns() or not (os.environ.get("COLUMNS") or sys.stdout.isatty()):
        return [line]
    command, two_spaces, comment = line.partition("  #")  # a comment is not gone on with
    lines: list[str] = []
    for word in re.findall(r"(?:'[^']*'|\"[^\"]*\"|[^\s'\"])+", command):
        if lines and len(lines[-1]) + 1 + len(word) <= columns() - 2:
            lines[-1] += f" {word}"
        else:
            lines.append(f"    {word}" if lines else word)
    pasted = [*(f"{text} \\" for text in lines[:-1]), lines[-1]]
    said = textwrap.wrap(visible(comment), width=columns() - 2) if two_spaces else []
    return [*pasted, *(f"# {text}" for text in said)]


def _escaped(character: str) -> str:
    """As `$'...'` knows it: beyond ASCII by its number, not by a byte."""
    code = ord(character)
    if code < 128:
        return character.encode("unicode_escape").decode("ascii")
    return f"\\u{code:04x}" if code < 2**16 else f"\\U{code:08x}"


def visible_json(text: str) -> str:
    """The same JSON with what acts in its strings as JSON's own escapes."""
    import json

    return "\n".join(_ACTING.sub(lambda c: json.dumps(c[0])[1:-1], x) for x in text.split("\n"))


def nearest(key: str, names: Iterable[str]) -> str:
    """A question for whoever wrote a name that there is not; empty where none is near."""
    known = [*names]
    part = [name for name in known if key.endswith(f"_{name}") or name.endswith(f"_{key}")]
    near = difflib.get_close_matches(key, known, n=1) or part
    return f"did you mean {near[0]!r}?" if near else ""


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def spans(numbers: Iterable[int], to: str = " to ", most: int | None = None) -> str:
    """`3, 7 to 9`: neighbours together, in the order in which they stand; at most so many."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    texts = [str(first) if first == last else f"{first}{to}{last}" for first, last in found]
    return ", ".join(texts[:most]) + (", ..." if len(texts) > len(texts[:most]) else "")


def slug(text: str, limit: int) -> str:
    """Lower-case letters and digits of any script, joined by dashes, cut at `limit` characters."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text[: 8 * limit]).casefold())
    joined = ""
    for word in words:
        if joined and len(joined) + 1 + len(word) > limit:
            break
        joined = f"{joined}-{word}" if joined else word[:limit]
    return joined


def say(
    text: str = "",
    *,
    err: bool = False,
    lines: bool = False,
    colour: str | None = None,
    first_word: bool = False,
) -> None:
    """Print a line, or several; all that the command line prints goes through here.

    Args:
        text: What to print; see `visible`.
        err: On stderr.
        lines: Keep the line breaks; each part of the text must be visible already.
        colour: Print it bold and in this colour, where the output is a terminal.
        first_word: Only the first word.
    """
    import click

    shown, rest = visible(text, lines=lines), ""
    if first_word:
        shown, space, rest = shown.partition(" ")
        rest = space + rest
    _echo((click.style(shown, fg=colour, bold=True) if colour else shown) + rest, err=err)


def say_json(text: str) -> None:
    """Print JSON on stdout; see `visible_json`."""
    _echo(visible_json(text), err=False)


def _echo(text: str, *, err: bool) -> None:
    """Print; where the reader (head, less) has left, what follows is printed for nobody, and the
    verb goes on to its exit code."""
    import click

    try:
        click.echo(text, err=err)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), (sys.stderr if err else sys.stdout).fileno())
