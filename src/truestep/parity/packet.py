"""The component packet beside a parity test: everything known of a component and its port.

`parity new` writes it from a search of the official repository, `parity run` fills it from what
was loaded. What is not known is listed with the search that was made for it.
"""

from __future__ import annotations

import ast
import fnmatch
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from truestep.errors import FileFormatError
from truestep.files import write_text
from truestep.parity import tomlfile
from truestep.parity.redaction import redact
from truestep.verdict import Record

_SKIPPED = frozenset({".git", ".venv", "venv", "node_modules", "__pycache__", "build", "dist"})
_LOADERS = frozenset(
    {"from_pretrained", "hf_hub_download", "snapshot_download", "load_file", "torch.load"}
)
_MOST = 12


class Definition(Record):
    """Where official classes are defined."""

    path: str
    symbols: tuple[str, ...]
    line: int = 0
    notes: str = ""


class Instantiation(Record):
    """Where an official class is built, with which arguments, as written there."""

    path: str
    symbols: tuple[str, ...]
    args: tuple[str, ...] = ()
    line: int = 0


class Unknown(Record):
    """Something that is not known, and the search that was made for it."""

    question: str
    searched: tuple[str, ...]


class Conversion(Record):
    """How official weights become the port's."""

    script: str = ""
    converted_dir: str = ""
    library: str = ""
    config: str = ""
    mapping_notes: str = ""
    loader_strictness: str = ""
    strict_load: str = "not run"


class Packet(Record):
    """Everything known of one component."""

    model_family: str
    component: str
    component_type: str
    mode: str = "parity-scaffold"
    official_ref_dir: str = ""
    official_weight_source: str = ""
    port_files: tuple[str, ...] = ()
    local_tests_readme: str = ""
    port_state_file: str = "parity.toml"
    parity_test: str = ""
    concerns: tuple[str, ...] = ()
    official_keys: str = ""
    port_keys: str = ""
    official_definition_files: tuple[Definition, ...] = ()
    official_instantiation_files: tuple[Instantiation, ...] = ()
    conversion: Conversion = Conversion()
    unknowns: tuple[Unknown, ...] = ()


@dataclass
class Findings:
    """What a search of the official repository came upon."""

    definitions: list[Definition] = field(default_factory=list)
    instantiations: list[Instantiation] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    files: int = 0
    unread: list[str] = field(default_factory=list)


def packet_path(test_file: Path) -> Path:
    """`test_parity_wan_vae.packet.toml` of `test_parity_wan_vae.py`."""
    return test_file.with_name(f"{test_file.stem}.packet.toml")


def read_packet(path: Path) -> Packet | None:
    """The packet, or None where there is none.

    Raises:
        FileFormatError: It is damaged.
    """
    if not path.exists():
        return None
    data = tomlfile.read(path, "the component packet")
    try:
        return Packet.model_validate(data)
    except ValidationError as error:
        raise FileFormatError(
            "the component packet is damaged",
            where=str(path),
            measured=str(error.errors()[0]["loc"]) + ": " + error.errors()[0]["msg"],
        ) from None


def write_packet(path: Path, packet: Packet) -> None:
    """Write a packet; no access token survives it."""
    text = tomlfile.dumps(packet.model_dump(mode="json", exclude_none=True))
    write_text(path, redact(text), "the component packet")


def search(folder: Path, symbol: str) -> Findings:
    """Look through a repository's Python files without importing any.

    Args:
        folder: The official repository.
        symbol: Class to find; with none, classes that are torch modules are listed.
    """
    found = Findings()
    for path in _python_files(folder):
        found.files += 1
        name = path.relative_to(folder).as_posix()
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError, ValueError) as error:
            found.unread.append(f"{name} ({type(error).__name__})")
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                _definition(node, name, symbol, found)
            elif isinstance(node, ast.Call):
                _call(node, name, symbol, found)
    return found


def _python_files(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in _SKIPPED and not f.startswith("."))
        for file in sorted(fnmatch.filter(files, "*.py")):
            yield Path(root) / file


