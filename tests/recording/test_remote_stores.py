"""Every kind of store keeps objects whole, says what is wrong, and shows no password."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.stores import Dav, Quiet, bucket, hub, served
from tests.test_files import NOBODY, leftover
from truestep.errors import EndpointError, FileFormatError, TruestepError, UsageError, WriteError
from truestep.recording.remote.address import address, configured
from truestep.recording.remote.cache import cached, fetched
from truestep.recording.remote.objects import Remote, get, name_of, pointed_at, put
from truestep.recording.remote.opening import open_store

# The Hub's own client gives its own HTTP library what that calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CONTENT = bytes(range(256)) * 4096


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


SHA = sha256(CONTENT)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRUESTEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(CONTENT)
    return tmp_path / "file"


@pytest.fixture(params=["folder", "webdav", "bucket", "hub"])
def remote(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Remote]:
    """A store of each kind, on a real server where it has one."""
    if request.param == "folder":
        yield open_store(address(str(tmp_path / "store")))
    elif request.param == "webdav":
        with served(Dav, tmp_path / "store") as url:
            yield open_store(address(url))
    elif request.param == "bucket":
        with bucket(monkeypatch) as url:
            yield open_store(address(url))
    else:
        with hub(tmp_path / "store", monkeypatch) as url:
            yield open_store(address(url))


def overwrite(remote: Remote, content: bytes, tmp_path: Path) -> None:
    """Put something else under the name of an object, as no writer of ours does."""
    other = tmp_path / "other"
    other.write_bytes(content)
    remote.send(other, name_of(SHA), lambda: None, lambda *told: None)


def test_what_is_sent_comes_back_and_is_sent_once(
    remote: Remote, file: Path, tmp_path: Path
) -> None:
    assert remote.size(name_of(SHA)) is None
    assert list(remote.listed()) == []
    assert put(remote, file, SHA)
    assert not put(remote, file, SHA)
    assert remote.size(name_of(SHA)) == len(CONTENT)
    get(remote, SHA, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == CONTENT
    (stored,) = remote.listed()
    assert (stored.sha256, stored.size) == (SHA, len(CONTENT))
    assert stored.modified is not None
    assert abs(stored.modified - time.time()) < 100


def test_progress_is_told_in_bytes(remote: Remote, file: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    put(remote, file, SHA, lambda *each: told.append(each))
    get(remote, SHA, tmp_path / "back", lambda *each: told.append(each))
    size = len(CONTENT)
    assert ("sent", size, size) in told
    assert ("received", size, size) in told


def test_what_is_not_what_it_is_called_is_not_sent(remote: Remote, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(FileFormatError, match="was not sent"):
        put(remote, wrong, SHA)
    assert remote.size(name_of(SHA)) is None
    assert list(remote.listed()) == []


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"x", CONTENT[:1000]])
def test_a_tampered_object_is_never_used(
    content: bytes, remote: Remote, file: Path, tmp_path: Path, cache: Path
) -> None:
    put(remote, file, SHA)
    overwrite(remote, content, tmp_path)
    with pytest.raises(FileFormatError, match="is not what it is called, and was not used") as told:
        fetched(remote, SHA)
    assert f"SHA-256 {sha256(content)[:12]}" in str(told.value)
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_half_of_an_object_is_sent_again(remote: Remote, file: Path, tmp_path: Path) -> None:
    put(remote, file, SHA)
    overwrite(remote, CONTENT[:1000], tmp_path)
    assert put(remote, file, SHA)
    get(remote, SHA, tmp_path / "back")


def test_what_is_not_there_says_who_has_it(remote: Remote, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="the store does not have the object") as told:
        get(remote, SHA, tmp_path / "back")
    assert "whoever made it has not pushed it" in str(told.value)
    assert not (tmp_path / "back").exists()


def test_only_what_is_old_is_removed(remote: Remote, file: Path) -> None:
    put(remote, file, SHA)
    assert not remote.remove(name_of(SHA), 3600)
    assert remote.size(name_of(SHA)) == len(CONTENT)
    assert remote.remove(name_of(SHA), 0)
    assert remote.size(name_of(SHA)) is None
    assert not remote.remove(name_of(SHA), 0)


def test_what_is_sent_again_is_young_again(tmp_path: Path, file: Path) -> None:
    remote = open_store(address(str(tmp_path / "store")))
    put(remote, file, SHA)
    os.utime(tmp_path / "store" / name_of(SHA), (1, 1))
    put(remote, file, SHA)
    assert not remote.remove(name_of(SHA), 3600)


def test_the_cache_is_used_and_mends_itself(remote: Remote, file: Path) -> None:
    put(remote, file, SHA)
    path = fetched(remote, SHA)
    assert path == cached(SHA)
    path.chmod(0o600)
    path.write_bytes(b"damaged")
    assert cached(SHA) is None
    assert not path.exists()
    assert fetched(remote, SHA).read_bytes() == CONTENT


def test_what_a_killed_reader_left_goes_though_nothing_is_fetched(
    tmp_path: Path, file: Path, cache: Path
) -> None:
    remote = open_store(address(str(tmp_path / "store")))
    put(remote, file, SHA)
    fetched(remote, SHA)
    left = leftover(cache / "incoming" / SHA, pid=NOBODY)
    assert fetched(remote, SHA) == cached(SHA)
    assert not left.exists()


# --- a network that is dead, a server that is full or refuses ---------------------------------


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_dead_network_is_told_without_the_password(file: Path, tmp_path: Path) -> None:
    port = closed_port()
    remote = open_store(address(f"http://me:pa%2Fss@127.0.0.1:{port}/refs?sig=geheim"))
    for act in (lambda: put(remote, file, SHA), lambda: get(remote, SHA, tmp_path / "back")):
        with pytest.raises(EndpointError, match="the store does not answer") as told:
            act()
        text = str(told.value)
        assert f"http://127.0.0.1:{port}/refs" in text
        assert "the network is down" in text
        for secret in ("pa%2Fss", "pa/ss", "me:", "geheim"):
            assert secret not in text


def test_a_dead_bucket_and_a_dead_hub(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dead = f"http://127.0.0.1:{closed_port()}"
    monkeypatch.setenv("HF_ENDPOINT", dead)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(EndpointError):
        put(open_store(address("hf://datasets/team/refs")), file, SHA)
    pytest.importorskip("s3fs", reason="needs s3fs: pip install s3fs")
    monkeypatch.setenv("AWS_ENDPOINT_URL", dead)
    with pytest.raises(EndpointError) as told:
        put(open_store(address("s3://KEY:geheim@team/kept")), file, SHA)
    assert "geheim" not in str(told.value)


@pytest.fixture
def dav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Remote]]:
    """A WebDAV server; called with what goes wrong."""
    with served(Dav, tmp_path / "store") as url:

        def going_wrong(fault: str) -> Remote:
            monkeypatch.setattr(Dav, "fault", fault)
            return open_store(address(url))

        yield going_wrong


def test_an_answer_that_ends_early(
    dav: Callable[[str], Remote], file: Path, tmp_path: Path
) -> None:
    put(dav(""), file, SHA)
    with pytest.raises(EndpointError, match="stopped in the middle") as told:
        fetched(dav("cut"), SHA)
    assert f"{len(CONTENT) // 2:,} of {len(CONTENT):,} bytes came" in str(told.value)
    assert cached(SHA) is None
    assert fetched(dav(""), SHA).read_bytes() == CONTENT


def test_a_request_that_ends_early_leaves_no_object(
    dav: Callable[[str], Remote], file: Path
) -> None:
    with pytest.raises(EndpointError):
        put(dav("half"), file, SHA)
    remote = dav("")
    assert remote.size(name_of(SHA)) is None
    assert list(remote.listed()) == []
    assert put(remote, file, SHA)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("full", "its disk is full"),
        ("refuse", "may not do that"),
        ("password", "needs a name and a password"),
    ],
)
def test_a_server_that_says_no(
    fault: str, text: str, dav: Callable[[str], Remote], file: Path
) -> None:
    with pytest.raises(EndpointError, match="the store refuses") as told:
        put(dav(fault), file, SHA)
    assert text in str(told.value)
    assert dav("").size(name_of(SHA)) is None


def test_a_name_and_password_of_the_url_are_sent(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Dav, "fault", "password")
    with served(Dav, tmp_path / "store") as url:
        remote = open_store(address(url.replace("//", "//me:pa%2Fss@")))
        assert put(remote, file, SHA)
        get(remote, SHA, tmp_path / "back")


def test_a_plain_server_of_files_is_read(tmp_path: Path, file: Path) -> None:
    put(open_store(address(str(tmp_path / "store"))), file, SHA)
    with served(Quiet, tmp_path / "store") as url:
        remote = open_store(address(url))
        assert fetched(remote, SHA).read_bytes() == CONTENT
        (tmp_path / "more").write_bytes(b"more")
        with pytest.raises(EndpointError, match="the store refuses MKCOL") as told:
            put(remote, tmp_path / "more", sha256(b"more"))
        assert "objects are read from it and sent elsewhere" in str(told.value)


def test_no_answer_is_followed_to_another_address(tmp_path: Path, file: Path) -> None:
    asked = []

    class Elsewhere(Quiet):
        def do_GET(self) -> None:  # noqa: N802
            asked.append(self.headers.get("Authorization"))
            self.answer(200, CONTENT)

        do_HEAD = do_GET  # noqa: N815

    with served(Elsewhere, tmp_path) as other:

        class Sending(Quiet):
            def do_GET(self) -> None:  # noqa: N802
                self.answer(302, Location=other + self.path)

            do_HEAD = do_GET  # noqa: N815

        with served(Sending, tmp_path) as url:
            remote = open_store(address(url.replace("//", "//me:secret@")))
            with pytest.raises(EndpointError, match="the store refuses HEAD") as told:
                get(remote, SHA, tmp_path / "back")
    assert "is not followed" in str(told.value)
    assert asked == []


def test_a_full_disk_here_is_told_before_and_meanwhile(
    tmp_path: Path, file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = open_store(address(str(tmp_path / "store")))
    put(remote, file, SHA)
    with monkeypatch.context() as patch:
        patch.setattr("truestep.files.ROOM", 2**63)
        with pytest.raises(WriteError, match="the object could not be written"):
            fetched(remote, SHA)
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(CONTENT) // 2, before[1]))
    try:
        with pytest.raises(WriteError, match="could not be written"):
            fetched(remote, SHA)
        with pytest.raises(WriteError, match="could not be written"):
            put(open_store(address(str(tmp_path / "other store"))), file, SHA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path for path in cache.rglob("*") if path.is_file()] == []
    assert [path for path in (tmp_path / "other store").rglob("*") if path.is_file()] == []
    assert fetched(remote, SHA).read_bytes() == CONTENT


def test_a_folder_whose_disk_is_gone_is_not_an_empty_store(tmp_path: Path) -> None:
    remote = open_store(address(str(tmp_path / "mount" / "store")))
    with pytest.raises(EndpointError, match="the store's folder is not there"):
        remote.size(name_of(SHA))


# --- Git LFS ----------------------------------------------------------------------------------

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{SHA}\nsize {len(CONTENT)}\n"


def test_a_pointer_of_git_lfs_says_how_to_get_its_content(tmp_path: Path, file: Path) -> None:
    remote = open_store(address(str(tmp_path / "my store")))
    put(remote, file, SHA)
    path = tmp_path / "my store" / name_of(SHA)
    assert pointed_at(path) is None
    path.unlink()
    path.write_text(POINTER)
    assert pointed_at(path) == SHA
    for act in (lambda: fetched(remote, SHA), lambda: put(remote, file, SHA)):
        with pytest.raises(FileFormatError, match="the file is a Git LFS pointer") as told:
            act()
        assert f"hint: git -C '{path.parent}' lfs pull --include {SHA}" in str(told.value)


# --- addresses --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", " ", "a\nb", "ftp://x/y", "s3://", "https://", "hf://x", "http://[", "hf:///a/b"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError):
        open_store(address(text))


def test_a_package_that_is_missing_is_named_with_its_install_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UsageError, match="needs the package 'gcsfs'") as told:
        open_store(address("gs://bucket/prefix"))
    assert told.value.hint == "pip install gcsfs"
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(UsageError, match="needs the package 'adlfs'") as told:
        open_store(address("az://container/prefix"))
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UsageError, match="needs the package 'fsspec'") as told:
        open_store(address("gs://bucket/prefix"))
    assert told.value.hint == "pip install 'truestep[hub]'"
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match="needs the package 'huggingface_hub'") as told:
        open_store(address("hf://datasets/a/b"))
    assert told.value.hint == "pip install 'truestep[hub]'"


def test_where_a_store_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "project" / "truestep-references"
    root.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.delenv("TRUESTEP_STORE", raising=False)
    assert configured(root) is None
    (root.parent / "truestep.toml").write_text('[references]\nstore = "../kept"\n')
    found = configured(root)
    assert found is not None
    assert found.folder == (root.parent / "../kept").resolve()
    Path("truestep.toml").write_text('[references]\nstore = "s3://here/x"\n')
    found = configured(root)
    assert found is not None
    assert found.shown == "s3://here/x"
    monkeypatch.setenv("TRUESTEP_STORE", "gs://b/y")
    found = configured(root)
    assert found is not None
    assert found.shown == "gs://b/y"


@pytest.mark.parametrize("table", ["store = 3", 'stoer = "x"', 'store = "ftp://x"'])
def test_a_table_that_is_not_understood(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRUESTEP_STORE", raising=False)
    Path("truestep.toml").write_text(f"[references]\n{table}\n")
    with pytest.raises(TruestepError):
        configured(tmp_path / "r")
