"""Hypotheses that are made by the trusted side itself: with other settings of its parts.

The trusted pipeline is run once more on what was recorded, its models answered from there, with a
scheduler, a VAE or a tokenizer of another configuration: what then comes at the failing place is
set against what the candidate handed on.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from truestep.calls.forcing import Forcing
from truestep.calls.recording import CallRecording, host_copy, key
from truestep.calls.seen import Forced, Plan, Proceed
from truestep.calls.subject import Subject
from truestep.calls.values import Path, encode, leaves
from truestep.errors import FOREIGN
from truestep.recording.manifest import CallEntry
from truestep.replay.causes.material import config_of

Values = Mapping[str, torch.Tensor | None]
"""What came, by key; None where nothing did."""

_KINDS = {
    "prediction_type": "prediction type",
    "shift": "flow shift",
    "use_dynamic_shifting": "flow shift",
    "base_shift": "flow shift",
    "max_shift": "flow shift",
    "time_shift_type": "flow shift",
    "scaling_factor": "scaling factor",
    "shift_factor": "shift factor",
    "latents_mean": "latent statistics",
    "latents_std": "latent statistics",
    "padding_side": "text padding",
    "truncation_side": "text padding",
    "pad_token": "text padding",
    "model_max_length": "text length",
}

_CHOICES: Mapping[str, Sequence[Any]] = {
    "prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "steps_offset": (0, 1),
    "use_dynamic_shifting": (False, True),
    "shift": (1.0, 3.0, 5.0, 7.0, 8.0, 12.0),
    "shift_terminal": (None, 0.1, 0.02),
    "time_shift_type": ("exponential", "linear"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "use_karras_sigmas": (False, True),
    "use_exponential_sigmas": (False, True),
    "use_beta_sigmas": (False, True),
    "use_flow_sigmas": (False, True),
    "final_sigmas_type": ("zero", "sigma_min"),
    "invert_sigmas": (False, True),
    "stochastic_sampling": (False, True),
    "set_alpha_to_one": (False, True),
    "clip_sample": (False, True),
    "thresholding": (False, True),
    "rescale_betas_zero_snr": (False, True),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete", "continuous"),
    "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
    "solver_type": ("midpoint", "heun", "bh1", "bh2"),
    "solver_order": (1, 2, 3),
    "lower_order_final": (False, True),
    "euler_at_final": (False, True),
    "skip_prk_steps": (False, True),
}
"""Settings of schedulers that are tried where a scheduler has them."""

_TOGETHER: Sequence[Mapping[str, Any]] = (
    {"beta_start": 0.00085, "beta_end": 0.012},
    {"beta_start": 0.0001, "beta_end": 0.02},
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
)

_EXCHANGED = (("base_shift", "max_shift"), ("base_image_seq_len", "max_image_seq_len"))

_TOKENIZER = ("padding_side", "truncation_side", "pad_token", "model_max_length")


@dataclass(frozen=True)
class Setting:
    """Other settings of one part.

    Attributes:
        component: Of the trusted side.
        values: By name.
        read: Whether they are those that the candidate's part has.
        anew: Whether the part is made anew with them, as from its folder; else they are set.
    """

    component: str
    values: Mapping[str, Any]
    read: bool = False
    anew: bool = True

    def said(self, trusted: Mapping[str, Any]) -> tuple[str, str, str]:
        """Kind, text and mend."""
        attribute = next(iter(self.values)) in _TOKENIZER
        own = f"{self.component}." + ("" if attribute else "config.")
        is_, as_if = ("is", "") if self.read else ("were", "as if ")
        parts = [
            f"{own}{name} {is_} {_short(value)}, the reference's {_short(trusted.get(name))}"
            for name, value in self.values.items()
        ]
        where = "" if attribute else " in the configuration"
        values = (f"`{name}` to {_short(trusted.get(name))}" for name in self.values)
        mend = f"set {', '.join(values)}{where} of {self.component}"
        kind = next((_KINDS[name] for name in self.values if name in _KINDS), "schedule")
        return kind, as_if + "; ".join(parts), mend if self.read and len(self.values) == 1 else ""


def read_settings(candidate: Mapping[str, Any], trusted: Mapping[str, Any]) -> Iterator[Setting]:
    """Settings that the candidate's parts have and the trusted ones have not: each, and all of a
    part together."""
    for name, part in trusted.items():
        mine, theirs = (_settings_of(side) for side in (candidate.get(name), part))
        values = {k: mine[k] for k in theirs if k in mine and not _same(mine[k], theirs[k])}
        single = [{field: value} for field, value in values.items()]
        for some in [*single, *([values] if len(values) > 1 else [])]:
            for anew in (True, False) if hasattr(part, "set_timesteps") else (False,):
                yield Setting(name, some, read=True, anew=anew)


def other_settings(trusted: Mapping[str, Any]) -> Iterator[Setting]:
    """What the trusted schedulers can be set to, as if the candidate's code had it so."""
    for name, part in trusted.items():
        if not hasattr(part, "set_timesteps"):
            continue
        config = config_of(part)
        for field, choices in _CHOICES.items():
            for value in choices:
                if field in config and not _same(config[field], value):
                    yield Setting(name, {field: value})
        for one, other in _EXCHANGED:
            if one in config and other in config:
                yield Setting(name, {one: config[other], other: config[one]})
        for together in _TOGETHER:
            if all(field in config for field in together):
                yield Setting(name, together)


