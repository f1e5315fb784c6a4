"""`truestep references`: what it prints, asks for and refuses; a team of two in two clones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.commands import Run, runner, write_cases
from tests.recording.test_team import commit, git
from truestep.recording.lock import read_lock

ROOT = Path("truestep-references")


@pytest.fixture
def run(
    tiny_wan: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """The command line in a repository with two cases and a store."""
    for key in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{key}_NAME", "Ada")
        monkeypatch.setenv(f"{key}_EMAIL", "ada@example.org")
    monkeypatch.setenv("TRUESTEP_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "ada"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    git(folder, "config", "user.name", "Ada")
    git(folder, "config", "user.email", "ada@example.org")
    write_cases(folder, tiny_wan["wan21"], "a", "b")
    text = (folder / "truestep.toml").read_text()
    (folder / "truestep.toml").write_text('[references]\nstore = "../store"\n' + text)
    (folder / ".gitignore").write_text("*.safetensors\n")
    monkeypatch.chdir(folder)
    return runner(monkeypatch, capsys)


def test_a_team_of_two(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("record", "--floor", "none")[0] == 0
    code, out, _ = run("references", "status")
    assert code == 0
    assert out.count("not promoted; draft ") == 2
    assert "next: truestep references push" in out
    code, out, _ = run("references", "push")
    assert code == 0
    assert ": 2 sent (" in " ".join(out.split())
    assert "next: truestep references promote " in run("references", "status")[1]
    code, out, _ = run("references", "promote", "a", "--reason", "the first")
    assert code == 0
    assert out.startswith("PROMOTED ")
    assert " Ada <ada@example.org>, " in out
    assert "commit none: the first" in " ".join(out.split())
    assert "commit: git add truestep-references/truestep.lock" in out
    commit(Path())

    git(tmp_path, "clone", "-q", "ada", "bob")
    monkeypatch.chdir(tmp_path / "bob")
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    git(Path(), "config", "user.name", "Bob")
    assert list(Path().rglob("*.safetensors")) == []
    code, out, _ = run("references", "status")
    assert out.count("not here; in the store") == 2
    assert run("check", "a")[0] == 0
    assert len(list(ROOT.glob("*/*/*/*.safetensors"))) == 1
    assert run("references", "pull")[0] == 0
    assert len(list(ROOT.glob("*/*/*/*.safetensors"))) == 2

    Path("change.py").write_text(
        "def louder(pipe):\n    pipe.transformer.proj_out.bias.data += 0.5\n"
    )
    change = ("--apply", "change.py:louder", "--update", "--floor", "none")
    code, out, _ = run("record", "a", *change)
    assert code == 0
    assert "/drafts/" in out
    assert "check: truestep check --reference truestep-references/drafts/" in out
    assert run("check", "a")[0] == 0  # by the promoted one, as before
    code, out, _ = run("references", "promote", "a", "--reason", "it is louder", "--who", "Bo")
    assert code == 0
    assert "which it replaces: drifted" in " ".join(out.split())
    assert " Bo, " in out
    assert run("check", "a")[0] == 1
    code, out, _ = run("references", "list", "--history", "a")
    assert "the first" in out
    assert "it is louder" in out
    assert "made on " in out
    code, out, _ = run("references", "rollback", "a", "--reason", "louder was wrong")
    assert code == 0
    assert out.startswith("ROLLED BACK ")
    assert run("check", "a")[0] == 0
    code, out, _ = run("references", "verify")
    assert code == 0
    assert " ".join(out.split()).startswith("VERIFIED 3 contents in ")


def test_json_of_list_and_status(run: Run) -> None:
    run("record", "a", "--floor", "none")
    run("references", "promote", "a", "--reason", "the first")
    code, out, _ = run("references", "status", "--json")
    assert code == 0
    (told,) = json.loads(out)["references"]
    assert told["here"] == "yes"
    assert told["in_store"] == {told["promoted"]: True}
    code, out, _ = run("references", "list", "--json")
    (told,) = json.loads(out)["references"]
    assert told["history"][0]["reason"] == "the first"


def test_a_promotion_asks_for_a_reason(run: Run) -> None:
    run("record", "a", "--floor", "none")
    for words in ((), ("--reason", " ")):
        code, _, err = run("references", "promote", "a", *words)
        assert code == 2
        assert "a reason is needed" in err
    assert all(not entry.history for entry in read_lock(ROOT).references.values())


def test_one_reference_at_a_time_by_case_id_or_path(run: Run) -> None:
    run("record", "--floor", "none")
    code, _, err = run("references", "promote", "--reason", "x")
    assert code == 2
    assert "2 are meant" in err
    key = next(iter(read_lock(ROOT).references))
    assert run("references", "promote", key.removesuffix(".safetensors"), "--reason", "x")[0] == 0
    case_id = Path(key).stem
    assert run("references", "rollback", case_id, "--reason", "x")[0] == 2
    code, _, err = run("references", "list", "aa")
    assert code == 2
    assert "did you mean 'a'?" in err


def test_without_a_store_it_says_how_to_name_one(run: Run) -> None:
    text = Path("truestep.toml").read_text()
    Path("truestep.toml").write_text(text.partition("\n\n")[2])
    run("record", "a", "--floor", "none")
    code, _, err = run("references", "push")
    assert code == 2
    assert "no store is named" in err
    code, out, _ = run("references", "status")
    assert code == 0
    assert "store: none is named" in out
    assert run("references", "push", "--store", "../other")[0] == 0


def test_prune_lists_and_removes_only_with_yes(run: Run, tmp_path: Path) -> None:
    run("record", "a", "--floor", "none")
    run("references", "push")
    run("record", "a", "--floor", "none", "--update")
    (stored,) = (tmp_path / "store").glob("objects/*/*")
    code, out, _ = run("references", "prune")
    assert code == 0
    assert "WOULD PRUNE 0 objects" in out  # it is young
    for words in (("--older-than", "0"), ("--older-than", "0", "--yes", "--dry-run")):
        code, out, _ = run("references", "prune", *words)
        assert code == 0
        assert f"would remove: {stored.name[:12]}" in out
        assert "--older-than 0" in out
        assert stored.exists()
    code, out, _ = run("references", "prune", "--older-than", "0", "--yes")
    assert code == 0
    assert "PRUNED 1 of 1 objects, 0 are needed or too young" in out
    assert not stored.exists()
    assert run("references", "prune", "a")[0] == 2


def test_adopt_takes_a_file_of_another_machine(run: Run, tmp_path: Path) -> None:
    run("record", "a", "--floor", "none", "--output", str(tmp_path / "r.safetensors"))
    code, out, _ = run("references", "adopt", str(tmp_path / "r.safetensors"))
    assert code == 0
    assert out.startswith("ADOPTED ")
    words = next(line for line in out.splitlines() if line.startswith("promote: truestep "))
    assert "references promote default/cpu/" in words
    assert run("check", "a")[0] == 0


def test_hints_carry_the_folder_and_a_store_without_secrets(run: Run) -> None:
    run("record", "--floor", "none", "--references", "my refs")
    said = ("--references", "my refs", "--store", "../other store")
    _, _, err = run("references", "promote", "--reason", "x", *said)
    assert (
        "hint: truestep references list --references 'my refs' --store '../other store'"
        "  # each first line names one" in err
    )
    said = ("--references", "my refs", "--store", "https://me:geheim@127.0.0.1:1/x")
    code, out, err = run("references", "push", *said)
    assert code == 2
    assert "geheim" not in out + err
