"""A component's way from scaffold_skip to non_skip_pass, through pytest's own pytester."""

from __future__ import annotations

import json
import threading
from datetime import date
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from truestep.cli.parity import command
from truestep.errors import FileFormatError, UsageError
from truestep.parity.component import Kind
from truestep.parity.evidence import Evidence, State, relevant
from truestep.parity.ledger import (
    Block,
    Component,
    block_of,
    markdown,
    read_ledger,
    update_ledger,
)
from truestep.parity.packet import packet_path, read_packet
from truestep.parity.scaffold import write_scaffold

pytest_plugins = ["pytester"]


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    """Import what a run needs: pytester unloads what a run imports, and torch cannot reload."""
    import numpy.fft  # noqa: F401
    import torch._inductor.test_operators  # what diffusers imports; it registers operators once

    import truestep.parity.session  # noqa: F401
    from truestep.replay.functions import check_function, record_function

    module = torch.nn.Linear(4, 4)
    check_function(module, record_function(module, [{"input": torch.randn(1, 4)}]))


OFFICIAL = """
import torch

class Mixer(torch.nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.inner = torch.nn.Linear(width, width)

    def forward(self, x):
        return {"mixed": torch.nn.functional.silu(self.inner(x)), "sum": (x.sum(-1), None)}

def build():
    return Mixer(width=32)
"""

PORT = """
import torch

class OwnMixer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(32, 32)

    def forward(self, x):
        y = self.inner(x)
        return {"mixed": y * torch.sigmoid(y) * SCALE, "sum": (x.sum(-1), None)}
"""


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """An official repository; no weights, no port yet."""
    for part in ("OFFICIAL_REF", "LOCAL_WEIGHTS", "CONVERTED_WEIGHTS"):
        monkeypatch.delenv(f"ACME_{part}_DIR", raising=False)
    official = pytester.mkdir("official")
    (official / "acme_net.py").write_text(OFFICIAL)
    monkeypatch.setenv("ACME_OFFICIAL_REF_DIR", str(official))
    monkeypatch.syspath_prepend(str(pytester.path))
    write_scaffold(
        "acme",
        "mixer",
        kind="generic",
        output=pytester.path,
        official="acme_net:Mixer",
        port="acme_port:OwnMixer",
        official_dir=official,
    )
    return pytester


def weights(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        "inner.weight": torch.randn(32, 32, generator=generator) / 6,
        "inner.bias": torch.randn(32, generator=generator),
    }
    for part in ("LOCAL_WEIGHTS", "CONVERTED_WEIGHTS"):
        folder = project.path / part.lower()
        folder.mkdir(exist_ok=True)
        save_file(state, folder / "model.safetensors")
        monkeypatch.setenv(f"ACME_{part}_DIR", str(folder))


def port(project: pytest.Pytester, scale: str) -> None:
    project.makepyfile(acme_port=f"SCALE = {scale}\n{PORT}")