def run_with(trusted: Subject, reference: CallRecording, setting: Setting | None) -> Values:
    """What comes of the trusted side with other settings, its models answered from the
    recording."""
    part = trusted.components[setting.component] if setting is not None else None
    try:
        with changed(part, setting):
            return values_of(answered(trusted, reference))
    except FOREIGN:  # a scheduler refuses what does not go together
        return {}


def answered(
    run: Subject,
    reference: CallRecording,
    precision: str = "",
    *,
    whole: bool = False,
    unkept: dict[str, torch.Tensor] | None = None,
) -> Forced:
    """A forced run in which no model is made.

    Args:
        run: Either side.
        reference: The recording.
        precision: To raise what is given to.
        whole: Make those models that gave what was not kept: they would hand on zeros there.
        unkept: Filled with what those models gave there, and with what layers of text encoders
            did, by key.
    """
    dtype = getattr(torch, precision) if precision else None

    def made(call: CallEntry) -> bool:
        return (whole and bool(_unkept(call))) or (unkept is not None and _has_layers(call))

    def by(call: CallEntry, proceed: Proceed) -> Proceed:
        if unkept is None or not made(call):
            return proceed
        return _telling(call, proceed, unkept)

    return Forcing(reference, Plan(made=made, precision=dtype, raised=precision, by=by)).run(run)


def _unkept(call: CallEntry) -> list[Path]:
    """What a call gave that nothing read, and that is not in the recording."""
    return [path for path, leaf in leaves(call.output) if leaf.kind == "dropped"]


_LAYERS = "output_hidden_states"


def _has_layers(call: CallEntry) -> bool:
    """Whether a call of a text encoder may be asked for what its layers give."""
    return call.kind == "model" and call.stage == "text" and _LAYERS in call.arguments


def _telling(call: CallEntry, proceed: Proceed, unkept: dict[str, torch.Tensor]) -> Proceed:
    """Make a call, and keep what the recording has not of it."""
    missing = set(_unkept(call))

    def keep(path: Path, tensor: torch.Tensor) -> str:
        if path in missing:
            unkept[str(key(call, "out", path))] = host_copy(tensor)
        return ""

    def keep_layer(path: Path, tensor: torch.Tensor) -> str:
        if path[:1] == ("hidden_states",):
            unkept[str(key(call, "out", path))] = host_copy(tensor)
        return ""

    def make(*args: Any, **kwargs: Any) -> Any:
        output = proceed(*args, **kwargs)
        encode(output, keep)
        if _has_layers(call) and not call.arguments[_LAYERS]:
            encode(proceed(*args, **{**kwargs, _LAYERS: True}), keep_layer)
        return output

    return make


def values_of(result: Forced) -> Values:
    """What was seen, by key."""
    return {str(seen.key): seen.actual for seen in result.seen}


def lacks_tensors(reference: CallRecording) -> bool:
    """Whether a recording leaves out something that its models gave."""
    return any(_unkept(call) for call in reference.calls if call.kind == "model")


@contextmanager
def changed(part: Any, setting: Setting | None) -> Iterator[None]:
    """A part with other settings, until the block ends."""
    kept = dict(vars(part)) if part is not None else {}
    plain = setting is not None and not config_of(part)
    before = (
        {name: getattr(part, name, None) for name in setting.values} if setting and plain else {}
    )
    try:
        if setting is not None:
            _change(part, setting)
        yield
    finally:
        for name, value in before.items():  # a tokenizer keeps its tokens where it writes them
            setattr(part, name, value)
        if part is not None:
            vars(part).clear()
            vars(part).update(kept)


def _change(part: Any, setting: Setting) -> None:
    """Change a part in place."""
    config, values = config_of(part), setting.values
    if setting.anew and hasattr(part, "set_timesteps") and config:
        known = inspect.signature(type(part).__init__).parameters
        given = {k: v for k, v in config.items() if k in known}
        vars(part).update(vars(type(part)(**{**given, **values})))
        return
    if config:
        part.register_to_config(**values)
    if "shift" in values and hasattr(part, "set_shift"):
        part.set_shift(values["shift"])
    for name, value in values.items() if not config else ():
        setattr(part, name, value)


def _settings_of(part: Any) -> dict[str, Any]:
    """Plain settings of a part that code between calls reads."""
    config = {k: v for k, v in config_of(part).items() if not str(k).startswith("_")}
    if not config and hasattr(part, "padding_side"):
        config = {name: getattr(part, name, None) for name in _TOKENIZER}
    shift = part.shift if hasattr(type(part), "shift") else None
    if "shift" in config and isinstance(shift, int | float):
        config["shift"] = float(shift)  # schedulers can be given another than they were made with
    return {k: v for k, v in config.items() if _is_plain(v)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, bool | int | float | str)


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) < 40 else f"{text[:36]} ..."
