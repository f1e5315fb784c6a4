"""FastVideo's latent gate by one changed import."""

from __future__ import annotations

import ast
import inspect
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from truestep.dropin import fastvideo as ours
from truestep.errors import FileFormatError
from truestep.verdict import Verdict

VIDEO = torch.Generator().manual_seed(0)
LATENT = torch.randn(1, 16, 3, 8, 8, generator=VIDEO)
SOUND = torch.randn(1, 8, 20, generator=VIDEO)
PARAMS: dict[str, dict[str, object]] = {
    "tiny": {
        "model_path": "a/tiny",
        "num_gpus": 1,
        "num_inference_steps": 4,
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "seed": 7,
    }
}
PROMPT = "a fox in the snow, " * 8

SIGNATURES = {
    "save_latent_reference": ["path", "latent", "metadata", "slice_spec=None"],
    "load_latent_reference": ["path"],
    "write_latent_similarity_results": [
        "output_dir",
        "metrics",
        "reference_path",
        "generated_path",
        "num_inference_steps",
        "prompt",
        "model_id",
        "attention_backend_name",
        "slice_spec",
        "slice_cosine_threshold",
        "full_cosine_threshold",
        "passed",
    ],
    "run_text_to_latent_similarity_test": [
        "logger",
        "script_dir",
        "device_reference_folder",
        "prompt",
        "attention_backend_name",
        "model_id",
        "default_params_map",
        "full_quality_params_map",
        "slice_cosine_threshold=0.005",
        "full_cosine_threshold=0.01",
        "init_kwargs_override=None",
        "generation_kwargs_override=None",
        "slice_spec=None",
    ],
}


def parameters(function: Any) -> list[str]:
    """Names of parameters with their defaults."""
    return [
        f"{p.name}={p.default}" if p.default is not p.empty else p.name
        for p in inspect.signature(function).parameters.values()
    ]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_fastvideo(name: str) -> None:
    assert parameters(getattr(ours, name)) == SIGNATURES[name]
    kinds = {p.kind for p in inspect.signature(getattr(ours, name)).parameters.values()}
    assert kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


def test_importing_it_imports_no_torch() -> None:
    code = "import truestep.dropin.fastvideo, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("latent", "spec", "length"),
    [(LATENT, None, 16 * 9), (SOUND, ours.AUDIO_FIRST_8_TIMESTEPS_SPEC, 8 * 8)],
)
def test_a_bundle_comes_back(
    latent: torch.Tensor, spec: dict[str, Any] | None, length: int, tmp_path: Path
) -> None:
    path = str(tmp_path / "new" / "a.pt")
    ours.save_latent_reference(path, latent, metadata={"prompt": "x", "n": 3}, slice_spec=spec)
    bundle = ours.load_latent_reference(path)
    assert list(bundle) == [
        "latent",
        "shape",
        "dtype_original",
        "expected_slice",
        "slice_spec",
        "metadata",
        "format_version",
    ]
    assert torch.equal(bundle["latent"], latent.half())
    assert bundle["shape"] == list(latent.shape)
    assert bundle["dtype_original"] == "torch.float32"
    assert bundle["expected_slice"].shape == (length,)
    assert bundle["expected_slice"].dtype == torch.float32
    assert bundle["metadata"] == {"prompt": "x", "n": 3}


def test_the_corner_is_of_the_first_frame(tmp_path: Path) -> None:
    ours.save_latent_reference(str(tmp_path / "a.pt"), LATENT, metadata={})
    stored = ours.load_latent_reference(str(tmp_path / "a.pt"))["expected_slice"]
    assert torch.equal(stored, LATENT[0, :, 0, :3, :3].reshape(-1))


