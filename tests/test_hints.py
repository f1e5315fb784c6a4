"""Every hint is a command that works as it is printed, or is listed here as advice.

A hint is provoked, read from what was printed, taken apart by a real shell, and run.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import truestep
from tests.commands import Run, runner
from truestep import cli
from truestep.errors import UsageError
from truestep.recording.format import Recording
from truestep.replay.record import record_pipeline
from truestep.runtime.pipeline import Pipeline

SOURCE = Path(truestep.__file__).parent
COMMAND = re.compile(
    r"(truestep|--\S+|pip|git|df|ls|torchrun|ray|hf|unset|grep|TRUESTEP_TRACEBACK=1)( |\S+=|$)"
)


def templates(node: ast.expr) -> Iterator[str]:
    """The texts that an expression may be, `{}` for what is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values)
    elif isinstance(node, ast.IfExp):
        yield from (*templates(node.body), *templates(node.orelse))
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from templates(value)
    elif isinstance(node, ast.BinOp):
        for left in [*templates(node.left)] or ["{}"]:
            for right in [*templates(node.right)] or ["{}"]:
                yield left + right


def expressions(tree: ast.Module) -> Iterator[ast.expr]:
    """What is given as a hint: by keyword, by assignment, or by a function that makes one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "hint":
            yield node.value
        elif isinstance(node, ast.Assign):
            names = [ast.unparse(target).rpartition(".")[2] for target in node.targets]
            if "hint" in names:
                yield node.value
        elif isinstance(node, ast.FunctionDef) and node.name in ("_hint", "_instead"):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Return) and inner.value is not None:
                    yield inner.value


def hints() -> set[str]:
    """All hints of the source."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        for expression in expressions(ast.parse(path.read_text())):
            found |= set(templates(expression))
    return found - {""}


