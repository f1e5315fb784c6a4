"""The MCP server: its tools by the SDK's own client, in memory and as a process on stdio."""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands import runner, write_cases
from truestep.cli.mcp import server_of, words_of
from truestep.report.brief import MOST_TOKENS, tokens

try:
    import mcp
except ImportError:
    mcp = None

needs_mcp = pytest.mark.skipif(
    mcp is None, reason="the SDK of MCP is not installed: pip install 'truestep[mcp]'"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two files of tensors that differ."""
    import torch
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    x = torch.linspace(1, 2, 64).reshape(8, 8)
    save_file({"a": x, "b": x.clone()}, "x.safetensors")
    save_file({"a": x, "b": 1.1 * x}, "y.safetensors")
    return tmp_path


Ask = Callable[..., Awaitable[str]]


def asked(server: Any, talk: Callable[[Ask], Awaitable[None]]) -> None:
    """Talk to a server through the SDK's client."""
    import anyio

    async def main() -> None:
        async with mcp.Client(server) as client:

            async def ask(tool: str, **arguments: Any) -> str:
                found = await client.call_tool(tool, arguments)
                (content,) = found.content
                return str(content.text)

            await talk(ask)

    anyio.run(main)


def test_without_the_sdk_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from truestep.errors import MissingExtraError

    monkeypatch.setitem(sys.modules, "mcp.server.mcpserver", None)
    with pytest.raises(MissingExtraError) as caught:
        server_of(Path("results"))
    assert caught.value.hint == "pip install 'truestep[mcp]'"


def test_a_command_is_words_of_truestep_alone() -> None:
    assert words_of("truestep check a --apply 'my file.py:f'  # again") == [
        "check", "a", "--apply", "my file.py:f"
    ]  # fmt: skip
    for other in ("", "truestep", "rm -rf x", "truestep mcp", "echo; truestep check"):
        with pytest.raises(ValueError, match=r"a command begins|the server is running"):
            words_of(other)


@needs_mcp
def test_the_tools_are_few_and_described() -> None:
    import anyio

    async def main() -> None:
        async with mcp.Client(server_of(Path("results"))) as client:
            tools = (await client.list_tools()).tools
            assert [tool.name for tool in tools] == ["check", "compare", "record", "show", "run"]
            assert all(tool.description for tool in tools)
            depths = tools[0].input_schema["properties"]["depth"]["enum"]
            assert depths == ["steps", "modules", "cause"]

    anyio.run(main)


@needs_mcp
def test_a_result_in_brief_its_details_and_the_next_command(folder: Path) -> None:
    async def talk(ask: Ask) -> None:
        text = await ask("compare", actual="y.safetensors", reference="x.safetensors")
        assert tokens(text) <= MOST_TOKENS
        brief = json.loads(text)
        assert brief["verdict"] == "drifted"
        name = brief["details"].split()[2]
        assert name.startswith("results/compare-")
        (proof,) = brief["items"][0]["evidence"]
        assert "verdict            drifted" in await ask("show", result=name, id=proof["id"])
        assert "next" not in brief
        again = json.loads(await ask("run", command=brief["repeat"]))
        assert again["verdict"] == "drifted"
        assert len(list((folder / "results").iterdir())) == 2
        same = json.loads(await ask("compare", actual="x.safetensors", reference="x.safetensors"))
        assert (same["verdict"], same["exit_code"]) == ("identical", 0)

    asked(server_of(Path("results")), talk)


@needs_mcp
def test_what_cannot_be_is_told_in_the_envelope(folder: Path) -> None:
    async def talk(ask: Ask) -> None:
        found = json.loads(await ask("compare", actual="--help", reference="x.safetensors"))
        assert (found["verdict"], found["exit_code"]) == ("error", 2)
        assert found["notes"][0]["text"] == "--help"
        none = json.loads(await ask("show", result="x.safetensors", id="c0"))
        assert none["verdict"] == "error"
        other = json.loads(await ask("run", command="rm -rf x.safetensors"))
        assert (other["verdict"], other["exit_code"]) == ("error", 2)
        assert "a command begins with truestep" in other["sentence"]
        assert (folder / "x.safetensors").exists()

    asked(server_of(Path("results")), talk)


@needs_mcp
def test_a_server_on_stdio_survives_what_it_checks(
    folder: Path,
    tiny_wan: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The case is recorded, and a change that ends its process and one that prints are judged."""
    write_cases(folder, tiny_wan["wan21"], "a")
    assert runner(monkeypatch, capfd)("record", "a", "--floor", "none")[0] == 0
    (folder / "change.py").write_text(
        "import os\ndef ends(pipe):\n    os._exit(0)\n"
        'def prints(pipe):\n    print(\'{"jsonrpc": "2.0"}\')\n'
    )

    async def talk(ask: Ask) -> None:
        ended = json.loads(await ask("check", case="a", change="change.py:ends"))
        assert (ended["verdict"], ended["exit_code"]) == ("invalid", 1)
        printed = json.loads(await ask("check", case="a", change="change.py:prints"))
        assert printed["verdict"] == "identical"

    words = ["-m", "truestep", "mcp", "--results", "results"]
    import os

    server = mcp.StdioServerParameters(command=sys.executable, args=words, env=dict(os.environ))
    asked(mcp.stdio_client(server), talk)
