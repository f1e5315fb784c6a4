"""Any diffusers pipeline from the command line, with a case file and without one."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.commands import Captured, Run, runner
from truestep.testing import tiny
from truestep.testing.tiny.calls import picture

CHANGE = """
import torch

def bias(pipe):
    with torch.no_grad():
        pipe.transformer.proj_out.bias.add_(0.01)

def nothing(pipe):
    pass

def decoded(pipe):
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.add_(0.1)

def block(pipe):
    pipe.transformer.transformer_blocks[0].attn.to_q.bias = None

def fused(pipe):
    pipe.transformer.fuse_qkv_projections()

def broken(pipe):
    pipe.vae.decoder.conv_in.forward = lambda x: x[0, 0, 0, 0, 0]
"""

CASES = """
[case.cat]
model = "./flux"
subject = "diffusers"

[case.cat.call]
prompt = "a cat"
height = 32
width = 32
num_inference_steps = 2
max_sequence_length = 16

[case.cat.two.call]
num_images_per_prompt = 2

[case.digit]
model = "builtin:digits"
prompt = "a red three"

[case.digit.two]
steps = 4
"""

WORDS = (
    *("./flux", "--prompt", "a cat", "--set", "height=32", "--set", "width=32"),
    *("--set", "num_inference_steps=2", "--set", "max_sequence_length=16"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("any")
    tiny.save("FluxPipeline", folder / "flux")
    tiny.save("StableDiffusionImg2ImgPipeline", folder / "sd")
    picture(0).save(folder / "cat.png")
    (folder / "change.py").write_text(CHANGE)
    return folder


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured) -> Run:
    monkeypatch.chdir(folder)
    return runner(monkeypatch, capfd)


def test_the_same_words_record_and_check(run: Run, folder: Path) -> None:
    code, out, _ = run("record", *WORDS)
    assert code == 0
    assert "noise floor from" in out
    last = out.splitlines()[-1]
    assert last == (
        "check: truestep check ./flux --prompt 'a cat' --set height=32 --set width=32 "
        "--set num_inference_steps=2 --set max_sequence_length=16"
    )
    code, out, _ = run("check", *WORDS)
    assert code == 0
    assert out.startswith("PASSED identical: ")
    assert "  case         flux-a-cat-" in out
    code, out, _ = run(
        "check", *WORDS, "--apply", "change.py:bias", "--json", "r.json", "--report", "r.html"
    )
    assert code == 1
    assert "drifted: transformer.forward (cond) at step 0: output" in out
    assert "<html" in (folder / "r.html").read_text()
    result = json.loads((folder / "r.json").read_text())["comparisons"][0]
    assert result["case"]["call"]["num_inference_steps"] == 2
    code, out, err = run("record", *WORDS)
    assert code == 2
    assert "a reference of this case exists" in err
    assert "--update" in err


def test_depth_modules_names_the_module_and_the_line(run: Run, folder: Path) -> None:
    options = ("--references", "opened")
    assert run("record", *WORDS, *options)[0] == 0
    options = (*options, "--depth", "modules", "--apply")
    code, out, err = run(
        "check", *WORDS, *options, "change.py:block", "--json", "m.json", "--report", "m.html"
    )
    assert code == 1, err
    first = " ".join(out.split())
    assert first.startswith("FAILED drifted: ")
    module = "transformer.transformer_blocks.0.attn.to_q"
    assert f"(first divergence: `{module}`, step 0, cond" in first
    assert "query = attn.to_q(hidden_states) (for aten.addmm); bias is missing" in " ".join(
        out.split()
    )
    result = json.loads((folder / "m.json").read_text())["comparisons"][0]
    assert result["first_divergence"]["fqn"] == module
    assert module in (folder / "m.html").read_text()
    code, out, _ = run("check", *WORDS, *options, "change.py:fused")
    assert code == 0
    assert "module" not in out.replace("--depth modules", "")
    code, out, _ = run("check", *WORDS, *options, "change.py:broken")
    assert code == 1
    assert out.startswith("FAILED invalid")
    assert "first divergence: `vae.decoder.conv_in`" in out
    assert "change.py:" in out


def test_depth_final_judges_the_end_of_a_free_run(run: Run) -> None:
    options = ("--references", "free")
    code, out, err = run("record", *WORDS, *options, "--floor", "final")
    assert code == 0, err
    options = (*options, "--depth", "final")
    code, out, _ = run("check", *WORDS, *options)
    assert code == 0
    assert out.startswith("PASSED identical")
    assert "what two free runs end with, one after the other" in " ".join(out.split())
    code, out, _ = run("check", *WORDS, *options, "--apply", "change.py:bias")
    assert code == 1
    assert out.startswith("FAILED drifted: the end differs by ")
    assert "which prediction at step 0 made" in " ".join(out.split())
    assert run("check", *WORDS, *options, "--apply", "change.py:fused")[0] == 0


def test_words_without_a_reference_are_missing_with_the_command_that_seeds_it(run: Run) -> None:
    code, out, _ = run("check", *WORDS, "--set", "guidance_scale=2")
    assert code == 3
    assert (
        "next: truestep record ./flux --prompt 'a cat' --set height=32 --set width=32 "
        "--set num_inference_steps=2 --set max_sequence_length=16 --set guidance_scale=2\n"
    ) in out


def test_a_case_file_holds_cases_of_both_kinds(run: Run, folder: Path) -> None:
    (folder / "truestep.toml").write_text(CASES)
    code, out, err = run("record", "cat", "--floor", "none", "--references", "named")
    assert code == 0, err
    assert out.splitlines()[-1] == "check: truestep check cat --references named"
    assert run("check", "cat", "--references", "named")[0] == 0
    changed = ("--set", "guidance_scale=2", "--expect", "different")
    code, out, _ = run("check", "cat", "--references", "named", *changed)
    assert "[guidance_scale=2]" in out
    code, out, _ = run("record", "cat", "--tier", "two", "--floor", "none", "--references", "named")
    assert code == 0
    assert run("check", "cat", "--tier", "two", "--references", "named")[0] == 0
    code, _, err = run("run", "cat")
    assert code == 2
    assert "'cat' is a case of a plain pipeline, and this verb runs truestep's own stages" in err
    (folder / "truestep.toml").unlink()


@pytest.mark.parametrize(
    "words",
    [
        ("ab", "./flux", "--prompt", "a cat", "--apply", "change.py:decoded"),
        ("ab", "--quality", "./flux", "--apply", "change.py:decoded"),
        ("gate", "selftest", "./flux", "--prompt", "a cat"),
    ],
)
def test_a_verb_of_stages_says_what_judges_a_plain_pipeline(
    run: Run, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the change that was typed: it finds the fault, and without it there is none."""
    shutil.copytree("flux", tmp_path / "flux")
    monkeypatch.chdir(tmp_path)
    Path("change.py").write_text(CHANGE)
    code, _, err = run(*words)
    assert code == 2
    assert "plain pipeline, and this verb runs truestep's own stages" in err
    assert "stages can be timed and switched one by one" in err
    record, _, check = err.splitlines()[-1].removeprefix("hint: ").partition(" && ")
    assert run(*shlex.split(record)[1:], "--floor", "none")[0] == 0
    changed = "--apply" in words
    assert run(*shlex.split(check)[1:])[0] == int(changed)
    code, _, err = run(*words)
    assert err.splitlines()[-1] == f"hint: {check}"  # it is not recorded again