ADVICE = {
    "name folders of packages relative to the folder that it runs in",
    "name it from the folder of the case file",
    "write it as {}={}:{} for the two values alone",
    "install the project in this environment in editable mode: pip install -e .",
    "give --set KEY=VALUE or --apply FILE.py:FUNCTION",
    "give --prompts FILE, one a line",
    "it is called with frames `f h w c` (float32 in [0, 1]) and the prompt, and returns a "
    "number, higher is better",
    "give --margin {}=VALUE",
    "give --seeds N: every prompt is run from N seeds",
    "give the function another name",
    "leave out --prompts: the model has 160 of its own",
    "give the folder of a CLIP model: clip:FOLDER",
    "name the model, without a case file: builtin:digits or a folder",
    "give a folder, or a function that loads a module: port.py:load",
    "give a function that takes no arguments",
    "give the folder of a plain pipeline",
    "return a torch.nn.Module, or a module and a dict of its inputs",
    "return them beside the module: return module, {'x': torch.randn(2, 8)}",
    "; did you mean {}?",
    "Loaded(call, module=...), state=..., or weights=[...] of files with names",
    "Loaded(call, weights=[...]) names the weight files of a side",
    "Loosened(rel_l2=..., reason=..., owner=..., expires='2027-01-31')",
    "`truestep parity keys {}` lists the weights of both sides, paired",
    "a case file holds [case.NAME] tables, and [references] with store = 'URL'",
    "give --reason 'TEXT'",
    "give --store, TRUESTEP_STORE, or [references] store in truestep.toml",
    "name the server and who asks in the variables of its library, such as AWS_ENDPOINT_URL, "
    "AWS_PROFILE, HF_TOKEN",
    "stop() the first watch before the second begins",
    "write it as hf://datasets/OWNER/NAME",
    'write it as store = "s3://bucket/prefix"',
    "a name is matched whole: 'blocks.0*' takes a block and what is in it",
    "add a table [case.{}.{}] with the values that differ",
    "all of them are listed by truestep gate thresholds lint FILE",
    "any two safetensors files are judged by truestep compare",
    "begin one: truestep ab CASE --set KEY=VALUE --output DIR",
    "begin: truestep parity new FAMILY COMPONENT --kind KIND; truestep parity run",
    "branch='cond'",
    "call .eval() on it before it is recorded",
    "call it once the pipeline has returned",
    "call pipeline.prepare(pipeline)",
    "call=lambda **recorded: port(...) passes what the trace does not hold",
    "call=lambda *recorded, **named: model(...) puts the arguments together",
    "change the pipeline in place and return nothing, or return a Pipeline",
    "compare all of them: truestep ab ablate CASE --all",
    "convert it in the loader's function: every output has to be compared",
    "delete stub({}, ...) from the parity test",
    "depth='modules' opens the models",
    "draw everything from it: torch.randn(..., generator=generator)",
    "drop both",
    "drop {}",
    "e.g. --gate cosine:5e-3,1e-2 --gate ssim:0.93",
    "e.g. --gate {}",
    "e.g. --matrix dtype=float32,bfloat16 --matrix compile=off,on",
    "e.g. --matrix compile=off,on",
    "e.g. --matrix {}=A,B",
    "apt-get install g++, or leave compile out",
    "e.g. --set guidance_scale=3.1",
    "e.g. truestep trace run -- python run.py",
    "give --set KEY=VALUE, --apply FILE.py:FUNCTION, or --expect same for an A/A run",
    "give --set dtype=... or --set device=... instead",
    "give --set image=PATH",
    "give --set upsampler=FOLDER, such as latent_upsampler of Lightricks/LTX-2",
    "give --set {}=PATH, or drop {}",
    "give a model folder of LTX-2 or LTX-2.3",
    "give a plain tensor: tensor.full_tensor(), or tensor.dequantize()",
    "give another --history",
    "give another --history; this file was not touched",
    "give another --output",
    "give another value, or --expect same for an A/A run",
    "give both or neither",
    "give builtin:digits, a diffusers folder, or a hub id like Wan-AI/NAME",
    "give each its own path",
    "give each its own: truestep.check(x, name='another')",
    "give each side its own code, or allow_shared={'path/end.py': 'why it is no proof'}",
    "give one tensor, or a file whose tensor is called {}",
    "give one that upsamples height and width only",
    "give slice_spec=: {}",
    "give slice_spec=SliceSpec(kind=..., ranges=...) or one of {}",
    "give tensors, numpy arrays, a mapping of them, a recording or a path",
    "give the upsampler of the model's own version",
    "give what runs copies: tensor.clone()",
    "install {}, or stub it: with stub({}, ...)",
    "it holds [known.CASE] tables only",
    "it holds [known.CASE] tables with reason, since, stage and rel_l2",
    'it holds {"cases": {"ID": {"ssim_threshold": 0.95, ...}}}, as SGLang\'s',
    "it is called with the pipeline: transformer, transformer_2, text_encoder, tokenizer,"
    " vae, scheduler, settings and the stage functions",
    "leave fps out of the case",
    "leave guidance_scale_2 out of the case",
    "leave out --noise; --tolerance judges by a number instead",
    "leave out --resume to begin one",
    "leave out weights",
    "leave {} out of the case",
    "look at what the trusted side gives, then record again",
    "make it on the CPU; the loaders' functions move it",
    "make one: truestep trace record CASE --output FILE, trace run, or capture()",
    "make the first stage with truestep run",
    "make the first stage with truestep run, and an LTX-2 model",
    "measure again, and agree on a new Loosened(..., expires=...)",
    "measure again; a clock, a stage or the history is wrong",
    "measure the floor: --noise TRACE of the trusted model, run with other threads or again",
    "record both traces with --level sketch: of moments alone, sameness does not follow",
    "name one of them",
    "name the components that run: subject_of(function, components={...})",
    "give real numbers, and let the function make view_as_complex of them",
    "name one of its parts: {}",
    "name one of them: {}",
    "name the pairs with --rename MAP.toml; traces at level sketch or full pair by what "
    "modules return",
    "names are the candidate's on the left, the trusted model's on the right",
    "nothing was imported",
    "package.module:Class",
    "record it again with this step",
    "record it whole: truestep record CASE --level full --output FILE",
    "record it with --level full --inputs",
    "record it with --select '*' --inputs: {} must be among the modules",
    "record the case with its frames: truestep record",
    "replay the change on recorded inputs: truestep check CASE --apply FILE.py:FUNCTION",
    "record the pipeline that serves, without a cache",
    "record the reference again with this slice, or give its own slice_spec=",
    "rename or delete the entry",
    "give --rename MAP.toml (in Python rename={'layers.*': 'blocks.*'}): the port's names, "
    "then the trace's",
    "write [rename], then 'layers.*' = 'blocks.*': the actual side's names first",
    "reset it inside what is recorded",
    "return Loaded(model.eval(), ...)",
    "return a module, a function, Loaded(...), or a truestep recording",
    "return a tensor, a sequence of tensors or a mapping of them",
    "return tensors in any nest of tuple, list, dict and dataclass",
    "run in a folder that all machines share; --ray local needs none",
    "run one after the other, or give each its own copy",
    "run them one by one, each with its own --output",
    "save it with all its parts: LTX2Pipeline.save_pretrained",
    "save plain numbers: numpy.save(path, array, allow_pickle=False)",
    "save tensor.contiguous(), or a smaller part of it",
    "save tensor.{}",
    "see what a trace holds: truestep show TRACE",
    "seed or reset it inside what is recorded",
    "set fps and videos_per_prompt as the first stage has them",
    "set it: export {}=DIR",
    "judge it by the trusted model: {}",
    "thread.join() at the end of the test",
    "truestep.check_latent(latents['video'], name='video'), and so for each; "
    "truestep.check(latents) judges all in one",
    "truestep.record_function(function, samples) makes one",
    "make one: truestep training record FILE.py:FUNCTION, or record_training()",
    "return truestep.TrainingStep(model=..., run=..., optimizer=...)",
    "gaussian_log_probability(actions, means, stds) makes them",
    "give largest_sigma=, the second sigma of the schedule",
    "save_file({'log_probability': values, 'timesteps': timesteps}, path)",
    "use at most as many * on the right as on the left",
    "use diffusers.EDMEulerScheduler or one with its interface",
    "use letters, digits, dots, dashes and underscores",
    "wait for it, or give another --output",
    "wait for it; this command then begins where it stands",
    "write it as GOOD..BAD",
    "write it as NAME=GOOD..BAD, or NAME=GOOD:BAD for two values alone",
    "write it as NAME==GOOD..BAD, or NAME==A,B,C to name all versions",
    "drop one of them",
    "where you trust it: torch.save(dict_of_plain_tensors, path)",
    "wrap it in a Python class, and give that as the component",
    "write it as expires='2027-01-31'",
    "write it as namespace::operator(Tensor q) -> Tensor",
    "write it as package.module:Class",
    "write one with a table [case.NAME] that has model and prompt",
    "{} --prompt '{}'  # a case without a file",
    "{} --truestep-update",
    "leave --thresholds out",
    "leave --depth out",
    "give --meant auto: it finds out which quantiser explains the weights",
    "give --input {}=PATH or --set {}=VALUE, or it in the case",
    "leave generator out of the case",
    "set it as an attribute of the pipeline",
    "give what it is called with: check(pipeline, reference, call={...})",
    "check(pipeline, reference, {}, trusted=another_pipeline)",
    "leave trusted out",
    "leave --accept out",
    "leave --from-disk out",
    "leave --low-memory out",
    "leave --post out",
    "leave --dry-run out",
    "give --references a folder on a larger disk",
    "leave --resume out",
    "give the case: {}(case, ..., {}=True)",
    "run the check again",
    "case.replace(prompt='a cat') gives it others",
    "save the final latents of both sides, and compare those",
    "give other runs of the trusted side (--same-seed-of, --other-seeds), or save the final "
    "latents of both sides, and compare those",
    "record and check run any pipeline: give --prompt, or a table [case.NAME.call]",
    "e.g. --input image=cat.png",
    "give another value of {}, or --without {}",
    "give it longer: --timeout SECONDS",
    "give the key as a variable of the environment: --key-env NAME",
    "leave the options out, or give the reference's address",
    "one is written by truestep serve-check --output",
    "such as http://127.0.0.1:30000",
    "give --reference too",
    "say it by the option of its name",
    "give --reference the answers or the address of a server that you trust",
    "{} --dry-run  # what is asked; {}",
    "{} --report serve-check.html  # shows the pictures of both",
    "what is inside of the model is judged by truestep check",
    "write its answers with --reference beside --output",
}
"""What no command can do for the reader."""

