"""`truestep serve-check` against a server process with a tiny real pipeline behind it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.commands import Run, runner
from tests.serving.conftest import Address

SMALL = ("--steps", "6", "--size", "32x32")


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `truestep serve-check`."""
    return runner(monkeypatch, capsys, "serve-check")


@pytest.fixture(scope="module")
def reference(server: Address, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers of the trusted server."""
    from truestep.serving.answers import gather, write
    from truestep.serving.client import Endpoint, connected
    from truestep.serving.plan import Ask, Plan

    path = tmp_path_factory.mktemp("answers") / "trusted.safetensors"
    plan = Plan("image", Ask("a red fox in the snow", steps=6, width=32, height=32))
    with connected(Endpoint(server())) as asker:
        write(path, plan, gather(plan, asker.ask, label="trusted", progress=lambda *told: None))
    return path


def test_a_healthy_server_is_equivalent(server: Address, reference: Path, check: Run) -> None:
    code, out, err = check(server(), "--reference", str(reference))
    assert code == 0
    assert "equivalent: 8 pictures are the reference's bit for bit" in out
    assert "not looked at everything before the pictures" in out
    assert f"10 requests to {server()}/v1/images/generations, each at most 600 s" in " ".join(
        err.split()
    )


FAULTS: dict[str, tuple[dict[str, str], str]] = {
    "wrong model": ({"model": "1"}, "another model"),
    "bfloat16": ({"dtype": "bfloat16"}, "the same noise, and other weights, precision"),
    "seed": ({"ignore": "seed"}, "seed: ignored"),
    "random": ({"ignore": "random"}, "seed: ignored: repeats of one seed"),
    "steps": ({"ignore": "steps"}, "steps: ignored"),
    "guidance": ({"ignore": "guidance"}, "guidance: ignored"),
    "negative": ({"ignore": "negative"}, "negative: ignored"),
    "prompt": ({"ignore": "prompt"}, "prompt: ignored"),
    "size": ({"ignore": "size"}, "size: ignored"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault: str, server: Address, reference: Path, check: Run) -> None:
    setup, said = FAULTS[fault]
    code, out, _ = check(server(**setup), "--reference", str(reference))
    assert code == 1
    assert said in " ".join(out.partition("\n  of ")[0].split()), out


@pytest.mark.parametrize(
    "setup", [{"threads": 2}, {"slices": 1}, {"jitter": 1e-4}, {"jitter": 1e-2}], ids=str
)
def test_harmless_differences_are_not_accused(
    setup: dict[str, Any], server: Address, reference: Path, check: Run
) -> None:
    code, out, _ = check(server(**setup), "--reference", str(reference))
    assert code == 0, out


def test_a_trusted_server_is_asked_too(server: Address, check: Run) -> None:
    trusted = server(threads=1)
    code, _, err = check(server(), "--reference", trusted, *SMALL)
    assert code == 0
    assert "20 requests to" in err
    assert check(server(model=1), "--reference", trusted, *SMALL)[0] == 1


def test_without_a_reference_its_model_is_not_judged(server: Address, check: Run) -> None:
    code, out, _ = check(server(model=5), *SMALL)
    assert code == 0
    assert "which model it is was not looked at" in out
    assert check(server(ignore="steps"), *SMALL)[0] == 1
    assert check(server(ignore="guidance"), *SMALL)[0] == 4
    code, out, _ = check(server(ignore="guidance"), *SMALL, "--without", "guidance")
    assert code == 0
    assert "whether guidance is ignored" in " ".join(out.split())


def test_answers_are_kept_and_are_the_next_reference(
    server: Address, tmp_path: Path, check: Run
) -> None:
    path = tmp_path / "a.safetensors"
    assert check(server(), *SMALL, "--prompt", "a cat", "--output", str(path))[0] == 0
    code, _, err = check(server(), "--reference", str(path))
    assert code == 0
    assert "'a cat'" in err
    code, _, err = check(server(), "--reference", str(path), "--steps", "4")
    assert code == 2
    assert "what is asked is what the reference was asked" in err


def test_what_a_healthy_set_up_differs_by_is_no_fault(
    server: Address, reference: Path, tmp_path: Path, check: Run
) -> None:
    """A server in bfloat16 beside a reference in float32, where another such server is trusted."""
    other = tmp_path / "bfloat16.safetensors"
    url, given = server(dtype="bfloat16"), ("--reference", str(reference))
    assert check(url, *given, "--output", str(other))[0] == 1
    code, out, _ = check(url, *given, "--benign", str(other))
    assert code == 0
    assert "healthy set-ups are up to" in out
    assert check(server(model=1), *given, "--benign", str(other))[0] == 1
    assert check(server(ignore="steps"), *given, "--benign", str(other))[0] == 1
    code, _, err = check(url, "--benign", str(other))
    assert code == 2
    assert "--benign is set beside a reference" in err
    assert check(server(), *SMALL, "--prompt", "another", "--output", str(other))[0] == 0
    code, _, err = check(url, *given, "--benign", str(other))
    assert code == 2
    assert "was asked something else" in err


def test_a_video_api_is_checked(
    server: Address, check: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("truestep.serving.client.EVERY_S", 0.01)
    video = (*SMALL, "--kind", "video", "--frames", "2")
    code, out, err = check(server(), *video, "--reference", server(threads=1))
    assert code == 0, out + err
    assert "2 frames" in err
    assert check(server(ignore="negative"), *video, "--reference", server())[0] == 1


def test_answers_are_shown_as_what_they_are(
    reference: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = runner(monkeypatch, capsys, "show")(str(reference))
    assert code == 0
    assert "answers of a server (truestep serve-check)" in " ".join(out.split())


def test_a_dry_run_lists_every_request_and_asks_nothing(check: Run) -> None:
    code, out, err = check("http://127.0.0.1:9", *SMALL, "--dry-run")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("10 requests to http://127.0.0.1:9/v1/images/generations")
    assert len(lines) == 11
    assert lines[1].split()[:3] == ["base/0", "seed", "0,"]


def test_a_plan_is_as_wide_as_a_terminal_and_says_what_changes(check: Run) -> None:
    prompt = "a red fox that trots through fresh snow beside a river in the evening light"
    code, out, _ = check("http://127.0.0.1:9", "--kind", "video", "--prompt", prompt, "--dry-run")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert prompt in " ".join(out.split())
    assert out.count("17 frames") == 1
    assert "\n  steps        10 steps\n" in out
    assert "\n  base/1       the same again\n" in out


def test_what_failed_says_why_what_was_written_and_what_comes_next(
    server: Address, reference: Path, tmp_path: Path, check: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    two = server(ignore="seed+guidance")
    code, out, err = check(two, *SMALL, "--output", "a.safetensors")
    assert code == 1
    assert err.splitlines()[-1] == "answers: a.safetensors"
    assert Path("a.safetensors").is_file()
    said = " ".join(out.split())
    assert "drifted: seed: ignored" in said
    assert "note guidance: no effect: another one gives the same picture bit for bit" in said
    hint = out.splitlines()[-1].removeprefix("next: truestep serve-check ")
    assert "--field seed=... if the server calls it otherwise" in hint
    code, out, _ = check(*shlex.split(hint, comments=True))
    assert (code, "base/0  " in out) == (0, True)

    code, out, _ = check(server(ignore="guidance"), *SMALL)
    assert code == 4
    assert out.splitlines()[-1].startswith("hint: give --reference ")

    code, out, _ = check(server(model=1), "--reference", str(reference))
    assert code == 1
    hint = out.splitlines()[-1].removeprefix("next: truestep serve-check ")
    code, out, _ = check(*shlex.split(hint, comments=True))
    assert code == 1
    assert out.splitlines()[-2:] == [
        "hint: what is inside of the model is judged by truestep check",
        "report: serve-check.html",
    ]

    code, out, err = check(server(), "--reference", str(reference))
    assert (code, "next: " in out, "answers: " in err) == (0, False, False)


def test_more_requests_than_allowed_are_refused_before_the_first(check: Run) -> None:
    code, _, err = check("http://127.0.0.1:9", "--repeats", "9", "--most", "10")
    assert code == 2
    assert "16 requests are more than --most allows" in err


def test_a_key_is_printed_and_kept_nowhere(
    server: Address, tmp_path: Path, check: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, kept = server(broken="key"), tmp_path / "a.safetensors"
    written = (tmp_path / "a.json", tmp_path / "a.html", kept)
    files = [
        w
        for o, p in zip(("--json", "--report", "--output"), written, strict=True)
        for w in (o, str(p))
    ]
    monkeypatch.setenv("MY_KEY", "s3cret")
    code, out, err = check(url, *SMALL, "--key-env", "MY_KEY", *files)
    assert code == 0
    assert "s3cret" not in out + err
    for path in written:
        assert b"s3cret" not in path.read_bytes()
    code, _, err = check(url, *SMALL)
    assert code == 2
    assert "needs a key" in err
    code, _, err = check(url, *SMALL, "--key-env", "NO_SUCH_KEY")
    assert code == 2
    assert "NO_SUCH_KEY of --key-env is not set" in err


@pytest.mark.parametrize(
    ("url", "told"),
    [("http://a.example", True), ("https://a.example", False), ("http://127.0.0.1:9", False)],
)
def test_a_key_that_anybody_can_read_is_told(
    url: str, told: bool, check: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "s3cret")
    code, out, err = check(url, "--key-env", "MY_KEY", "--dry-run")
    assert code == 0
    assert ("unencrypted" in err) is told
    assert "s3cret" not in out + err


def test_a_key_is_not_sent_to_the_trusted_server(
    server: Address, check: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "s3cret")
    keyed = server(broken="key")
    arguments = (keyed, "--reference", keyed, "--key-env", "MY_KEY", *SMALL)
    assert check(*arguments)[0] == 2
    assert check(*arguments, "--reference-key-env", "MY_KEY")[0] == 0


@pytest.mark.parametrize("how", ["html", "error", "hangs up", "empty"])
def test_a_broken_server_is_exit_code_2(how: str, server: Address, check: Run) -> None:
    code, out, err = check(server(broken=how.replace(" ", "%20")), *SMALL)
    assert code == 2
    assert "\x1b" not in out + err


def test_a_slow_server_is_exit_code_2(server: Address, check: Run) -> None:
    code, _, err = check(server(broken="slow"), *SMALL, "--timeout", "0.3")
    assert code == 2
    assert "did not answer within 0.3 s" in err


def test_results_are_json_and_a_report(
    server: Address, reference: Path, tmp_path: Path, check: Run
) -> None:
    page = tmp_path / "a.html"
    code, out, _ = check(
        server(model=1), "--reference", str(reference), "--json", "--report", str(page)
    )
    assert code == 1
    (result,) = json.loads(out)["comparisons"]
    assert result["verdict"] == "drifted"
    assert result["rule"]["name"] == "endpoint/1"
    assert len([row for row in result["rows"] if row["name"].startswith("picture/")]) == 8
    assert [media["name"] for media in result["media"]][-1] == "picture/base/0"
    assert "another model" in page.read_text()
    assert "data:image/png" in page.read_text()


def test_fields_of_other_names_and_further_ones_are_sent(server: Address, check: Run) -> None:
    url = server(refuse="true_cfg_scale")
    code, _, err = check(url, *SMALL, "--field", "guidance=true_cfg_scale")
    assert code == 2
    assert "no field true_cfg_scale" in err
    assert check(server(refuse="fps"), *SMALL, "--set", "fps=8")[0] == 2
    code, _, err = check(url, "--field", "colour=x")
    assert code == 2
    assert "no parameter 'colour'" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["ftp://a"],
        ["http://a", "--size", "32"],
        ["http://a", "--size", "0x0"],
        ["http://a", "--steps", "0"],
        ["http://a", "--guidance", "1"],
        ["http://a", "--repeats", "1"],
        ["http://a", "--set", "x"],
        ["http://a", "--set", "seed=5"],
        ["http://a", "--set", "negative_prompt=blue"],
        ["http://a", "--reference", "none.safetensors"],
        ["http://a", "--kind", "sound"],
    ],
    ids=" ".join,
)
def test_what_cannot_mean_anything_is_refused(arguments: list[str], check: Run) -> None:
    code, _, err = check(*arguments)
    assert code == 2
    assert err


def test_another_file_is_no_reference(tmp_path: Path, reference: Path, check: Run) -> None:
    from truestep.recording.header import read_header
    from truestep.serving.answers import KEY

    said = read_header(reference).metadata[KEY]
    x = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    path = tmp_path / "a.safetensors"
    for tensors, metadata in (
        ({"x": x}, {}),
        ({"x": x}, {KEY: "{"}),
        ({"x": x}, {KEY: "{}"}),
        ({"x": x}, {KEY: said}),
    ):
        save_file(tensors, path, metadata=metadata)
        code, _, err = check("http://a", "--reference", str(path))
        assert code == 2
        assert "the file" in err
