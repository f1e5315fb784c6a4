"""Where probes run: their variables, what a verdict depends on, mixed checkpoints, what is kept."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from truestep.errors import UsageError
from truestep.experiment.bisecting import checkpoints
from truestep.experiment.bisecting.identity import fingerprint, interpreter_of
from truestep.experiment.bisecting.isolation import FRESH, environment, filled
from truestep.experiment.bisecting.records import Attempt
from truestep.experiment.bisecting.search import Outcome
from truestep.experiment.bisecting.store import Store


def test_caches_are_fresh_and_weights_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    for name in ("HF_HOME", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_DIR", "/elsewhere/.git")
    monkeypatch.setenv("ACME", "1")
    one = environment(tmp_path / "1", ["TMPDIR"], {"ACME": None, "N": "2"})
    for name in set(FRESH) - {"TMPDIR"}:
        assert Path(one[name]).is_relative_to(tmp_path / "1")
        assert Path(one[name]).is_dir()
    assert one["HF_HOME"] == "/home/ann/.cache/huggingface"
    assert one["PYTHONUSERBASE"] == "/home/ann/.local"
    assert one.get("TMPDIR") == os.environ.get("TMPDIR")
    assert "GIT_DIR" not in one
    assert "ACME" not in one
    assert one["N"] == "2"
    monkeypatch.setenv("HF_HOME", "/big/hf")
    assert environment(tmp_path / "2", [], {})["HF_HOME"] == "/big/hf"


def test_only_places_in_braces_are_filled_in() -> None:
    assert filled(["a", "{repo}/x={repo}", "{other}", "{}"], {"repo": "/r"}) == [
        "a", "/r/x=/r", "{other}", "{}",
    ]  # fmt: skip


def test_the_interpreter_of_a_command_is_found(tmp_path: Path) -> None:
    assert interpreter_of([sys.executable, "x.py"], tmp_path) == sys.executable
    script = tmp_path / "tool"
    script.write_text(f"#!{sys.executable}\n")
    assert interpreter_of([str(script)], tmp_path) == sys.executable
    script.write_text("#!/bin/sh\n")
    assert Path(interpreter_of(["./tool"], tmp_path)).name.startswith("python")


def test_a_verdict_depends_on_files_that_the_command_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder = tmp_path / "case.toml", tmp_path / "refs"
    file.write_text("a")
    folder.mkdir()
    command = [sys.executable, "x", f"--file={file}", "refs"]
    first = fingerprint(command, tmp_path)
    assert fingerprint(command, tmp_path) == first
    file.write_text("b")
    second = fingerprint(command, tmp_path)
    (folder / "r").write_text("r")
    third = fingerprint(command, tmp_path)
    monkeypatch.setenv("TORCH_BLAS_PREFER_CUBLASLT", "1")
    fourth = fingerprint(command, tmp_path)
    assert len({first, second, third, fourth, fingerprint([*command, "-v"], tmp_path)}) == 5


def test_a_verdict_depends_on_every_variable_but_those_of_the_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fingerprint([sys.executable], tmp_path)
    for name in ("SHLVL", "OLDPWD", "TERM", "TERM_PROGRAM", "COLUMNS", "SSH_TTY", "TMPDIR"):
        monkeypatch.setenv(name, "7")
    assert fingerprint([sys.executable], tmp_path) == first
    monkeypatch.setenv("LIMIT_OF_MY_JUDGE", "7")
    assert fingerprint([sys.executable], tmp_path) != first


def attempt(outcome: Outcome, why: str = "search", code: int = 0) -> Attempt:
    return Attempt(point="p", key="k", why=why, outcome=outcome, exit_code=code)


def test_only_what_was_seen_twice_and_never_otherwise_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.prepare()
    good, bad = attempt(Outcome.GOOD), attempt(Outcome.BAD, code=1)
    store.add("k", good)
    assert store.verdict("k") is None
    store.add("k", good)
    assert store.verdict("k") is not None
    store.add("k", bad)
    assert store.verdict("k") is None
    store.contradict("k")
    store.add("k", attempt(Outcome.SKIPPED, code=3))
    assert store.verdict("k") is None
    (store.folder / "verdicts" / "k.json").write_text("{damaged")
    assert store.verdict("k") is None


@given(st.integers(0, 4), st.integers(0, 200))
def test_a_log_that_was_cut_anywhere_is_read_to_its_last_whole_line(whole: int, cut: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        store.prepare()
        for number in range(whole):
            store.append("k", attempt(Outcome.GOOD, why=f"w{number}"))
        line = attempt(Outcome.BAD).model_dump_json().encode()
        with (store.folder / "runs" / "k.jsonl").open("ab") as file:
            file.write(line[: min(cut, len(line) - 1)])
        assert [answer.why for answer in store.log("k")] == [f"w{n}" for n in range(whole)]


Tensors = dict[str, np.ndarray]


def checkpoint(
    folder: Path, components: Mapping[str, Tensors], files: Mapping[str, str] | None = None
) -> None:
    for name, tensors in components.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, {"format": "pt"})
    for name, text in (files or {}).items():
        (folder / name).write_text(text)


def pair(tmp_path: Path) -> checkpoints.Pair:
    return checkpoints.pair(f"{tmp_path / 'a'}..{tmp_path / 'b'}")


def build(found: checkpoints.Pair, chosen: list[checkpoints.Item], scratch: Path) -> Path:
    scratch.mkdir(parents=True)
    with checkpoints.setting(found, chosen, scratch, "id").place(scratch) as place:
        path = place.words["weights"]
        assert place.variables[checkpoints.VARIABLE] == path
        return Path(path)


@given(data=st.data())
def test_a_mixed_checkpoint_holds_each_tensor_of_its_side(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In two shards that the sides divide differently, of several types and shapes."""
    tmp = tmp_path_factory.mktemp("mixed")
    dice = np.random.default_rng(data.draw(st.integers(0, 1000)))
    names = [f"b.{n}.w" for n in range(data.draw(st.integers(2, 7)))]
    types = [np.float32, np.float16, np.int8]
    good = {
        n: dice.integers(0, 99, (2, dice.integers(0, 4))).astype(dice.choice(types)) for n in names
    }
    bad = {n: dice.integers(0, 99, (3, 2)).astype(dice.choice(types)) for n in names}
    for side, values in (("a", good), ("b", bad)):
        at = data.draw(st.integers(1, len(names) - 1))
        parts = {"t/1.safetensors": names[:at], "t/2.safetensors": names[at:]}
        checkpoint(tmp / side, {f: {n: values[n] for n in part} for f, part in parts.items()})
    found = pair(tmp)
    chosen = data.draw(st.lists(st.sampled_from(found.items), unique=True))
    path = build(found, chosen, tmp / "scratch")
    mixed = {**load_file(path / "t/1.safetensors"), **load_file(path / "t/2.safetensors")}
    taken = {item.key for item in chosen}
    assert mixed.keys() == set(names)
    for name in names:
        expected = bad[name] if name in taken else good[name]
        assert mixed[name].dtype == expected.dtype
        np.testing.assert_array_equal(mixed[name], expected)