def run(project: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return project.runpytest(
        "-p", "no:cacheprovider", "-p", "no:xdist", "--truestep-parity", "-rs", *arguments
    )


def block(project: pytest.Pytester) -> Block:
    from truestep.environment import Environment

    return block_of(project.path, relevant(Environment.current("cpu")), date.today())


def test_from_scaffold_skip_to_pass_and_expiry(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(project)
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*missing: weights: [*].safetensors of acme*"])
    (item,) = block(project).components
    assert (item.status, item.missing) == (
        "scaffold_skip",
        "weights: *.safetensors of acme",
    )
    assert run(project, "--truestep-require-executed").ret == 1

    weights(project, monkeypatch)
    result = run(project)
    result.stdout.fnmatch_lines(["*missing: port_class: module acme_port (OwnMixer)*"])

    port(project, "1.001")
    run(project).assert_outcomes(failed=1)
    (item,) = block(project).components
    assert item.state == "debug_red"
    shown_as_it_is_typed(project, monkeypatch)
    assert "scaled by 1.001" in item.reason or "x the noise floor" in item.reason

    port(project, "1.0")
    run(project, "--truestep-require-executed").assert_outcomes(passed=1)
    found = block(project)
    (item,) = found.components
    assert (item.status, item.reason) == ("non_skip_pass", "")
    assert found.handed_over
    evidence = item.evidence
    assert evidence.numbers is not None
    assert evidence.numbers.floor_source == "measured"
    assert evidence.numbers.tensors == 6
    assert len(evidence.official.recording) == len(evidence.port.recording) == 64
    assert evidence.official.code.keys() == {"<ACME_OFFICIAL_REF_DIR>/acme_net.py"}
    assert evidence.port.code.keys() == {"acme_port.py"}
    assert evidence.port.weights.keys() == {"<ACME_CONVERTED_WEIGHTS_DIR>/model.safetensors"}
    assert item.official_definition_files == ("acme_net.py:4 (Mixer)",)
    assert item.official_instantiation_files == ("acme_net.py:13 (Mixer)",)

    port(project, "1.0 ")
    (item,) = block(project).components
    assert item.status == "non_skip_pass" or "code changed" in item.status
    (project.path / "acme_port.py").write_text("SCALE = 2.0\n" + PORT)
    (item,) = block(project).components
    assert item.status == "expired: code changed: port: acme_port.py"
    assert not block(project).handed_over


def shown_as_it_is_typed(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is red says what shows it, and a name that is typed otherwise what it is."""
    monkeypatch.chdir(project.path)
    status = CliRunner().invoke(command, ["status", "."])
    assert status.exit_code == 1
    assert status.output.splitlines()[-1] == "next: truestep parity show acme/mixer -v"
    for words in (["acme", "mixer"], ["mixer"], ["acme"]):
        asked = CliRunner().invoke(command, ["show", *words])
        assert isinstance(asked.exception, UsageError)
        assert asked.exception.hint == "truestep parity show acme/mixer"
    assert "FAMILY/COMPONENT, got 'acme' and 'nixer'" in str(
        CliRunner().invoke(command, ["show", "acme", "nixer"]).exception
    )
    for words in (["acme/mixer"], ["acme/mixer", "-v"]):
        assert CliRunner().invoke(command, ["show", *words]).exit_code == 0


def test_weights_and_environment_expire_a_pass(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights(project, monkeypatch)
    port(project, "1.0")
    run(project).assert_outcomes(passed=1)
    from truestep.parity import evidence

    with monkeypatch.context() as patch:
        patch.setattr(evidence, "library_version", lambda name: "99")
        (item,) = block(project).components
        assert item.status.startswith("expired: environment changed: library.")
    path = project.path / "local_weights" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    (item,) = block(project).components
    assert item.status.startswith("expired: weights changed: <ACME_LOCAL_WEIGHTS_DIR>/model")
    path.unlink()
    assert "model.safetensors gone" in block(project).components[0].status


def test_an_unexpected_exception_is_red_never_a_skip(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights(project, monkeypatch)
    project.makepyfile(acme_port="import a_dependency_of_ours_that_is_not_there\n")
    run(project).assert_outcomes(failed=1)
    (item,) = block(project).components
    assert item.state == "debug_red"
    assert item.reason.startswith("raised ModuleNotFoundError: No module named 'a_dependency")


def test_a_status_typed_by_hand_is_not_believed(project: pytest.Pytester) -> None:
    run(project)
    path = project.path / "parity.toml"
    text = path.read_text()
    path.write_text(text.replace('status = "scaffold_skip"', 'status = "non_skip_pass"'))
    assert block(project).components[0].status == "scaffold_skip"
    path.write_text(text.replace('kind = "weights"', 'kind = "port_class"'))
    assert block(project).components[0].status == "expired: the evidence was edited"


def test_tokens_are_nowhere(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    secret, other = "hf_" + "abcdefgh" * 4, "plain-secret-value"
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("HF_API_KEY", other)
    weights(project, monkeypatch)
    project.makepyfile(
        acme_port="import os\n"
        "print('loading with', os.environ['HF_API_KEY'])\n"
        "raise RuntimeError('401 for token ' + os.environ['HF_TOKEN'])\n"
    )
    result = run(project)
    result.assert_outcomes(failed=1)
    text = result.stdout.str() + result.stderr.str()
    for path in project.path.glob("*.toml"):
        text += path.read_text()
    assert "401 for token <HF_TOKEN>" in text
    assert secret not in text
    assert other not in text


def test_shared_code_proves_nothing(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights(project, monkeypatch)
    project.makepyfile(acme_port="from acme_net import Mixer\n\nclass OwnMixer(Mixer):\n    pass\n")
    result = run(project)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*acme/mixer: the numbers agree, but the test may not pass*"])
    (item,) = block(project).components
    assert item.state == "debug_red"
    assert item.reason == ("proves nothing: both sides share <ACME_OFFICIAL_REF_DIR>/acme_net.py")


def test_a_file_that_cannot_be_collected_is_red(project: pytest.Pytester) -> None:
    run(project)
    test = project.path / "test_parity_acme_mixer.py"
    test.write_text(test.read_text() + "\nimport a_module_that_is_not_there\n")
    assert run(project).ret == 2
    assert "the test file cannot be collected" in block(project).components[0].reason


def test_blocked_needs_a_decision(project: pytest.Pytester) -> None:
    test = project.path / "test_parity_acme_mixer.py"
    text = test.read_text().replace(
        "    if not PORT:\n",
        "    raise missing('weights', 'acme/mixer, revision 2, gated', decision='legal: licence')\n"
        "    if not PORT:\n",
    )
    test.write_text(
        text.replace(
            "def load_official() -> Loaded:\n",
            "def load_official() -> Loaded:\n    return Loaded(torch.nn.Identity())\n",
        )
    )
    run(project).assert_outcomes(skipped=1)
    (item,) = block(project).components
    assert item.status == "blocked"
    assert item.reason == "missing: weights: acme/mixer, revision 2, gated; needs: legal: licence"


def test_under_xdist_the_ledger_is_complete(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights(project, monkeypatch)
    port(project, "1.0")
    result = project.runpytest("-p", "xdist", "-n", "2", "--truestep-parity")
    result.assert_outcomes(passed=1)
    assert block(project).components[0].status == State.NON_SKIP_PASS


def test_a_plain_run_judges_and_writes_nothing(project: pytest.Pytester) -> None:
    project.runpytest("-p", "no:cacheprovider", "-p", "no:xdist").assert_outcomes(skipped=1)
    assert not (project.path / "parity.toml").exists()


def test_packet_and_renderings(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    test = project.path / "test_parity_acme_mixer.py"
    packet = read_packet(packet_path(test))
    assert packet is not None
    assert packet.official_instantiation_files[0].args == ("width=32",)
    assert "official_class(width=32)" in test.read_text()
    assert max(map(len, test.read_text().splitlines())) <= 100
    (unknown,) = packet.unknowns
    assert unknown.question == "where do the official weights come from?"
    assert unknown.searched[0].startswith("1 Python files of the official repository")
    weights(project, monkeypatch)
    port(project, "1.0")
    run(project)
    packet = read_packet(packet_path(test))
    assert packet is not None
    assert (packet.mode, packet.unknowns) == ("parity-debug", ())
    assert packet.port_files == ("acme_port.py",)
    assert packet.conversion.loader_strictness == "strict"
    assert packet.conversion.strict_load == "loaded"
    dump = (project.path / packet.port_keys).read_text()
    assert dump == "inner.weight  float32 [32, 32]\ninner.bias    float32 [32]\n"

    runner = CliRunner()
    shown = runner.invoke(command, ["status", str(project.path), "--markdown"])
    assert shown.exit_code == 0
    for line in (
        "- **mixer** (generic)",
        "  - status: `non_skip_pass`",
        "  - missing: nothing",
        "  - coverage_scope: `both`",
        "  - official_definition_files: acme_net.py:4 (Mixer)",
        "- notes: none",
        "- escape hatch: none",
        "- handed over: yes",
    ):
        assert line in shown.output.splitlines()
    data = json.loads(runner.invoke(command, ["status", str(project.path), "--json", "-"]).output)
    assert data["ledgers"][0]["components"][0]["status"] == "non_skip_pass"
    plain = runner.invoke(command, ["status", str(project.path)]).output
    assert plain.splitlines()[0] == "1 of 1 component proven"
    assert "rel_l2" in runner.invoke(command, ["show", "acme/mixer", str(project.path)]).output
    keys = runner.invoke(command, ["keys", *map(str, _files(project.path))]).output
    assert "the same checkpoint: 2 paired parameters agree bit for bit" in keys


def _files(folder: Path) -> tuple[Path, Path]:
    name = "model.safetensors"
    return folder / "local_weights" / name, folder / "converted_weights" / name


def test_the_notes_of_a_ledger_survive(project: pytest.Pytester) -> None:
    run(project)
    path = project.path / "parity.toml"
    path.write_text(path.read_text().replace('notes = ""', 'notes = "ask \\"Ada\\"\\nfirst"'))
    run(project)
    assert read_ledger(project.path).notes == 'ask "Ada"\nfirst'
    assert '- notes: ask "Ada"' in markdown([block(project)])


def test_a_scheduler_of_diffusers_through_its_scaffold(pytester: pytest.Pytester) -> None:
    """The one kind without weights; both sides are the same class, which proves nothing."""
    pytest.importorskip("diffusers")
    import diffusers.schedulers.scheduling_ddim as home

    write_scaffold(
        "acme",
        "scheduler",
        kind="scheduler",
        output=pytester.path,
        official=f"{home.__name__}:DDIMScheduler",
        port=f"{home.__name__}:DDIMScheduler",
    )
    run(pytester).assert_outcomes(failed=1)
    (item,) = block(pytester).components
    assert item.evidence.numbers is not None
    assert item.evidence.numbers.verdict == "identical"
    assert "scheduling_ddim.py" in item.reason
    assert item.reason.startswith("proves nothing: both sides share <site-packages>/diffusers/")


def test_every_scaffold_runs_as_written(pytester: pytest.Pytester) -> None:
    for kind in Kind:
        write_scaffold("acme", f"part-{kind}", kind=kind, output=pytester.path)
    result = run(pytester)
    result.assert_outcomes(skipped=len(Kind))
    result.stdout.fnmatch_lines(["*missing: official_import: no official class is named*"])
    found = block(pytester)
    assert {item.status for item in found.everything} == {"scaffold_skip"}
    assert [item.component for item in found.pipeline_parity] == ["part-pipeline"]


def test_a_damaged_ledger_is_kept_and_said(project: pytest.Pytester) -> None:
    run(project)
    path = project.path / "parity.toml"
    for damaged, message in (
        ("<<<<<<< HEAD\nversion = 1\n", "the parity ledger cannot be read"),
        ('version = 1\ncomponent = "x"\n', "the parity ledger is damaged"),
        ("version = 99\n", "the parity ledger was written by a newer truestep"),
    ):
        path.write_text(damaged)
        shown = CliRunner().invoke(command, ["status", str(project.path)])
        assert isinstance(shown.exception, FileFormatError)
        assert str(shown.exception).startswith(message)
        result = run(project)
        assert result.ret != 0
        result.stdout.fnmatch_lines([f"*NOT WRITTEN*{message}*"])
        assert path.read_text() == damaged


def test_two_runs_at_once_lose_nothing(project: pytest.Pytester) -> None:
    """Each writer takes the ledger's lock, reads what the other wrote, and adds its own."""
    entries = []
    for name in ("one", "two"):
        write_scaffold("acme", name, kind="generic", output=project.path)
        evidence = Evidence(result="skipped", date="2026-12-01", missing=None)
        entries.append(
            Component(
                family="acme",
                component=name,
                kind="generic",
                test=f"test_parity_acme_{name}.py::t",
                coverage_scope="both",
                evidence=evidence,
            )
        )
    today = date(2026, 12, 1)
    for _ in range(5):
        (project.path / "parity.toml").unlink(missing_ok=True)
        threads = [
            threading.Thread(target=update_ledger, args=(project.path, [entry], today))
            for entry in entries
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [item.component for item in read_ledger(project.path).component] == ["one", "two"]


def test_a_killed_run_leaves_the_last_ledger(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(project)
    before = (project.path / "parity.toml").read_text()
    weights(project, monkeypatch)
    project.makepyfile(acme_port="import os\nos.kill(os.getpid(), 9)\n")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # a run of its own, no worker's
    killed = project.runpytest_subprocess("-p", "no:cacheprovider", "--truestep-parity")
    assert killed.ret == 1
    killed.stderr.fnmatch_lines(["*SIGKILL*"])
    assert (project.path / "parity.toml").read_text() == before
    assert not list(project.path.glob(".parity.toml*.tmp*"))
