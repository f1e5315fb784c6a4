"""The example port is the same model as diffusers', and stops being so when it is broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from examples.parity.wan_port.convert import convert
from examples.parity.wan_port.model import Config, WanPort
from examples.parity.wan_port.port import ported, use
from truestep import Case, check, record
from truestep.cli.app import app
from truestep.cli.common import load_change
from truestep.models import digits
from truestep.verdict import Verdict

PORT = Path(__file__).parents[2] / "examples" / "parity" / "wan_port" / "port.py"
KINDS = ("wan21", "wan22", "wan22-ti2v")


def diffusers_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel.from_pretrained(folder, subfolder="transformer", dtype=dtype)


@pytest.fixture(params=[*KINDS, "digits"])
def folder(request: pytest.FixtureRequest, tiny_wan: dict[str, Path]) -> Path:
    return digits.path() if request.param == "digits" else tiny_wan[request.param]


@pytest.mark.parametrize("per_token", [False, True])
def test_one_forward_agrees(folder: Path, per_token: bool) -> None:
    model = diffusers_model(folder).eval()
    generator = torch.Generator().manual_seed(0)
    tokens = 3 * 4 * 3
    inputs = {
        "hidden_states": torch.randn(2, model.config.in_channels, 3, 8, 6, generator=generator),
        "timestep": torch.tensor([999.0, 123.4]),
        "encoder_hidden_states": torch.randn(2, 9, model.config.text_dim, generator=generator),
    }
    if per_token:
        inputs["timestep"] = 999 * torch.rand(2, tokens, generator=generator)
    port = ported(model)
    with torch.no_grad():
        reference = model(**inputs, return_dict=False)[0]
        actual = port(**inputs, return_dict=False)[0]
        assert torch.equal(port(**inputs).sample, actual)
    assert actual.shape == reference.shape
    assert (actual - reference).norm() < 1e-6 * reference.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_check_finds_it_equivalent(
    kind: str, tiny_wan: dict[str, Path], tiny_case: dict[str, Any]
) -> None:
    case = Case(model=str(tiny_wan[kind]), **tiny_case)
    reference = record(case)
    result = check(case, reference, apply=load_change(f"{PORT}:use"))
    assert result.verdict is Verdict.EQUIVALENT, result.sentence

    def broken(pipe: Any) -> None:
        use(pipe)
        pipe.transformer.layers[1].cross.kv.bias.data[-1] += 0.01

    assert check(case, reference, apply=broken).verdict is Verdict.DRIFTED


def test_sixteen_bits_keep_their_precisions(
    tiny_wan: dict[str, Path], tiny_case: dict[str, Any]
) -> None:
    case = Case(model=str(tiny_wan["wan21"]), dtype="bfloat16", **tiny_case)
    result = check(case, record(case), apply=use)
    assert result.verdict.passed, result.sentence
    model = diffusers_model(tiny_wan["wan21"], torch.bfloat16)
    port = ported(model)
    assert port.dtype == torch.bfloat16
    assert port.layers[0].cross_norm.gain.dtype == torch.float32  # diffusers keeps this one wide


@pytest.mark.slow
def test_digits_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    case = ["builtin:digits", "--prompt", "a red three moving left"]
    run = CliRunner()
    recorded = run.invoke(app, ["record", *case])
    assert recorded.exit_code == 0, recorded.output
    checked = run.invoke(app, ["check", *case, "--apply", f"{PORT}:use"])
    assert checked.exit_code == 0, checked.output
    assert "equivalent" in checked.output


def test_conversion_is_strict(tiny_wan: dict[str, Path]) -> None:
    state = diffusers_model(tiny_wan["wan21"]).state_dict()
    with pytest.raises(ValueError, match="1 tensors are not of this architecture: lora"):
        convert({**state, "lora": torch.zeros(1)})
    with pytest.raises(KeyError, match=r"proj_out\.bias"):
        convert({name: tensor for name, tensor in state.items() if name != "proj_out.bias"})


def test_what_is_not_ported_is_refused(tiny_wan: dict[str, Path]) -> None:
    values = dict(diffusers_model(tiny_wan["wan21"]).config)
    with pytest.raises(ValueError, match="image conditioning is not ported: image_dim = 1280"):
        Config.of({**values, "image_dim": 1280})
    with pytest.raises(ValueError, match="qk_norm = layer_norm"):
        Config.of({**values, "qk_norm": "layer_norm"})
    with pytest.raises(ValueError, match="not 'flash'"):
        WanPort(Config.of(values)).set_attention_backend("flash")