@pytest.mark.parametrize(
    ("latent", "spec", "said"),
    [
        (LATENT[0], None, "does not fit the latent"),
        (LATENT[..., :2], None, "too small"),
        (SOUND[..., :7], ours.AUDIO_FIRST_8_TIMESTEPS_SPEC, "too small"),
        (LATENT, {"kind": "middle"}, "no signature is called 'middle'"),
    ],
)
def test_a_latent_that_has_no_such_signature_is_refused(
    latent: torch.Tensor, spec: dict[str, Any] | None, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        ours.save_latent_reference(str(tmp_path / "a.pt"), latent, metadata={}, slice_spec=spec)


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {os.environ['TRUESTEP_MARK']}",))


@pytest.mark.parametrize("inside", ["metadata", "slice_spec", "whole"])
def test_a_bundle_that_would_run_code_is_refused_and_runs_none(
    inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "it-ran"
    monkeypatch.setenv("TRUESTEP_MARK", str(mark))
    path = tmp_path / "a.pt"
    ours.save_latent_reference(str(path), LATENT, metadata={})
    bundle: Any = torch.load(path, weights_only=True)
    torch.save(Runs() if inside == "whole" else {**bundle, inside: Runs()}, path)
    with pytest.raises(FileFormatError, match="needs code to be unpickled"):
        ours.load_latent_reference(str(path))
    assert not mark.exists()
    torch.load(path, weights_only=False)  # the check would see it
    assert mark.exists()


def test_what_is_no_bundle_of_this_version_is_a_value_error(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for content in ({"format_version": 2}, {"latent": LATENT}, [LATENT]):
        torch.save(content, path)
        with pytest.raises(ValueError, match="make it again"):
            ours.load_latent_reference(str(path))
    with pytest.raises(FileNotFoundError):
        ours.load_latent_reference(str(tmp_path / "none.pt"))
    path.write_bytes(b"no pickle")
    with pytest.raises(FileFormatError):
        ours.load_latent_reference(str(path))


def run(folder: Path, **given: Any) -> dict[str, float]:
    """The gate as FastVideo's tests call it."""
    known: dict[str, Any] = {
        "logger": logging.getLogger("gate"),
        "script_dir": str(folder),
        "device_reference_folder": "CPU_reference_videos",
        "prompt": PROMPT,
        "attention_backend_name": "TORCH_SDPA",
        "model_id": "tiny",
        "default_params_map": PARAMS,
        "full_quality_params_map": {},
    }
    return ours.run_text_to_latent_similarity_test(**(known | given))


def folders(folder: Path) -> tuple[Path, Path]:
    """Where references lie, and what is generated."""
    below = Path("default", "CPU_reference_videos", "tiny", "TORCH_SDPA")
    return folder / "reference_videos" / below, folder / "generated_videos" / below


def with_reference(folder: Path, latent: torch.Tensor, **given: Any) -> Path:
    path = folders(folder)[0] / f"{PROMPT[:100].strip()}.pt"
    ours.save_latent_reference(str(path), latent, metadata={}, **given)
    return path


def results(folder: Path) -> Any:
    (path,) = folders(folder)[1].glob("*.json")
    assert path.name == f"steps4_{PROMPT[:100].strip()}_latent.json"
    return json.loads(path.read_text())


def test_the_same_latent_passes_and_our_verdict_stands_beside(
    fastvideo: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    fastvideo.latent = {"samples": LATENT.double()}
    reference = with_reference(tmp_path, LATENT)
    metrics = run(tmp_path)
    assert list(metrics) == ["slice_cosine_distance", "full_cosine_distance", "max_abs_diff"]
    assert all(value == pytest.approx(0, abs=1e-6) for value in metrics.values())
    assert metrics.comparison.verdict is Verdict.IDENTICAL  # type: ignore[attr-defined]
    assert "truestep: identical: 1 tensor agrees bit for bit\n" in caplog.text
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    written = results(tmp_path)
    assert written.pop("truestep")["verdict"] == "identical"
    generated = folders(tmp_path)[1] / reference.name
    assert written == {
        "metrics": dict(metrics),
        "reference_latent": str(reference),
        "generated_latent": str(generated),
        "model_id": "tiny",
        "attention_backend": "TORCH_SDPA",
        "slice_spec": {"kind": "corner_3x3_first_frame", "version": 1},
        "thresholds": {"slice_cosine": 0.005, "full_cosine": 0.01},
        "passed": True,
        "parameters": {"num_inference_steps": 4, "prompt": PROMPT},
    }
    bundle = ours.load_latent_reference(str(generated))
    assert bundle["metadata"] == {
        "prompt": PROMPT,
        "model_id": "tiny",
        "attention_backend": "TORCH_SDPA",
        "num_inference_steps": 4,
    }


def test_it_is_generated_as_fastvideo_does(fastvideo: Any, tmp_path: Path) -> None:
    fastvideo.latent = {"samples": LATENT}
    with_reference(tmp_path, LATENT)
    run(
        tmp_path,
        init_kwargs_override={"output_type": "pil", "sp_size": 2},
        generation_kwargs_override={"seed": 8},
    )
    made, called, shut = fastvideo.seen
    assert made == (
        "made",
        "a/tiny",
        {"num_gpus": 1, "output_type": "latent", "sp_size": 2},
        "TORCH_SDPA",
    )
    assert called[1] == PROMPT
    assert called[2] == {
        "num_inference_steps": 4,
        "output_path": str(folders(tmp_path)[1]),
        "seed": 8,
        "save_video": False,
        "return_frames": True,
    }
    assert shut == ("shut", True)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda x: -x, "slice_cosine 2.0.*full_cosine 2.0"),
        (lambda x: x + torch.randn(x.shape, generator=VIDEO), "slice_cosine"),
    ],
)
def test_another_latent_fails_by_the_two_limits(
    damage: Any, said: str, fastvideo: Any, tmp_path: Path
) -> None:
    fastvideo.latent = {"samples": damage(LATENT)}
    with_reference(tmp_path, LATENT)
    with pytest.raises(AssertionError, match=said):
        run(tmp_path)
    written = results(tmp_path)
    assert written["passed"] is False
    assert written["truestep"]["verdict"] == "drifted"
    run(tmp_path, slice_cosine_threshold=3.0, full_cosine_threshold=3.0)


@pytest.mark.parametrize(
    ("damage", "verdict"),
    [(lambda x: 2 * x, "drifted"), (lambda x: x * math.nan, "invalid")],
    ids=["scale", "nan"],
)
def test_what_the_two_limits_let_pass_is_warned_of(
    damage: Any,
    verdict: str,
    fastvideo: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fastvideo.latent = {"samples": damage(LATENT)}
    with_reference(tmp_path, LATENT)
    run(tmp_path)
    written = results(tmp_path)
    assert written["passed"] is True
    assert written["truestep"]["verdict"] == verdict
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert warning.startswith(f"truestep: {verdict}")
    assert warning.endswith("the check beside it passes")
    assert ("none was measured" in warning) is (verdict == "drifted")


def test_sound_is_gated_by_its_own_signature(fastvideo: Any, tmp_path: Path) -> None:
    spec = ours.AUDIO_FIRST_8_TIMESTEPS_SPEC
    fastvideo.latent = {"samples": SOUND}
    with_reference(tmp_path, SOUND, slice_spec=spec)
    assert run(tmp_path, slice_spec=spec)["max_abs_diff"] == 0
    assert results(tmp_path)["slice_spec"] == spec


def test_no_reference_is_file_not_found_after_the_bootstrap(fastvideo: Any, tmp_path: Path) -> None:
    fastvideo.latent = {"samples": LATENT}
    with pytest.raises(FileNotFoundError, match=r"reference_videos_cli\.py download"):
        run(tmp_path)
    folders(tmp_path)[0].mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"a fox in the snow.*\.pt is missing"):
        run(tmp_path)
    assert [seen["artifact_kind"] for seen in fastvideo.seen if isinstance(seen, dict)] == [
        "latent",
        "latent",
    ]


def test_another_shape_is_an_assertion_error(fastvideo: Any, tmp_path: Path) -> None:
    fastvideo.latent = {"samples": LATENT}
    with_reference(tmp_path, LATENT[:, :8])
    with pytest.raises(AssertionError, match=r"shape \(1, 16, 3, 8, 8\)"):
        run(tmp_path)


@pytest.mark.parametrize("value", [None, {}, {"samples": "x"}, {"samples": torch.zeros(2, 2)}])
def test_what_is_no_latent_is_a_runtime_error(value: Any, fastvideo: Any, tmp_path: Path) -> None:
    fastvideo.latent = value
    with pytest.raises(RuntimeError, match="gave"):
        run(tmp_path)


def test_without_fastvideo_it_is_an_import_error(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match="fastvideo"):
        run(tmp_path)
    with pytest.raises(ImportError, match="fastvideo"):
        ours.compute_nothing  # noqa: B018


RESULT: dict[str, Any] = {
    "num_inference_steps": 4,
    "prompt": PROMPT,
    "model_id": "m",
    "attention_backend_name": "b",
    "slice_spec": ours.DEFAULT_SLICE_SPEC,
    "slice_cosine_threshold": 0.1,
    "full_cosine_threshold": 0.2,
    "passed": True,
}


def test_results_of_plain_metrics_are_judged_from_the_two_files(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("a.pt", "b.pt")]
    for path, latent in zip(paths, (LATENT, 2 * LATENT), strict=True):
        ours.save_latent_reference(path, latent, metadata={})
    folder = tmp_path / "new"
    given = RESULT | {"generated_path": paths[0], "reference_path": paths[1]}
    assert ours.write_latent_similarity_results(str(folder), {"x": 1.0}, **given) is True
    (path,) = folder.iterdir()
    assert json.loads(path.read_text())["truestep"]["verdict"] == "drifted"
    given["reference_path"] = "none.pt"
    assert ours.write_latent_similarity_results(str(folder), {"x": 1.0}, **given)
    said = json.loads(path.read_text())["truestep"]
    assert said["verdict"] is None
    assert "none.pt" in said["sentence"]


def test_a_result_that_cannot_be_written_is_false(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    given = RESULT | {"generated_path": "a", "reference_path": "b"}
    assert not ours.write_latent_similarity_results(str(tmp_path / "file"), {}, **given)
    given["prompt"] = "with / in it"
    assert not ours.write_latent_similarity_results(str(tmp_path), {}, **given)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_of_the_original(name: str, original_fastvideo: ModuleType) -> None:
    assert parameters(getattr(original_fastvideo, name)) == SIGNATURES[name]
    assert parameters(getattr(ours, name)) == parameters(getattr(original_fastvideo, name))


CONSTANTS = (
    "LATENT_REFERENCE_EXTENSION",
    "LATENT_REFERENCE_FORMAT_VERSION",
    "DEFAULT_SLICE_SPEC",
    "AUDIO_FIRST_8_TIMESTEPS_SPEC",
)


def test_constants_of_the_original(original_fastvideo: ModuleType) -> None:
    for name in CONSTANTS:
        assert getattr(ours, name) == getattr(original_fastvideo, name), name


@pytest.mark.parametrize("latent", [LATENT, LATENT.bfloat16(), LATENT[..., :3, :3]])
def test_bundles_of_the_original_are_the_same(
    latent: torch.Tensor, original_fastvideo: ModuleType, tmp_path: Path
) -> None:
    read = []
    for number, writer in enumerate((ours, original_fastvideo)):
        path = str(tmp_path / f"{number}.pt")
        writer.save_latent_reference(path, latent, metadata={"a": [1, "x"]})
        read += [ours.load_latent_reference(path), original_fastvideo.load_latent_reference(path)]
    for bundle in read[1:]:
        assert list(bundle) == list(read[0])
        for key, value in bundle.items():
            same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
            assert same(value, read[0][key]), key


DAMAGES = {
    "same": lambda x: x.clone(),
    "scale": lambda x: 3 * x,
    "noise": lambda x: x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)),
    "little": lambda x: x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)),
    "nan": lambda x: x * math.nan,
    "negated": lambda x: -x,
    "zeros": lambda x: 0 * x,
    "other shape": lambda x: x[:, :4],
    "reversed in time": lambda x: x.flip(2),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_outcomes_of_the_original_are_the_same(
    damage: str, original_fastvideo: ModuleType, generator: Any, tmp_path: Path
) -> None:
    generator.latent = {"samples": DAMAGES[damage](LATENT)}
    outcomes, files, calls = [], [], []
    for runner in (original_fastvideo, ours):
        folder = tmp_path / runner.__name__
        with_reference(folder, LATENT)
        generator.seen = []
        try:
            outcome: Any = runner.run_text_to_latent_similarity_test(
                logger=logging.getLogger("gate"),
                script_dir=str(folder),
                device_reference_folder="CPU_reference_videos",
                prompt=PROMPT,
                attention_backend_name="TORCH_SDPA",
                model_id="tiny",
                default_params_map=PARAMS,
                full_quality_params_map={},
            )
        except AssertionError as error:
            outcome = type(error)
        outcomes.append(repr(outcome))
        written = {
            str(path.relative_to(folder)): path.read_text().replace(str(folder), "")
            for path in folder.rglob("*.json")
        }
        files.append({name: json.loads(text) for name, text in written.items()})
        calls.append(repr(generator.seen).replace(str(folder), ""))
        assert os.environ.get("FASTVIDEO_ATTENTION_BACKEND") is None
    assert outcomes[0] == outcomes[1]
    assert calls[0] == calls[1]
    for content in files[1].values():
        assert content.pop("truestep")["verdict"]
    assert json.dumps(files[0]) == json.dumps(files[1])


def test_every_name_that_their_tests_import_is_here(original_fastvideo: ModuleType) -> None:
    folder = Path(original_fastvideo.__file__ or "").parent
    imported = {
        alias.name
        for path in folder.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == ours.ORIGINAL
        for alias in node.names
    }
    assert "run_text_to_latent_similarity_test" in imported
    assert imported <= vars(ours).keys()