ELSEWHERE = {
    "truestep {} --dry-run": "tests/experiment/test_remade.py",
    "truestep {}  # in the baseline": "tests/experiment/test_remade.py",
    "git diff {}": "tests/experiment/test_remade.py",
    "git status": "needs a folder outside of any repository",
    "git ls-files --stage  # mode 120000 is a link": "tests/experiment/test_remade.py",
    "pip install 'truestep[{}]'": "installs a package",
    "pip install --upgrade truestep": "installs a package",
    "pip install torchvision": "installs a package",
    "pip install {}": "installs a package",
    "git -C {} lfs pull --include {}": "needs Git LFS",
    "git fetch --unshallow": "needs a repository that was cloned in part",
    "git fsck": "needs a repository that is damaged",
    "--resume  # goes on with it; another --output keeps it": "tests/cli/test_ab_quality",
    "truestep references pull  # begins it again": "tests/recording/test_remote_stores",
    "truestep references push  # sends what is missing": "of a store that loses what it is sent",
    "truestep references status": "of a file that is changed while it is sent",
    "truestep references status{}": "tests/cli/test_loosening.py",
    "hf download {}  # then give its folder as model": "needs the network",
    "ray start --head  # starts a cluster; --ray local needs none": "starts a cluster",
    "ray status  # lists the resources of a cluster": "needs a cluster",
    "torchrun --nproc-per-node 2 -m truestep run CASE --set cfg=parallel": "needs two processes",
    "--set cfg=sequential  # runs on one process": "of a process of torch.distributed that is gone",
    "--set device=cpu  # or a torch build for the device": "of a machine with such a device",
    "truestep doctor": "of an attention backend of another machine",
    "git checkout {}": "needs a repository",
    "--good {} --bad {}": "tests/cli/test_bisect",
    "git diff {} -- {}": "tests/judge/test_rule_changes",
    "git log --oneline --max-count 5": "fails where there is no repository, which is what it tells",
    "git checkout {}  # or delete it and run the parity tests again": "needs a repository",
    "unset {}  # tests the installed package": "a variable of the reader's shell",
    "TRUESTEP_TRACEBACK=1 {}": "tests/cli/test_ended",
    "truestep parity status": "tests/cli/test_ended",
    "--accept {}  # compares with it all the same": "tests/replay/test_implementation",
    "df -h {}  # what is measured is kept: --resume goes on": "as any df",
    "df -h {}; ls -ld {}  # the runs before it are kept": "as any df",
    "ls -ld {}": "as any ls",
    "truestep perf record --prompt 'a cat'  # makes one": "of the library alone",
    "truestep perf record --prompt '{}'{}  # a case without a file": "tests/cli/test_perf",
    "truestep perf record CASE --runs {}  # more processes, or a quieter machine": "as the next",
    "truestep perf record CASE --runs {}  # {}": "tests/cli/test_perf",
    "truestep record {} && {}": "tests/cli/test_any_pipeline",
    "truestep parity show {}{}": "tests/parity/test_workflow",
    "--set scheduler=FlowMatchEulerDiscreteScheduler": "of a model with a third scheduler",
    "truestep run CASE  # repeats it; runs measured before it are kept": "of a case that raises",
    "ls -d {}/*.calls": "fails where there is none, which is what it tells",
    "truestep engine recover {}": "tests/engines/test_engine_runs",
    "truestep engine run -- python run.py": "needs a program of an engine",
    "truestep engine run --engine {} -- python x.py": "needs a program of an engine",
    "ls -d *.spool": "fails where there is none, which is what it tells",
}
"""Commands that no test can run here, and why; or the test that does."""


