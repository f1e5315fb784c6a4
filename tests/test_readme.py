"""The README's blocks, and those of the documentation, run and print what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import documents
from tests.commands import command

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
IN_PYTHON = ("faster", "functions", "latents", "pipelines", "training")
"""Pages whose blocks of Python all run by themselves."""


def comparable(text: str) -> str:
    """Measured numbers differ between machines, and with them where a line is broken; everything
    else must not."""
    text = re.sub(r"\d(\.\d{1,2})?e[+-]\d\d", "N", text)
    text = re.sub(r"(worst at|worst) [\d.]+ x", r"\1 N x", text)
    text = re.sub(r"from \d+ benign runs", "from N benign runs", text)  # one a number of cores
    text = re.sub(r"; \d+\.\d\d s", "; S s", text)
    text = re.sub(r"\d+\.\d (k|M)B", "S B", text)
    text = re.sub(r"above \d+(\.\d+)?( to \d+(\.\d+)?)? x", "above B x", text)
    text = re.sub(r"(flash-cpu|math)", "KERNEL", text)
    text = re.sub(r"[0-9a-f]{12}", "HASH", text)
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:+]+ by truestep [\d.]+", "WHEN, WHICH", text)
    return " ".join(text.split())


@pytest.mark.slow
@pytest.mark.parametrize("page", documents.pages(), ids=lambda page: page.stem)
def test_a_page_prints_what_it_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in documents.HELD:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", documents.with_python()["PATH"])
    said = page.read_text("utf-8")

    def ran(words: list[str], folder: Path) -> str:
        done = command(*words, cwd=folder)
        assert done.returncode in (0, 1, 3, 4), done.stderr
        return done.stdout

    assert comparable(documents.rewritten(said, tmp_path, ran)) == comparable(said)


def test_every_command_of_the_readme_is_run() -> None:
    blocks = [block for block in documents.BLOCK.finditer(README) if block["language"] == "console"]
    assert blocks
    assert all(block["mark"] for block in blocks)
    assert len(README.splitlines()) <= 200


UNMARKED = re.compile(r"(?<!<!-- run -->\n)(?<! -->\n)```console\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_console_block_is_run_or_says_why_not(page: Path) -> None:
    text = page.read_text("utf-8")
    assert not UNMARKED.search(text), "mark it `<!-- run -->` or `<!-- not run: needs ... -->`"
    for reason in re.findall(r"<!-- not run:(.*?)-->", text):
        assert len(reason.split()) >= 2, reason
    assert UNMARKED.search("text\n\n```console\n$ truestep x\n```")
    assert not UNMARKED.search("<!-- not run: needs a server -->\n```console\n")


@pytest.mark.parametrize("page", IN_PYTHON)
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / f"{page}.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, f"{page}.md", "exec"), {"__name__": "document"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_named_options_and_files_exist(page: Path) -> None:
    from truestep.cli import check, record

    text = page.read_text("utf-8")
    known = {
        option
        for command in (check.command, record.command)
        for parameter in command.params
        for option in parameter.opts
    }
    for option in set(re.findall(r"truestep (?:check|record)\b.*?(--[a-z-]+)", text)):
        assert option in known
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target


def test_every_verb_and_every_word_has_its_place() -> None:
    from truestep.cli.app import FURTHER, VERBS
    from truestep.verdict import Verdict

    index = (ROOT / "docs" / "verbs.md").read_text("utf-8")
    nav = (ROOT / "mkdocs.yml").read_text("utf-8")
    for verb in (*VERBS, *FURTHER):
        page = (ROOT / "docs" / "verbs" / f"{verb}.md").read_text("utf-8")
        assert page.startswith(f"# {verb}\n"), verb
        assert "```console\n" in page, verb
        assert f"](verbs/{verb}.md)" in index, verb
        assert f": verbs/{verb}.md\n" in nav, verb
    glossary = (ROOT / "docs" / "glossary.md").read_text("utf-8")
    for verdict in Verdict:
        assert f"`{verdict.value}`" in glossary