def test_equal_tensors_and_files_are_no_suspects(tmp_path: Path) -> None:
    one = np.ones(3, np.float32)
    checkpoint(tmp_path / "a", {"t/m.safetensors": {"x": one, "y": one}}, {"c.json": "1", "d": "2"})
    checkpoint(
        tmp_path / "b", {"t/m.safetensors": {"x": one, "y": 2 * one}}, {"c.json": "3", "d": "2"}
    )
    found = pair(tmp_path)
    assert [(item.kind, item.name) for item in found.items] == [
        ("file", "c.json"),
        ("tensor", "t/y"),
    ]
    path = build(found, [found.items[0]], tmp_path / "s")
    assert (path / "c.json").read_text() == "3"
    assert (path / "t/m.safetensors").is_symlink()


def test_components_that_do_not_pair_are_exchanged_whole(tmp_path: Path) -> None:
    one = np.ones(3, np.float32)
    checkpoint(tmp_path / "a", {"t/m.safetensors": {"x": one}, "v/m.safetensors": {"z": one}})
    checkpoint(
        tmp_path / "b", {"t/n.safetensors": {"x": one, "more": one}, "v/m.safetensors": {"z": one}}
    )
    found = pair(tmp_path)
    assert [(item.kind, item.name) for item in found.items] == [("component", "t")]
    path = build(found, [*found.items], tmp_path / "s")
    assert sorted(str(each.relative_to(path)) for each in path.rglob("*.safetensors")) == [
        "t/n.safetensors",
        "v/m.safetensors",
    ]


def test_two_files_are_mixed_into_one(tmp_path: Path) -> None:
    one = np.ones(3, np.float32)
    save_file({"x": one, "y": one}, tmp_path / "a")
    save_file({"x": one, "y": 2 * one}, tmp_path / "b")
    for name in ("a", "b"):
        (tmp_path / name).rename(tmp_path / f"{name}.safetensors")
    found = checkpoints.pair(f"{tmp_path / 'a.safetensors'}..{tmp_path / 'b.safetensors'}")
    path = build(found, [*found.items], tmp_path / "s")
    assert path.name == "a.safetensors"
    assert load_file(path)["y"].sum() == 6


def test_paths_with_dots_are_taken_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = np.ones(3, np.float32)
    for number, name in enumerate(("m..1", "m..2")):
        checkpoint(tmp_path / name, {"t/m.safetensors": {"x": one * number}})
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    assert len(checkpoints.pair("..".join(["../m..1", "../m..2"])).items) == 1
    assert len(checkpoints.pair(f"{tmp_path}/m..1..{tmp_path}/m..2").items) == 1


def test_checkpoints_that_are_the_same_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        checkpoint(tmp_path / name, {"t/m.safetensors": {"x": np.ones(3, np.float32)}})
    with pytest.raises(UsageError, match="both checkpoints hold the same"):
        pair(tmp_path)


def test_groups_go_from_components_to_tensors() -> None:
    names = ["t/b.0.q.w", "t/b.0.k.w", "t/b.10.q.w", "v/d.w"]
    items = [checkpoints.Item(name, "tensor", "", name) for name in names]
    first = checkpoints.groups(items)
    assert [name for name, _ in first] == ["t", "v/d.w"]
    second = checkpoints.groups(first[0][1])
    assert [name for name, _ in second] == ["t/b.0", "t/b.10.q.w"]
    assert [name for name, _ in checkpoints.groups(second[0][1])] == ["t/b.0.q.w", "t/b.0.k.w"]