def test_every_hint_is_run_or_is_advice() -> None:
    found = hints()
    commands = {hint for hint in found if COMMAND.match(hint)}
    assert found - commands == ADVICE
    assert commands - set(SCENARIOS) == set(ELSEWHERE)
    assert set(SCENARIOS) <= commands


@pytest.mark.parametrize("hint", sorted(set(hints()) - ADVICE))
def test_a_command_has_no_placeholder_and_its_prose_is_a_comment(hint: str) -> None:
    command = hint.partition("  # ")[0]
    words = [
        w for w in re.findall(r"\b[A-Z]{2,}\b", command) if w not in ("CASE", "TRUESTEP_TRACEBACK")
    ]
    assert not words
    assert " or " not in command
    assert ", " not in command


FILE = """
[case.a]
model = "wan"
prompt = "it's a red three 猫"
steps = 2
height = 16
width = 16
num_frames = 5
max_sequence_length = 8
settings = {{ device = "cpu" }}

[case.b]
model = "wan"
prompt = "a blue one"
steps = 2
height = 16
width = 16
num_frames = 5
max_sequence_length = 8
settings = {{ device = "cpu" }}

[case.l]
model = "{ltx2}"
prompt = "a red three moving left"
steps = 2
height = 32
width = 32
num_frames = 9
max_sequence_length = 16
[case.l.settings]
device = "cpu"
profile = "diffusers-0.42.1"
stg_blocks = [1]
audio_stg_blocks = [1]
"""

CHANGE = """
def same(pipe):
    pass

def watched(pipe):
    layer = pipe.transformer.proj_out
    own = layer.forward
    layer.forward = lambda x: own(x) + bool(layer._forward_hooks)

def unsure(pipe):
    own = pipe.transformer.proj_out.forward
    pipe.transformer.proj_out.forward = lambda x: own(x) * (1 + 7.6e-6)

def four_bits(pipe):
    from truestep.runtime.quantising import quantise
    quantise(pipe, "gguf:Q4_0")

def raises(pipe):
    def update(*given, **named):
        raise ValueError("no")
    pipe.update = update
"""