def test_a_reference_alone_is_enough_and_shows_its_calls(run: Run) -> None:
    picture_words = ("./sd", "--prompt", "a cat", "--input", "image=cat.png", "--floor", "none")
    code, _, err = run("record", *picture_words, "--set", "num_inference_steps=2", "--output", "r")
    assert code == 0, err
    code, out, _ = run("check", "--reference", "r")
    assert code == 0
    code, out, _ = run("show", "r", "-v")
    assert code == 0
    assert "  call         StableDiffusionImg2ImgPipeline: " in out
    assert "prompt 'a cat', image 'Image 32x32', strength 0.8" in " ".join(out.split())
    assert "  calls        text        text_encoder.forward" in out
    assert "  calls        prediction  unet.forward" in out


def test_a_prepared_case_says_so_everywhere(run: Run, folder: Path) -> None:
    words = (*WORDS, "--prepare", "change.py:bias", "--references", "prepared")
    code, out, err = run("record", *words, "--floor", "none")
    assert code == 0, err
    assert "\nprepared: change.py:bias\n" in out
    assert "--prepare change.py:bias" in out.splitlines()[-1]
    code, out, _ = run("check", *words)
    assert code == 0
    assert "  note         prepared: change.py:bias\n" in out
    path = next((folder / "prepared").rglob("*.safetensors"))
    code, out, _ = run("show", str(path), "-v")
    assert "  prepared     change.py:bias\n" in out
    assert "  sha256       prepare " in out
    code, out, _ = run("check", "--reference", str(path), "--set", "prepare=none")
    assert code == 1
    assert "prepared: reference change.py:bias; candidate not" in out
    source = (folder / "change.py").read_text()
    (folder / "change.py").write_text(source + "\n# changed\n")
    code, out, _ = run("check", *words)
    assert code == 3
    assert "the reference is of another case (sha256.prepare differ)" in out
    assert (
        "--prepare change.py:bias --references prepared --set height=32 --set width=32 "
        "--set num_inference_steps=2 --set max_sequence_length=16 --update  # takes the files"
    ) in out
    (folder / "change.py").write_text(source)


