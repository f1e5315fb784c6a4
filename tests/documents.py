"""Pages of Markdown whose blocks are run: files that they name, commands and what those print.

python -m tests.documents [PAGES]     runs the commands of pages, writes what they print into them

A block of `toml` or `python` whose first line is `# NAME: ...` or `# NAME` is a file. A `console`
block after `<!-- run -->` is run, all of a page in one folder.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(?P<mark><!-- run -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.S)
_FILE = re.compile(r"# ([\w./-]+\.(?:py|toml))(?::.*)?\n")

HELD = ("COLUMNS", "GITHUB_ACTIONS", "CI")
"""Variables that change what is printed."""

Ran = Callable[[list[str], Path], str]
"""Words after `truestep` and the folder, to what is printed on stdout."""


def pages() -> list[Path]:
    """Pages that have blocks to run."""
    listed = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in listed if "<!-- run -->\n" in page.read_text("utf-8")]


def commands(block: str) -> Iterator[tuple[str, list[str]]]:
    """Each command of a block, and the lines under it."""
    found: list[tuple[str, list[str]]] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    yield from found


def rewritten(page: str, folder: Path, ran: Ran) -> str:
    """A page with what its commands print now.

    Args:
        folder: Where they run; the page's files are written there.
    """

    def again(block: re.Match[str]) -> str:
        file = _FILE.match(block["text"])
        if block["language"] in ("toml", "python") and file:
            (folder / file[1]).write_text(block["text"], encoding="utf-8")
        if not block["mark"]:
            return block[0]
        lines = []
        for command, _ in commands(block["text"]):
            program, *words = shlex.split(command)
            assert program == "truestep", command
            printed = ran(words, folder).replace(f"{folder}{os.sep}", "")
            lines += [f"$ {command}", *printed.rstrip("\n").splitlines()]
        return f"{block['mark']}```console\n" + "\n".join(lines) + "\n```"

    return BLOCK.sub(again, page)


def with_python() -> dict[str, str]:
    """The environment, in which `python` is this one."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}


def main() -> None:
    """Rewrite pages in place."""

    def ran(words: list[str], folder: Path) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "truestep", *words],
            cwd=folder,
            env={key: value for key, value in with_python().items() if key not in HELD},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert done.returncode in (0, 1, 3, 4), words
        return done.stdout

    for page in [Path(name) for name in sys.argv[1:]] or pages():
        with TemporaryDirectory() as folder:
            page.write_text(rewritten(page.read_text("utf-8"), Path(folder), ran), "utf-8")


if __name__ == "__main__":
    main()