@pytest.fixture(scope="module")
def recorded(
    tiny_wan: dict[str, Path], tiny_ltx2: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder of cases; references of `a` whole, and of `b` without a floor."""
    from truestep import record
    from truestep.case import load_cases
    from truestep.recording.store import Store, place_of

    folder = tmp_path_factory.mktemp("hints")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.chdir(folder)
    shutil.copytree(tiny_wan["wan21"], folder / "wan")
    text = FILE.format(ltx2=tiny_ltx2["2.3"])
    (folder / "truestep.toml").write_text(text)
    (folder / "my cases.toml").write_text(text.replace("a blue one", "a green one"))
    (folder / "change.py").write_text(CHANGE)
    for name, case in load_cases(folder / "truestep.toml").items():
        if name != "l":
            recording = record(case, floor="none")
            Store(folder / "truestep-references").save(recording, place_of(recording))
    save_file({"x": torch.zeros(2)}, folder / "plain.safetensors")
    monkeypatch.undo()
    return folder


@pytest.fixture
def run(
    recorded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Run:
    """The command line in a copy of that folder. An ablation measures no noise floor."""

    def unmeasured(pipe: Pipeline, **given: Any) -> Recording:
        return record_pipeline(pipe, **{**given, "floor": "none"})

    monkeypatch.setattr("truestep.experiment.ablation.record_pipeline", unmeasured)
    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return runner(monkeypatch, capfd)


def printed(out: str, err: str) -> str:
    """The hint that a command has printed."""
    found = re.findall(r"^(?:  hint {9}|hint: )(.*)$", out + err, re.MULTILINE)
    found += re.findall(r"^next: (.*)$", out + err, re.MULTILINE)
    assert found, (out, err)
    return str(found[0])


def paste(run: Run, hint: str) -> tuple[int, str, str]:
    """Run a hint as a shell reads it; truestep's own verbs in this process."""
    script = f"truestep() {{ printf '%s\\0' \"$@\"; printf '\\n'; }}\n{hint}\n"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    if not hint.startswith("truestep "):
        return done.returncode, done.stdout, done.stderr
    assert done.returncode == 0, done.stderr
    results = [run(*words.split("\0")[:-1]) for words in done.stdout.splitlines()]
    return results[-1]


def given(*arguments: str) -> Callable[[Path], tuple[str, ...]]:
    """A command that needs nothing made before."""
    return lambda folder: arguments


def engine_run(*tensors: str) -> Callable[[Path], tuple[str, ...]]:
    """A check of a run that holds some seams, by a folder that is no model."""

    def provoke(folder: Path) -> tuple[str, ...]:
        save_file({name: torch.ones(1, 4, 8, 8) for name in tensors}, "run.safetensors")
        return ("engine", "check", "run.safetensors", "--model", ".")

    return provoke


def other_reference(folder: Path) -> tuple[str, ...]:
    path = next(folder.rglob("*blue-one*.safetensors"))
    return ("check", "a", "--reference", str(path))


def sketch(folder: Path) -> None:
    from truestep.case import load_cases
    from truestep.recording.store import Store, place_of
    from truestep.replay.record import record

    recording = record(load_cases(folder / "truestep.toml")["a"], level="sketch", floor="none")
    Store(folder / "truestep-references").save(recording, place_of(recording), update=True)


def of_sketch(*arguments: str) -> Callable[[Path], tuple[str, ...]]:
    def make(folder: Path) -> tuple[str, ...]:
        sketch(folder)
        return arguments

    return make


def without(folder: Path, name: str) -> None:
    """Replace the reference of `a` by one that lacks a tensor."""
    from truestep.recording.store import Store, place_of

    recording = Recording.open(next(folder.rglob("*red-three*.safetensors")))
    kept = {key: tensor.clone() for key, tensor in recording.items() if key != name}
    rows = tuple(row for row in recording.manifest.tensors if row.name in kept)
    manifest = recording.manifest.model_copy(update={"tensors": rows})
    shorter = Recording.in_memory(kept, manifest)
    Store(folder / "truestep-references").save(shorter, place_of(shorter), update=True)


def cut(folder: Path) -> tuple[str, ...]:
    without(folder, "step/0001/guided")
    return ("check", "a")


def experiment(folder: Path) -> tuple[str, ...]:
    """An experiment whose candidate fails at once, begun twice."""
    arguments = ("ab", "a", "--apply", "change.py:raises", "--rounds", "1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["truestep", *arguments])
        cli.run_here()
    return arguments


def twice(*arguments: str) -> Callable[[Path], tuple[str, ...]]:
    """A command that has run once already."""

    def make(folder: Path) -> tuple[str, ...]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["truestep", *arguments])
            cli.run_here()
        return arguments

    return make


def written_already(folder: Path) -> tuple[str, ...]:
    (folder / "port.py").write_text(
        "import torch\n\ndef load():\n    return torch.nn.Linear(2, 2)\n"
    )
    return twice("new", "test", "port.py:load", "--output", "my test.py")(folder)


def beneath_a_file(folder: Path) -> tuple[str, ...]:
    (folder / "no folder").write_text("")
    return ("record", "a", "--output", "no folder/r.safetensors")


def spools(count: int) -> Callable[[Path], tuple[str, ...]]:
    """What killed programs left of a trace; where it is one, the trace is there as well."""

    def make(folder: Path) -> tuple[str, ...]:
        code = (
            "import os, sys, torch\nfrom truestep import capture\n"
            "model = torch.nn.Linear(2, 2)\n"
            "with capture(model, path='my trace.safetensors'):\n"
            "    model(torch.ones(1, 2))\n    os._exit(0)\n"
        )
        for _ in range(count):
            subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
        if count == 1:
            save_file({"x": torch.zeros(1)}, folder / "my trace.safetensors")
        return ("trace", "recover", "my trace.safetensors")

    return make


def activations(folder: Path) -> tuple[str, ...]:
    """Names of parameters, values that agree within rounding and not in their bits."""
    value = torch.linspace(1, 2, 64).reshape(8, 8)
    save_file({"blocks.0.weight": value}, folder / "x.safetensors")
    save_file({"blocks.0.weight": value * (1 + 1e-6)}, folder / "y.safetensors")
    return ("compare", "x.safetensors", "y.safetensors")


def renamed_parameters(folder: Path) -> tuple[str, ...]:
    """The same parameters, under other names."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(8, 8, generator=generator) for _ in range(4)]
    for file, stem in (("x", "blocks"), ("y", "layers")):
        named = {f"{stem}.{at}.weight": tensor for at, tensor in enumerate(tensors)}
        save_file(named, folder / f"{file}.safetensors")
    return ("compare", "x.safetensors", "y.safetensors")


def no_floor(folder: Path) -> tuple[str, ...]:
    return ("gate", "thresholds", "write", "a", "--output", "limits.json")


def another_model(folder: Path) -> tuple[str, ...]:
    """The case's model is another one by now."""
    from safetensors.torch import load_file

    weights = next((folder / "wan" / "transformer").glob("*.safetensors"))
    changed = {name: tensor * 1.5 for name, tensor in load_file(weights).items()}
    save_file(changed, weights, metadata={"format": "pt"})
    return ("record", "a", "--runs", "1")


def damaged_model(folder: Path) -> tuple[str, ...]:
    weights = next((folder / "wan" / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    return ("run", "a", "--latent-only")


def limits_there(folder: Path) -> tuple[str, ...]:
    """A threshold file that has the case already, and a reference with a floor."""
    twice("record", "a", "--update")(folder)
    (folder / "limits.json").write_text('{"cases": {"a": {"ssim_threshold": 0.9}}}')
    return ("gate", "thresholds", "write", "a", "--output", "limits.json")


def no_frames(folder: Path) -> tuple[str, ...]:
    without(folder, "video/frames")
    return ("gate", "selftest", "a", "--gate", "ssim:0.9")


def of_a_function(folder: Path) -> tuple[str, ...]:
    samples = [{"x": torch.linspace(1, 2, 8)}]
    truestep.record_function(lambda x: 2 * x, samples, path=folder / "f.safetensors", floor=False)
    return ("check", "a", "--reference", "f.safetensors")


def measured(folder: Path) -> tuple[str, ...]:
    """A history of another case; what the measured numbers say is another matter."""
    twice("perf", "record", "a", "--runs", "1", "--history", "my runs")(folder)
    return ("perf", "show", "c", "--history", "my runs")


def array(folder: Path) -> tuple[str, ...]:
    np.save(folder / "my array.npy", np.zeros(3))
    return ("check", "a", "--reference", "my array.npy")


def stopped(folder: Path) -> tuple[str, ...]:
    """A record that was stopped while its floor was measured, of a model that is another by now."""

    def killed(*given: Any, **named: Any) -> None:
        raise UsageError("killed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("truestep.replay.floor._in_other_precision", killed)
        patch.setattr(sys, "argv", ["truestep", "record", "a", "--update"])
        cli.run_here()
    another_model(folder)
    return ("record", "a", "--update", "--resume")


def as_changed(folder: Path) -> tuple[str, ...]:
    """The only reference is of the case as --set changes it."""
    shutil.rmtree(folder / "truestep-references")
    return twice("record", "a", "--set", "steps=1", "--floor", "none")(folder)[:-2]


def in_a_store(*arguments: str, root: str = "truestep-references") -> Callable[[Path], Any]:
    """A command about references of which that of `a` is promoted, and one thing is wrong."""

    def make(folder: Path) -> tuple[str, ...]:
        from truestep.recording.lock import read_lock
        from truestep.recording.remote.cache import cache_root

        path = folder / "truestep.toml"
        path.write_text(path.read_text() + "\n[references]\nstore = 'kept'\n")
        if root != "truestep-references":
            (folder / "truestep-references").rename(folder / root)
        said = ("references", "promote", "a", "--reason", "first", "--references", root)
        twice(*said)(folder)
        key = next(k for k, e in read_lock(folder / root).references.items() if e.history)
        shutil.rmtree(cache_root(), ignore_errors=True)
        if arguments[0] == "check" and root != "truestep-references":
            save_file({"x": torch.zeros(2)}, folder / "other")
            (folder / "other").replace(folder / root / key)
        elif arguments[0] == "check":
            (folder / root / key).unlink()
            for stored in (folder / "kept" / "objects").glob("*/*"):
                stored.unlink()
                stored.write_text("tampered")
        elif arguments[1] == "pull":
            shutil.rmtree(folder / "kept")
            (folder / root / key).unlink()
        return arguments

    return make


Scenario = tuple[Callable[[Path], tuple[str, ...]], tuple[int, ...]]

LTX2 = ("run", "l", "--latent-only", "--set")

PLAIN = (
    *("wan", "--prompt", "a red one", "--subject", "diffusers", "--set", "height=16"),
    *("--set", "width=16", "--set", "num_frames=5", "--set", "num_inference_steps=2"),
    *("--set", "max_sequence_length=8"),
)
"""A case of a plain pipeline, said on the command line."""

RUNTIME = (*(word if word != "diffusers" else "runtime" for word in PLAIN),)


def other_files(folder: Path) -> tuple[str, ...]:
    """The source of a preparation is changed after it made a reference."""
    said = (*PLAIN, "--prepare", "change.py:same")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["truestep", "record", *said, "--floor", "none"])
        cli.run_here()
    (folder / "change.py").write_text(CHANGE + "# changed\n")
    return ("check", *said)


def of_files(folder: Path) -> str:
    """A recording in a file of its own, whose case no case file has."""
    said = ("record", *PLAIN, "--prepare", "change.py:same", "--output", "my file", "--floor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["truestep", *said, "none"])
        cli.run_here()
    return "my file"


def left_out(folder: Path) -> tuple[str, ...]:
    """A reference of more steps than it keeps."""
    path = folder / "truestep.toml"
    path.write_text(re.sub(r"(?m)^steps = .*$", "steps = 8", path.read_text()))
    twice("record", "a", "--floor", "none")(folder)
    return ("check", "a", "--steps", "1")


SCENARIOS: dict[str, Scenario] = {
    "--force  # replaces it; or edit it": (
        twice("parity", "new", "acme", "mixer", "--kind", "generic"), (0,)),
    "--from official@f4b06fb --to diffusers-0.42.1": (
        given("ab", "ablate", "l", "--from", "x"), (0, 1)),
    "--no-check-untraced  # records all the same": (
        given("trace", "record", "a", "--apply", "change.py:watched"), (0,)),
    "--resume  # goes on with it; truestep ab recover shows it, another --output keeps it": (
        experiment, (1, 4)),
    "--no-resume  # records from the beginning, and replaces it": (stopped, (0,)),
    "--rounds {}": (
        given("ab", "a", "--apply", "change.py:raises", "--rounds", "3", "--expect", "faster"),
        (1, 4),
    ),
    "--select '*'  # takes all": (given("trace", "record", "a", "--select", ","), (0,)),
    "--set max_sequence_length={}": (given(*LTX2, "max_sequence_length=17"), (0,)),
    "--set num_frames=121": (given(*LTX2, "num_frames=1", "--set", "fps=1000"), (0,)),
    "--set num_frames={}": (given("run", "a", "--latent-only", "--set", "num_frames=6"), (0,)),
    "--set pass_batching=separate  # or cond_uncond, or all": (given(*LTX2, "cfg=batched"), (2,)),
    "--set profile=diffusers-0.42.1  # or another of truestep show profile": (
        given(*LTX2, "profile=none"), (0,)),
    "--set steps=2": (given(*LTX2, "steps=1"), (0,)),
    "--set steps={}": (given(*LTX2, "sigma_schedule=distilled"), (0,)),
    "--set text_recipe=per_branch_connector": (
        given(*LTX2, "text_recipe=keep_padding"), (0,)),
    "--set {}=28  # or set the scale to 0": (given(*LTX2, "stg_blocks="), (2,)),
    "--set {}={}": (given("run", "a", "--latent-only", "--set", "height=20"), (0,)),
    "--set {}={}  # or --set stg_scale=0 --set audio_stg_scale=0": (
        given(*LTX2, "stg_blocks=99"), (0,)),
    "--subject diffusers": (given("record", *RUNTIME, "--prepare", "change.py:same"), (0,)),
    "ls {}": (given("record", *PLAIN, "--prepare", "none.py:same"), (0,)),
    "truestep record CASE --update  # takes the files as they are now": (other_files, (0,)),
    "truestep record CASE --update --keep {}": (left_out, (0,)),
    "truestep check --reference {}  # takes its own case": (
        lambda folder: ("check", "--reference", of_files(folder), "--prompt", "a cat"), (0,)),
    "--update  # replaces it; with --output it stays": (
        lambda folder: ("record", "--reference", of_files(folder), "--floor", "none"), (0,)),
    "--steps 0,5": (given("trace", "record", "a", "--steps", "x"), (0, 2)),
    "df -h {}; ls -ld {}": (beneath_a_file, (0,)),
    "grep '^.case' {}  # lists them": (given("check", "c", "--file", "my cases.toml"), (0,)),
    "truestep ab recover truestep-ab": (given("ab", "recover"), (2,)),
    "truestep ab recover truestep-quality --quality": (
        given("ab", "recover", "--quality"), (2,)),
    "truestep check --reference {}": (
        lambda folder: ("check", *as_changed(folder)[1:]), (0,)),
    "truestep record CASE --runs 30": (given("check", "a", "--apply", "change.py:unsure"), (0,)),
    "truestep check CASE": (another_model, (1,)),
    "truestep check CASE --depth modules": (
        given("check", "a", "--apply", "change.py:same", "--meant", "int8"), (0,)),
    "truestep check CASE --meant auto": (
        given("check", "a", "--apply", "change.py:four_bits", "--meant", "int8"), (0,)),
    "truestep compare --activations {}": (activations, (0,)),
    "truestep weights {}": (renamed_parameters, (0,)),
    "truestep perf record{}  # makes one": (
        given("perf", "show", "--history", "my runs"), (0, 1, 4)),
    "truestep record CASE  # seeds a reference of this case; check --set KEY=VALUE tests a change "
    "of it": (other_reference, (0, 2)),
    "truestep record CASE --level full --update": (of_sketch("check", "a"), (0,)),
    "truestep record CASE --update": (no_floor, (0,)),
    "truestep record CASE --update  # records it again": (cut, (0,)),
    "truestep record CASE --update  # replaces it": (given("record", "a"), (0,)),
    "truestep trace recorder --write {} --force": (
        twice("trace", "recorder", "--write", "my recorder.py"), (0,)),
    "truestep skill --write {} --force": (twice("skill", "--write", "my skill"), (0,)),
    "--set terminal_sigma=0.1": (
        given(*LTX2, "sampler=res2s", "--set", "terminal_sigma=0.001"), (0,)),
    "--set sigma_schedule=distilled_stage_2 --set steps=3": (  # then the paths are looked at
        given(*LTX2, "initial=x.safetensors", "--set", "upsampler=y"), (2,)),
    "--update  # replaces them; --as ID writes beside them": (limits_there, (0,)),
    "truestep doctor {}": (damaged_model, (2,)),
    "truestep new test {} --output {}": (written_already, (0,)),
    "truestep perf record CASE": (given("perf", "check", "a", "--runs", "1"), (0, 1, 4)),
    "truestep perf show{}  # shows all that there are": (measured, (0,)),
    "truestep record CASE --update  # with decoded frames": (no_frames, (0,)),
    "truestep engine node --write {} --force": (
        twice("engine", "node", "--write", "my node.py"), (0,)),
    "truestep tiny WanPipeline ./tiny-wan  # makes a small one to try": (
        engine_run("step/0000/latent"), (0,)),
    "truestep show {}": (engine_run("latent/final"), (0,)),
    "truestep show {}  # says what it holds": (array, (0,)),
    "truestep show {}  # truestep compare judges plain tensors": (
        of_a_function, (0,)),
    "truestep show profile": (given("show", "profile", "x"), (0,)),
    "truestep show {}  # says what it is": (
        given("check", "--reference", "plain.safetensors"), (0,)),
    "truestep show settings  # lists all of them": (
        given("run", "a", "--set", "guidance=3"), (0,)),
    "truestep check {}--apply {}": (given("gate", "a", "--apply", "change.py:same"), (0,)),
    "truestep tiny {} {}": (
        twice("tiny", "StableDiffusionPipeline", "my model"), (0,)),
    "--calls 0,6": (
        given("engine", "run", "--depth", "modules", "--calls", "x", "--", "sh", "-c", "exit $#"),
        (4,)),  # what is behind -- is the program's: nothing is there, and nothing is recorded
    "--dtype bfloat16": (
        given("tiny", "StableDiffusionPipeline", "my model", "--dtype", "int8"), (0,)),
    "truestep references list": (given("references", "promote", "c", "--reason", "x"), (0,)),
    "truestep references list  # each first line names one": (
        given("references", "promote", "--reason", "x"), (0,)),
    "truestep references list --history": (
        in_a_store("references", "rollback", "a", "--reason", "x"), (0,)),
    "truestep references pull{}  # keeps it among the drafts, fetches the promoted": (
        in_a_store("check", "a", "--references", "my refs", root="my refs"), (0,)),
    "truestep references push  # where it was made": (in_a_store("references", "pull", "a"), (3,)),
    "truestep references verify  # reads all of them": (in_a_store("check", "a"), (2,)),
    "truestep trace record {} --output {}": (
        given("trace", "record", "--file", "my cases.toml", "--output", "my trace"), (0,)),
    "truestep trace recover {}": (spools(2), (0,)),
    "truestep trace recover {} --output other.safetensors": (spools(1), (0,)),
}  # fmt: skip
"""Hint to the command that provokes it, and the exit codes that the hint may have then."""


@pytest.mark.parametrize("hint", sorted(SCENARIOS))
def test_a_hint_works_as_printed(hint: str, run: Run, tmp_path: Path) -> None:
    provoke, codes = SCENARIOS[hint]
    code, out, err = run(*provoke(tmp_path))
    assert code != 0, (out, err)
    shown = printed(out, err)
    pattern = re.escape(hint.removeprefix("truestep ")).replace(re.escape("{}"), ".+")
    assert re.search(pattern.replace("CASE", ".+"), shown), shown
    code, out, err = paste(run, shown)
    assert code in codes, (shown, out, err)


def test_the_hint_of_a_wrong_class_has_the_folder_that_was_given(run: Run) -> None:
    code, out, err = run("tiny", "StableDifusionPipeline", "my model")
    assert code == 2
    hint = printed(out, err)
    assert hint == "truestep tiny StableDiffusionPipeline 'my model'"
    assert paste(run, hint)[0] == 0
    assert Path("my model").is_dir()


@pytest.mark.parametrize("way", ["file", "id"])
def test_the_hint_to_record_again_finds_the_case_as_the_check_did(run: Run, way: str) -> None:
    """A reference in a file of its own, or one that is named by its id: no case file has either."""
    said = ("record", *PLAIN, "--prepare", "change.py:same", "--floor", "none")
    code, out, _ = run(*said, *(("--output", "my file") if way == "file" else ()))
    assert code == 0
    name = out.split()[1].rstrip(":")
    check = ("check", "--reference", "my file") if way == "file" else ("check", name)
    assert run(*check)[0] == 0
    Path("change.py").write_text(CHANGE + "# changed\n")
    code, out, err = run(*check)
    assert code == 3
    hint = printed(out, err)
    words = "--reference 'my file'" if way == "file" else name
    assert hint == f"truestep record {words} --update  # takes the files as they are now"
    assert paste(run, hint)[0] == 0
    assert run(*check)[0] == 0