def test_a_lora_of_a_case(run: Run, folder: Path) -> None:
    pytest.importorskip("peft")
    tensors = {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 32),
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(32, 2),
    }
    save_file(tensors, folder / "style.safetensors")
    words = (*WORDS, "--lora", "style.safetensors:0.8", "--references", "lora")
    code, out, err = run("record", *words)
    assert code == 0, err
    assert "\nprepared: lora style.safetensors x 0.8\n" in out
    code, out, _ = run("check", *words)
    assert code == 0
    assert "prepared: lora style.safetensors x 0.8" in out
    path = next((folder / "lora").rglob("*.safetensors"))
    code, out, _ = run("check", "--reference", str(path), "--set", "lora=style.safetensors:1.0")
    assert code == 1
    assert "drifted: transformer.forward (cond) at step 0: output" in out


def test_a_lora_that_changes_nothing_is_said_when_it_is_recorded(run: Run, folder: Path) -> None:
    pytest.importorskip("peft")
    module = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{module}.lora_A.weight": torch.ones(2, 32)}
    for name, value in (("some", 1.0), ("zero", 0.0)):
        up = {f"{module}.lora_B.weight": torch.full((32, 2), value)}
        save_file(tensors | up, folder / f"{name}.safetensors")
    for lora, note in (
        ("some.safetensors:0.8", ""),
        ("some.safetensors:0", "its scale is 0"),
        ("zero.safetensors", "its second factor (B, up) is zero everywhere"),
    ):
        code, out, err = run("record", *WORDS, "--lora", lora, "--floor", "none", "--output", "z")
        assert code == 0, err
        assert ("\nnote: lora " in out) is bool(note)
        assert note in " ".join(out.split())


@pytest.mark.parametrize(
    "words",
    [
        ("--lora", "some.safetensors:0.8"),
        ("--prepare", "change.py:bias"),
        ("--pipeline", "FluxPipeline"),
        ("--input", "latents=a.npy"),
        ("--prompt", "a cat"),
    ],
)
@pytest.mark.parametrize("verb", ["check", "record"])
def test_what_would_say_a_case_beside_a_reference_needs_its_model(
    run: Run, verb: str, words: tuple[str, ...]
) -> None:
    code, _, err = run("record", *WORDS, "--floor", "none", "--output", "alone")
    assert code == 0, err
    code, _, err = run(verb, "--reference", "alone", *words)
    assert code == 2
    assert f"{words[0]} would say a case, and no model is named" in err
    assert "measured the reference is of ./flux" in err
    assert "hint: truestep check --reference alone  # takes its own case" in err
    if words[0] == "--prompt" and verb == "check":
        assert run("check", *WORDS, "--reference", "alone")[0] == 0
        assert run("check", "--reference", "alone")[0] == 0


