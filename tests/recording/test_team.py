"""References of a team: promoted, fetched, rolled back, pruned; two writers, and nothing lost."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.recording.test_remote_stores import POINTER, SHA
from tests.recording.test_store import CASE, find, recording, save
from truestep.errors import (
    EndpointError,
    FileFormatError,
    ReferenceNotFoundError,
    TruestepError,
    UsageError,
)
from truestep.files import sha256_of
from truestep.recording import versions
from truestep.recording.format import Recording
from truestep.recording.lock import LOCK_FILE, Entry, Event, put_entry, read_lock
from truestep.recording.placing import adopt, draft_path, entry_of, judged_by
from truestep.recording.remote.address import Address, address
from truestep.recording.remote.objects import Remote, name_of
from truestep.recording.remote.opening import open_store
from truestep.recording.store import Store, place_of
from truestep.recording.team import Note, promote, pull, push, rollback
from truestep.recording.tending import prune, verify

NAME = place_of(recording(1.0)).name


def judge(actual: Path, reference: Path) -> tuple[str, str]:
    same = (Recording.open(actual)["x"] == Recording.open(reference)["x"]).all()
    return ("identical", "the same") if same else ("drifted", "not the same")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Address:
    """A store in a folder, which TRUESTEP_STORE names."""
    monkeypatch.setenv("TRUESTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRUESTEP_STORE", str(tmp_path / "store"))
    return address(str(tmp_path / "store"))


@pytest.fixture
def remote(place: Address) -> Remote:
    return open_store(place)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "references"


def promoted(root: Path, remote: Remote, value: float, reason: str = "why") -> str:
    """Record a value and promote it; its hash."""
    save(Store(root), recording(value), update=True)
    note = Note(reason, "Ada", "c0ffee")
    return promote(root, NAME, remote, judge=judge, note=note).sha256


def value_of(root: Path) -> float:
    """What a check would judge by."""
    return float(Recording.open(find(Store(root)))["x"][0])


def cloned(root: Path, to: Path) -> Path:
    """What a colleague has after a clone: the lock file."""
    to.mkdir()
    shutil.copy(root / LOCK_FILE, to / LOCK_FILE)
    return to


def unwritten_by_anyone(path: Path, content: bytes) -> None:
    path.chmod(0o600)
    path.unlink()
    path.write_bytes(content)


# --- promotion and what a colleague gets ------------------------------------------------------


def test_a_promotion_records_who_when_why_where_and_the_verdict(root: Path, remote: Remote) -> None:
    first = promoted(root, remote, 1.0, "the first")
    second = promoted(root, remote, 2.0, "a newer torch")
    lock = read_lock(root)
    assert lock.lock_version == 2
    one, two = lock.references[NAME].history
    assert (one.action, one.sha256, one.replaces, one.reason) == (
        "promote", first, None, "the first",
    )  # fmt: skip
    assert (one.verdict, one.sentence) == ("", "")
    assert (two.sha256, two.replaces, two.who, two.commit) == (second, first, "Ada", "c0ffee")
    assert (two.verdict, two.sentence) == ("drifted", "not the same")
    assert two.environment == {"device.class": "cpu", "attention.kernel": "flash-cpu"}
    assert two.when.endswith("+00:00")
    assert two.size == (root / NAME).stat().st_size
    assert lock.references[NAME].promoted == second
    assert value_of(root) == 2.0


def test_a_colleague_fetches_what_is_promoted_when_it_is_asked_for(
    root: Path, remote: Remote, tmp_path: Path
) -> None:
    promoted(root, remote, 1.0)
    theirs = cloned(root, tmp_path / "theirs")
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert value_of(theirs) == 1.0
    assert (theirs / NAME).exists()
    assert [p.case_id for p in Store(theirs).places()] == [CASE.id]


def test_without_a_store_what_is_only_in_the_lock_is_not_there(
    root: Path, remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promoted(root, remote, 1.0)
    theirs = cloned(root, tmp_path / "theirs")
    monkeypatch.delenv("TRUESTEP_STORE")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ReferenceNotFoundError):
        find(Store(theirs))
    assert value_of(root) == 1.0  # here it needs no store


def test_a_draft_stands_beside_the_promoted_one(root: Path, remote: Remote) -> None:
    first = promoted(root, remote, 1.0)
    path = save(Store(root), recording(2.0), update=True)
    assert path.parent.name == "drafts"
    assert value_of(root) == 1.0
    entry = entry_of(root, NAME)
    assert (entry.promoted, entry.sha256, entry.draft) == (first, first, sha256_of(path))
    newer = save(Store(root), recording(3.0), update=True)
    assert not path.exists()
    assert entry_of(root, NAME).draft == sha256_of(newer)
    with pytest.raises(UsageError, match="a reference of this case exists"):
        save(Store(root), recording(4.0))


def test_a_reference_that_is_only_in_the_store_is_not_recorded_over(
    root: Path, remote: Remote, tmp_path: Path
) -> None:
    promoted(root, remote, 1.0)
    theirs = Store(cloned(root, tmp_path / "theirs"))
    with pytest.raises(UsageError, match="a reference of this case exists"):
        save(theirs, recording(2.0))


def test_a_pulled_lock_replaces_an_earlier_file_by_itself(
    root: Path, remote: Remote, tmp_path: Path
) -> None:
    promoted(root, remote, 1.0)
    theirs = cloned(root, tmp_path / "theirs")
    assert value_of(theirs) == 1.0
    promoted(root, remote, 2.0)
    shutil.copy(root / LOCK_FILE, theirs / LOCK_FILE)  # git pull
    assert value_of(theirs) == 2.0


def test_a_file_that_nobody_knows_is_refused_and_a_pull_keeps_it(
    root: Path, remote: Remote, place: Address
) -> None:
    promoted(root, remote, 1.0)
    other = recording(5.0)
    other.save(root / NAME)
    unknown = sha256_of(root / NAME)
    with pytest.raises(FileFormatError, match="does not match the lock file") as told:
        find(Store(root))
    assert "truestep references pull" in told.value.hint
    (moved,) = pull(root, [NAME], place)
    assert moved.state == "fetched"
    assert value_of(root) == 1.0
    assert Recording.open(draft_path(root, unknown))["x"][0] == 5.0


def test_a_draft_of_another_machine_is_promoted_here(
    root: Path, remote: Remote, tmp_path: Path, place: Address
) -> None:
    promoted(root, remote, 1.0)
    save(Store(root), recording(2.0), update=True)
    sent = push(root, [NAME], remote)
    assert sorted(each.state for each in sent) == ["sent", "there"]
    theirs = cloned(root, tmp_path / "theirs")
    states = [each.state for each in pull(theirs, [NAME], place, drafts=True)]
    assert states == ["fetched", "fetched"]
    promote(theirs, NAME, remote, judge=judge, note=Note("good", "Bob", None))
    assert value_of(theirs) == 2.0
    assert entry_of(theirs, NAME).draft is None


def test_what_is_neither_here_nor_in_the_store_is_missing(
    root: Path, remote: Remote, tmp_path: Path
) -> None:
    save(Store(root), recording(1.0))
    theirs = cloned(root, tmp_path / "theirs")
    assert [each.state for each in push(theirs, [NAME], remote)] == ["missing"]
    assert [each.state for each in push(root, [NAME], remote)] == ["sent"]
    assert [each.state for each in push(theirs, [NAME], remote)] == ["there"]


def test_there_is_nothing_to_promote_twice(root: Path, remote: Remote) -> None:
    promoted(root, remote, 1.0)
    with pytest.raises(UsageError, match="there is no draft to promote"):
        promote(root, NAME, remote, judge=judge, note=Note("again", "Ada", None))


# --- rollback ---------------------------------------------------------------------------------


def test_rollback_to_any_earlier_one(root: Path, remote: Remote) -> None:
    first, second, third = (promoted(root, remote, value) for value in (1.0, 2.0, 3.0))
    note = Note("it was wrong", "Ada", None)
    event = rollback(root, NAME, remote, to=None, judge=judge, note=note)
    assert (event.action, event.sha256, event.replaces) == ("rollback", second, third)
    assert event.verdict == "drifted"
    assert value_of(root) == 2.0
    rollback(root, NAME, remote, to=first[:12], judge=judge, note=note)
    assert value_of(root) == 1.0
    rollback(root, NAME, remote, to=third[:8], judge=judge, note=note)
    assert value_of(root) == 3.0
    assert len(entry_of(root, NAME).history) == 6


@pytest.mark.parametrize("to", [None, "beef", "ab", ""])
def test_rollback_to_what_there_is_not(to: str | None, root: Path, remote: Remote) -> None:
    promoted(root, remote, 1.0)
    with pytest.raises(UsageError, match="there is no earlier reference to go back to"):
        rollback(root, NAME, remote, to=to, judge=judge, note=Note("x", "Ada", None))
    assert len(entry_of(root, NAME).history) == 1


def test_a_rollback_needs_a_whole_object(root: Path, remote: Remote, tmp_path: Path) -> None:
    first = promoted(root, remote, 1.0)
    promoted(root, remote, 2.0)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    unwritten_by_anyone(tmp_path / "store" / name_of(first), b"tampered")
    before = (root / LOCK_FILE).read_bytes()
    with pytest.raises(FileFormatError, match="is not what it is called"):
        rollback(root, NAME, remote, to=None, judge=judge, note=Note("x", "Ada", None))
    assert (root / LOCK_FILE).read_bytes() == before
    assert value_of(root) == 2.0


def test_a_promoted_one_that_is_lost_can_be_left(
    root: Path, remote: Remote, tmp_path: Path
) -> None:
    promoted(root, remote, 1.0)
    second = promoted(root, remote, 2.0)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    (tmp_path / "store" / name_of(second)).unlink()
    (root / NAME).unlink()
    event = rollback(root, NAME, remote, to=None, judge=judge, note=Note("lost", "Ada", None))
    assert event.verdict == "missing"
    assert "the store does not have the object" in event.sentence
    assert value_of(root) == 1.0


# --- two writers ------------------------------------------------------------------------------


def test_of_two_promotions_at_once_one_is_told(root: Path, remote: Remote) -> None:
    promoted(root, remote, 1.0)
    save(Store(root), recording(2.0), update=True)

    def meanwhile(actual: Path, reference: Path) -> tuple[str, str]:
        save(Store(root), recording(3.0), update=True)
        return "drifted", ""

    before = len(entry_of(root, NAME).history)
    with pytest.raises(UsageError, match="another writer has changed the reference meanwhile"):
        promote(root, NAME, remote, judge=meanwhile, note=Note("x", "Ada", None))
    assert len(entry_of(root, NAME).history) == before
    assert value_of(root) == 1.0
    promote(root, NAME, remote, judge=judge, note=Note("x", "Ada", None))
    assert value_of(root) == 3.0


def test_a_dead_store_changes_nothing(
    root: Path, remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promoted(root, remote, 1.0)
    draft = save(Store(root), recording(2.0), update=True)
    before = (root / LOCK_FILE).read_bytes()
    gone = open_store(address(str(tmp_path / "not mounted" / "store")))
    note = Note("x", "Ada", None)
    for act in (
        lambda: promote(root, NAME, gone, judge=judge, note=note),
        lambda: push(root, [NAME], gone),
        lambda: verify(root, [NAME], gone),
    ):
        with pytest.raises(EndpointError):
            act()
    assert (root / LOCK_FILE).read_bytes() == before
    assert draft.exists()
    assert value_of(root) == 1.0


# --- verify -----------------------------------------------------------------------------------


def test_verify_reads_everything(root: Path, remote: Remote, tmp_path: Path) -> None:
    first = promoted(root, remote, 1.0)
    shutil.copyfile(root / NAME, tmp_path / "first.safetensors")
    second = promoted(root, remote, 2.0)
    assert verify(root, [NAME], remote) == (2, [])
    path = tmp_path / "store" / name_of(first)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    unwritten_by_anyone(path, bytes(content))
    (tmp_path / "store" / name_of(second)).unlink()
    read, faults = verify(root, [NAME], remote)
    assert read == 0
    assert {fault.sha256: fault.what for fault in faults} == {
        first: "the object in the store is not what it is called, and was not used",
        second: "the store does not have the object",
    }
    push(root, [NAME], remote)  # what is here is sent again
    assert [fault.sha256 for fault in verify(root, [NAME], remote)[1]] == [first]
    (moved,) = (m for m in push(root, [NAME], remote, again=True) if m.sha256 == first)
    assert moved.state == "missing"  # nobody here has it; what is called so is not removed
    assert path.exists()
    adopt(root, NAME, tmp_path / "first.safetensors")
    states = {m.sha256: m.state for m in push(root, [NAME], remote, again=True)}
    assert states == {first: "sent", second: "there"}
    assert verify(root, [NAME], remote) == (2, [])


# --- prune ------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with references in it."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for key in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{key}_NAME", "Ada")
        monkeypatch.setenv(f"{key}_EMAIL", "ada@example.org")
    git(folder, "init", "-q", "-b", "main")
    (folder / ".gitignore").write_text("*.safetensors\n")
    return folder


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit(folder: Path, text: str = "x") -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", text)


def shas(remote: Remote) -> set[str]:
    return {stored.sha256 for stored in remote.listed()}


def orphan(remote: Remote, tmp_path: Path) -> str:
    """An object that nothing names."""
    path = tmp_path / "orphan"
    path.write_bytes(b"nobody's")
    sha256 = sha256_of(path)
    remote.send(path, name_of(sha256), lambda: None, lambda *told: None)
    return sha256


def test_prune_takes_only_what_no_lock_of_any_commit_names(
    repository: Path, remote: Remote, tmp_path: Path
) -> None:
    root = repository / "references"
    first = promoted(root, remote, 1.0)
    commit(repository)
    git(repository, "checkout", "-qb", "other")
    second = promoted(root, remote, 2.0)
    commit(repository)
    git(repository, "checkout", "-q", "main")
    third = promoted(root, remote, 3.0)
    git(repository, "stash", "-q")
    git(repository, "checkout", "-q", "--detach")
    fourth = promoted(root, remote, 4.0)
    commit(repository, "only a reflog knows this")
    git(repository, "checkout", "-q", "main")
    fifth = promoted(root, remote, 5.0)
    git(repository, "add", "-A")
    git(repository, "rm", "-q", "--cached", "--ignore-unmatch", "nothing")
    sixth = promoted(root, remote, 6.0)
    lost = orphan(remote, tmp_path)
    everything = {first, second, third, fourth, fifth, sixth, lost}
    assert shas(remote) == everything
    needless, kept = prune(root, remote, older_s=0, remove=False)
    assert ([each.sha256 for each in needless], kept) == ([lost], 6)
    assert shas(remote) == everything
    needless, kept = prune(root, remote, older_s=0, remove=True)
    assert [each.removed for each in needless] == [True]
    assert shas(remote) == everything - {lost}


def test_prune_leaves_what_is_young(root: Path, remote: Remote, tmp_path: Path) -> None:
    promoted(root, remote, 1.0)
    orphan(remote, tmp_path)
    assert prune(root, remote, older_s=3600, remove=True) == ([], 2)


def test_prune_sees_a_lock_with_a_merge_conflict_in_it(repository: Path, remote: Remote) -> None:
    root = repository / "references"
    first = promoted(root, remote, 1.0)
    path = root / LOCK_FILE
    path.write_text("<<<<<<< HEAD\n" + path.read_text() + "=======\n>>>>>>> other\n")
    assert prune(root, remote, older_s=0, remove=True) == ([], 1)
    assert shas(remote) == {first}


def test_prune_refuses_a_shallow_repository(
    repository: Path, remote: Remote, tmp_path: Path
) -> None:
    root = repository / "references"
    promoted(root, remote, 1.0)
    commit(repository)
    commit_again = repository / "more"
    commit_again.write_text("")
    commit(repository)
    shallow = tmp_path / "shallow"
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{repository}", str(shallow))
    with pytest.raises(UsageError, match="the repository is shallow") as told:
        prune(shallow / "references", remote, older_s=0, remove=True)
    assert told.value.hint == "git fetch --unshallow"


def test_two_branches_that_promote_two_cases_merge(repository: Path, remote: Remote) -> None:
    """A lock is text that git merges line by line."""
    root = repository / "references"
    store = Store(root)
    cases = [CASE.replace(prompt=prompt) for prompt in ("a first", "m middle", "z last")]
    for case in cases:
        save(store, recording(1.0, case))
    commit(repository)
    names = list(read_lock(root).references)
    for branch, name in (("left", names[0]), ("right", names[2])):
        git(repository, "checkout", "-q", "-b", branch, "main")
        promote(root, name, remote, judge=judge, note=Note(branch, "Ada", None))
        commit(repository)
    git(repository, "merge", "-q", "left", "-m", "both")
    lock = read_lock(root)
    assert [bool(lock.references[name].history) for name in names] == [True, False, True]


def test_who_and_at_which_commit(repository: Path) -> None:
    git(repository, "config", "user.name", "Ada")
    git(repository, "config", "user.email", "ada@example.org")
    assert versions.who(repository) == "Ada <ada@example.org>"
    assert versions.commit(repository) is None
    (repository / LOCK_FILE).write_text("1")
    (repository / "code.py").write_text("1")
    commit(repository)
    head = git(repository, "rev-parse", "HEAD")
    assert versions.commit(repository) == head
    (repository / LOCK_FILE).write_text("2")
    assert versions.commit(repository) == head  # a lock that was promoted in is no other code
    (repository / "code.py").write_text("2")
    assert versions.commit(repository) == f"{head}-dirty"


# --- adopt, Git LFS, locks of other versions --------------------------------------------------


def test_a_recording_from_elsewhere_is_adopted_bit_for_bit(
    root: Path, remote: Remote, tmp_path: Path
) -> None:
    recording(7.0).save(tmp_path / "r.safetensors")
    sha256, path = adopt(root, NAME, tmp_path / "r.safetensors")
    assert path == root / NAME
    assert sha256 == sha256_of(tmp_path / "r.safetensors") == judged_by(entry_of(root, NAME))
    assert value_of(root) == 7.0
    promote(root, NAME, remote, judge=judge, note=Note("x", "Ada", None))
    recording(8.0).save(tmp_path / "r.safetensors")
    sha256, path = adopt(root, NAME, tmp_path / "r.safetensors")
    assert path == draft_path(root, sha256)
    assert value_of(root) == 7.0


def test_what_was_copied_into_the_folder_is_adopted_and_nothing_is_lost(root: Path) -> None:
    save(Store(root), recording(1.0))
    before = sha256_of(root / NAME)
    recording(2.0).save(root / NAME)
    with pytest.raises(FileFormatError, match="does not match the lock file"):
        find(Store(root))
    adopt(root, NAME, root / NAME)
    assert value_of(root) == 2.0
    assert before != judged_by(entry_of(root, NAME))


def test_a_damaged_file_is_not_adopted(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    recording(1.0).save(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(FileFormatError, match="is damaged"):
        adopt(root, NAME, path)
    assert not (root / NAME).exists()
    assert read_lock(root).references == {}


def test_a_pointer_in_the_place_of_a_reference(
    root: Path, remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repository keeps references with Git LFS, and was cloned without it."""
    sha256 = promoted(root, remote, 1.0)
    pointer = POINTER.replace(SHA, sha256)
    (root / NAME).unlink()
    (root / NAME).write_text(pointer)
    assert value_of(root) == 1.0  # the store has it
    (root / NAME).unlink()
    (root / NAME).write_text(pointer)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    monkeypatch.delenv("TRUESTEP_STORE")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileFormatError, match="the file is a Git LFS pointer") as told:
        find(Store(root))
    assert "lfs pull --include" in told.value.hint
    with pytest.raises(FileFormatError, match="the file is a Git LFS pointer"):
        adopt(tmp_path / "other", NAME, root / NAME)