def _definition(node: ast.ClassDef, path: str, symbol: str, found: Findings) -> None:
    bases = [ast.unparse(base) for base in node.bases]
    if node.name == symbol:
        note = f"bases: {', '.join(bases)}" if bases else ""
        found.definitions.append(
            Definition(path=path, symbols=(node.name,), line=node.lineno, notes=note)
        )
    elif any(base.rpartition(".")[2] in ("Module", "ModelMixin") for base in bases):
        found.modules.append(f"{node.name} ({path}:{node.lineno})")


def _call(node: ast.Call, path: str, symbol: str, found: Findings) -> None:
    """What a call builds or loads; of a repository's thousands, few are put into words."""
    names = _identifiers(node.func)
    builds = bool(symbol) and symbol in names
    loads = not _LOADERS.isdisjoint((".".join(names), *names[-1:]))
    if not builds and not loads:
        return
    name = ast.unparse(node.func)
    arguments = tuple(_argument(item) for item in (*node.args, *node.keywords))
    if builds:
        found.instantiations.append(
            Instantiation(path=path, symbols=(name,), args=arguments, line=node.lineno)
        )
    if loads:
        found.sources.append(f"{name}({', '.join(arguments)[:120]}) ({path}:{node.lineno})")


def _identifiers(node: ast.AST) -> list[str]:
    """`a.b.c` as its parts; of what is no name, the parts that follow it."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [*([node.id] if isinstance(node, ast.Name) else []), *reversed(parts)]


def _argument(node: ast.AST) -> str:
    if isinstance(node, ast.keyword):
        value = ast.unparse(node.value)
        return f"{node.arg}={value}" if node.arg else f"**{value}"
    return ast.unparse(node)


def describe(
    packet: Packet, findings: Findings | None, *, symbol: str, weights_variable: str
) -> Packet:
    """A packet with what a search found, and what it did not as unknowns.

    Args:
        packet: To add to.
        findings: Of `search`; None where no repository was given.
        symbol: The class that was looked for.
        weights_variable: Environment variable of the weights folder.
    """
    unknowns: list[Unknown] = []
    if findings is None:
        where: tuple[str, ...] = ("no official repository was given: --official-dir DIR",)
    else:
        where = (f"{findings.files} Python files of the official repository, parsed",)
        where += tuple(f"unreadable: {name}" for name in findings.unread[:_MOST])
    found = findings or Findings()
    if not symbol:
        listed = tuple(f"torch module: {name}" for name in found.modules[:_MOST])
        question = "which official class is this component?"
        unknowns.append(Unknown(question=question, searched=where + listed))
    if symbol and not found.definitions:
        near = tuple(f"torch module: {name}" for name in found.modules[:_MOST])
        question = f"where is {symbol} defined?"
        unknowns.append(Unknown(question=question, searched=where + near))
    if symbol and not found.instantiations:
        question = f"where is {symbol} built, with which arguments?"
        unknowns.append(Unknown(question=question, searched=where))
    sources = found.sources[:_MOST]
    given = os.environ.get(weights_variable)
    if not (sources or given):
        question = "where do the official weights come from?"
        unset = f"${weights_variable} (not set)"
        unknowns.append(Unknown(question=question, searched=(*where, unset)))
    return packet.model_copy(
        update={
            "official_definition_files": tuple(found.definitions),
            "official_instantiation_files": tuple(found.instantiations[:_MOST]),
            "official_weight_source": redact("; ".join(sources)),
            "unknowns": tuple(unknowns),
        }
    )


def listed(packet: Packet | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Definition and instantiation files as `path:line (symbol)`."""
    if packet is None:
        return (), ()

    def names(items: Sequence[Definition | Instantiation]) -> tuple[str, ...]:
        return tuple(f"{i.path}:{i.line} ({', '.join(i.symbols)})" for i in items)

    return names(packet.official_definition_files), names(packet.official_instantiation_files)