def test_a_change_that_touches_nothing_is_said_first(run: Run) -> None:
    code, _, err = run("record", *WORDS, "--floor", "none", "--references", "idle")
    assert code == 0, err
    words = (*WORDS, "--references", "idle", "--apply", "change.py:nothing")
    code, out, _ = run("check", *words)
    assert code == 0
    assert "[apply nothing: touched nothing]\n" in out
    first, _, _ = " ".join(out.split()).partition(" case ")
    assert first.endswith(
        "the change touched nothing: no weight, buffer, class, hook, configuration or setting "
        "differs"
    )
    code, out, _ = run("check", *words, "--expect", "different")
    assert code == 1
    assert out.startswith("FAILED unmet")


MODULAR = ("./modular", *WORDS[1:])


def test_a_modular_pipeline_is_recorded_and_checked_by_the_same_words(
    run: Run, folder: Path
) -> None:
    code, out, err = run("tiny", "flux/FluxAutoBlocks/image2image", "modular")
    assert code == 0, err
    words = (*MODULAR, "--input", "image=cat.png")
    code, out, err = run("record", *words, "--floor", "none")
    assert code == 0, err
    assert "0/2" not in err  # no progress bars of the blocks' own
    assert out.splitlines()[-1].startswith("check: truestep check ./modular --prompt 'a cat' ")
    code, out, _ = run("check", *words)
    assert code == 0
    assert out.startswith("PASSED identical: ")
    assert "  case         modular-a-cat-" in out
    code, out, _ = run("check", *words, "--apply", "change.py:bias")
    assert code == 1
    assert out.startswith("FAILED drifted: transformer.forward at step 0: output")
    path = next((folder / "truestep-references").rglob("modular-*.safetensors"))
    code, out, _ = run("show", str(path), "-v")
    assert code == 0
    assert "  call         FluxAutoBlocks: prompt 'a cat'" in out
    assert "output 'images'" in out
    code, out, _ = run("check", "--reference", str(path), "--set", "strength=0.2")
    assert code == 1
    code, _, err = run("record", *MODULAR, "--set", "heigt=32")
    assert code == 2
    assert "where    FluxAutoBlocks.input_names" in err
    assert "did you mean 'height'?" in err


REFUSED = {
    "argument": (("--set", "heigt=32"), "did you mean 'height'?"),
    "pipeline": (("--pipeline", "FluxPipelin"), "did you mean 'FluxPipeline'?"),
    "input": (("--input", "cat.png"), "--input needs NAME=FILE, got 'cat.png'"),
    "file": (("--input", "latents=no.npy"), "no.npy"),
    "subject": (("--subject", "runtime", "--pipeline", "X"), "are of a plain pipeline"),
    "prepare": (("--prepare", "none.py:bias"), "the file of prepare is not there"),
    "function": (("--prepare", "change.py:bis"), "did you mean 'bias'?"),
    "lora": (("--lora", "none.safetensors:0.5"), "the file of lora is not there"),
    "stages": (("--subject", "runtime", "--lora", "a"), "--lora and --prepare are of a plain"),
    "rename": (("--rename", "map.toml"), "--rename needs --depth modules"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_is_refused_with_exit_code_2(name: str, run: Run) -> None:
    options, said = REFUSED[name]
    verb = "check" if name == "rename" else "record"
    code, out, err = run(verb, *WORDS, *options)
    assert code == 2, out
    assert said in err
    assert "Traceback" not in err


def test_values_are_json_or_text() -> None:
    from truestep.call_case import CallCase
    from truestep.cli.cases import values_of

    case = CallCase(model="m")
    words = ["a=3", "b=true", "c=a cat", 'd=["a", "b"]', "e=none", 'f="5"', "g=1e-3", "h=False"]
    assert values_of(case, words) == {
        "a": 3,
        "b": True,
        "c": "a cat",
        "d": ["a", "b"],
        "e": None,
        "f": "5",
        "g": 1e-3,
        "h": False,
    }


def test_a_tiny_pipeline_is_written_without_a_word_of_the_libraries(run: Run) -> None:
    code, out, err = run("tiny", "WanImageToVideoPipeline", "wan")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("WanImageToVideoPipeline, random weights of seed 0, float32, ")
    assert lines[1:] == ["folder: wan"]
    assert err == ""