def test_a_lock_without_drafts_and_history_is_written_as_it_was(root: Path) -> None:
    put_entry(root, "a", Entry(sha256="1"))
    text = json.loads((root / LOCK_FILE).read_text())
    assert text == {"lock_version": 1, "references": {"a": {"sha256": "1", "pending": None}}}
    event = Event(action="promote", sha256="0" * 64, size=1, reason="x", who="Ada", when="now")
    put_entry(root, "b", Entry(sha256="0" * 64, history=(event,)))
    assert json.loads((root / LOCK_FILE).read_text())["lock_version"] == 2
    assert read_lock(root).references["b"].history == (event,)
    assert read_lock(root).references["a"] == Entry(sha256="1")


@pytest.mark.parametrize("sha256", ["", "../../etc/passwd", "A" * 64, "0" * 63])
def test_a_hash_in_a_lock_is_a_hash(sha256: str, root: Path) -> None:
    root.mkdir()
    entry = {"sha256": "1", "pending": None, "draft": sha256}
    (root / LOCK_FILE).write_text(json.dumps({"lock_version": 2, "references": {"a": entry}}))
    with pytest.raises(TruestepError, match="the lock file is damaged"):
        read_lock(root)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a\0b"])
def test_a_name_in_a_lock_stays_inside(name: str, root: Path) -> None:
    root.mkdir()
    lock = {"lock_version": 1, "references": {name: {"sha256": "1", "pending": None}}}
    (root / LOCK_FILE).write_text(json.dumps(lock))
    with pytest.raises(FileFormatError, match="the lock file is damaged"):
        read_lock(root)


def test_a_lock_of_a_later_version_says_upgrade(root: Path) -> None:
    root.mkdir()
    (root / LOCK_FILE).write_text('{"lock_version": 3, "references": {}, "more": 1}')
    with pytest.raises(FileFormatError, match="written by a newer truestep"):
        read_lock(root)


def test_what_was_begun_and_never_written_is_no_reference(root: Path, remote: Remote) -> None:
    """A record that was killed before its first file stood in its place."""
    put_entry_in(root, Entry(pending="0" * 64))
    with pytest.raises(ReferenceNotFoundError):
        find(Store(root))
    assert [each.state for each in push(root, [NAME], remote)] == []
    assert save(Store(root), recording(1.0)).exists()


def put_entry_in(root: Path, entry: Entry) -> None:
    root.mkdir(parents=True, exist_ok=True)
    put_entry(root, NAME, entry)
