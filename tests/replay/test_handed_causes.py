"""Why what a plain pipeline hands from call to call is wrong: relations that are found, and not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import truestep
from truestep.calls.keys import Key
from truestep.replay.causes.combined import combination
from truestep.replay.causes.exchanged import exchanged
from truestep.replay.causes.guesses import Failing, Guess, explains
from truestep.replay.causes.latents import normalised, statistics
from truestep.replay.causes.material import Handed, Piece
from truestep.replay.causes.parts import part_of
from truestep.replay.causes.pictures import pictures
from truestep.replay.causes.relations import casts, fits, named_fits, orders
from truestep.replay.causes.times import setting, times
from truestep.replay.causes.tokens import masks, tokens
from truestep.report.words import next_command
from truestep.testing import tiny
from truestep.testing.corpus.editing import edit
from truestep.verdict import Comparison

Tensor = torch.Tensor
Relation = Callable[[Handed], Iterator[Guess]]
EVERY: tuple[Relation, ...] = (
    times,
    setting,
    masks,
    tokens,
    statistics,
    combination,
    pictures,
    orders,
    casts,
    named_fits,
    exchanged,
    normalised,
    fits,
)


class Shelf:
    """Material of a test: tensors by name, all before the place."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor] | None = None,
        *,
        arguments: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        components: Mapping[str, Any] | None = None,
        configs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.tensors, self.arguments = dict(tensors or {}), dict(arguments or {})
        self.components, self._config = dict(components or {}), dict(config or {})
        self._configs = dict(configs or {})

    def before(self, call: Any) -> Iterator[Piece]:
        for name in reversed(self.tensors):
            stage, _, what = name.partition("/")
            component, _, path = what.partition(".")
            key = Key(stage, component, "forward", 0, "out", (path or component,), 0)
            yield Piece(key, None, "model", name)

    def read(self, piece: Piece) -> Tensor:
        return self.tensors[piece.stored].double()

    def shape(self, piece: Piece) -> tuple[int, ...]:
        return tuple(self.tensors[piece.stored].shape)

    def config(self, component: str) -> Mapping[str, Any]:
        return self._configs.get(component, self._config)

    def of_step(self, key: Key, offset: int) -> Tensor | None:
        return None


def place(name: str) -> Key:
    component, method, argument = name.split(".")
    return Key("prediction", component, method, 0, "in", (argument,), 0)


def scene(actual: Tensor, reference: Tensor, name: str, shelf: Shelf | None = None) -> Handed:
    one = Failing(name, actual.double(), reference.double(), 1e-6)
    return Handed([one], [place(name)], [None], shelf or Shelf())


def found(of: Handed, *relations: Relation) -> Guess | None:
    for relation in relations or EVERY:
        for guess in relation(of):
            if explains(guess, of.failing):
                return guess
    return None


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Latents before a VAE

VAE = {"scaling_factor": 0.25, "shift_factor": 0.1}
STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.5], "latents_std": [1.5, 2.0, 0.7, 3.0]}


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda x: x / 0.25 - 0.1, "shift factor", "latents / scaling_factor - shift_factor"),
        (lambda x: x * 0.25 + 0.1, "scaling factor", "latents * scaling_factor + shift_factor"),
        (lambda x: (x + 0.1) / 0.25, "shift factor", "(latents + shift_factor) / scaling_factor"),
        (lambda x: x, "scaling factor", "given latents, the reference's"),
        (lambda x: x / 0.18215 + 0.1, "scaling factor", "divided by 0.18215"),
        (lambda x: x / 0.25 + 0.3, "shift factor", "0.3 is added"),
    ],
)
def test_the_factor_and_the_offset_of_latents_are_named(
    change: Callable[[Tensor], Tensor], kind: str, words: str
) -> None:
    latents = noise(1, 4, 8, 8).double()
    at = scene(
        change(latents),
        latents / 0.25 + 0.1,
        "vae.decode.z",
        Shelf({"update/scheduler": latents}, config=VAE),
    )
    guess = found(at)
    assert guess is not None
    assert guess.kind == kind
    assert words in guess.text


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, m, s: x * s - m, "latents * latents_std - latents_mean"),
        (lambda x, m, s: x * s**2 + m, "latents * latents_std ** 2 + latents_mean"),
        (lambda x, m, s: (x + m) * s, "(latents + latents_mean) * latents_std"),
        (lambda x, m, s: x * s + m.roll(-1, 1), "latents_mean of the next channel"),
        (lambda x, m, s: x * s.roll(1, 1) + m, "latents_std of the channel before"),
        (lambda x, m, s: x * s + 2 * m, "latents * latents_std + 2 * latents_mean"),
        (lambda x, m, s: x, "given latents * 1, the reference's"),
    ],
)
def test_statistics_of_latents_are_named(
    change: Callable[..., Tensor], words: str, packed: bool
) -> None:
    latents = noise(1, 4, 2, 5, 5).double()
    mean, deviation = (
        torch.tensor(STATISTICS[name], dtype=torch.float64).view(1, 4, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    kept = latents.flatten(2).transpose(1, 2) if packed else latents
    at = scene(
        change(latents, mean, deviation),
        latents * deviation + mean,
        "vae.decode.z",
        Shelf({"update/scheduler": kept}, config=STATISTICS),
    )
    guess = found(at)
    assert guess is not None
    assert guess.kind == "latent statistics"
    assert words in guess.text


# Guidance


def guided(
    actual: Callable[[Tensor, Tensor], Tensor], *, batched: bool = True, scale: float = 4.5
) -> Handed:
    uncond, cond = noise(1, 4, 6, 6, seed=1).double(), noise(1, 4, 6, 6, seed=2).double()
    passes = (
        {"prediction/model": torch.cat([uncond, cond])}
        if batched
        else {"prediction/a": uncond, "prediction/b": cond}
    )
    reference = uncond + scale * (cond - uncond)
    return scene(actual(cond, uncond), reference, "scheduler.step.model_output", Shelf(passes))


def rescaled_to(like: str, phi: float) -> Callable[[Tensor, Tensor], Tensor]:
    def change(cond: Tensor, uncond: Tensor) -> Tensor:
        plain = uncond + 4.5 * (cond - uncond)
        whose = cond if like == "cond" else uncond
        dims = (1, 2, 3)
        scaled = plain * whose.std(dims, keepdim=True) / plain.std(dims, keepdim=True)
        return phi * scaled + (1 - phi) * plain

    return change


def some_channels(cond: Tensor, uncond: Tensor) -> Tensor:
    whole = uncond + 4.5 * (cond - uncond)
    return torch.cat([whole[:, :3], cond[:, 3:]], 1)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda c, u: u + 7 * (c - u), "guidance scale", "is 7, the reference's is 4.5"),
        (lambda c, u: u + 3.5 * (c - u), "guidance scale", "less one: 3.5"),
        (lambda c, u: c + 4.5 * (c - u), "guidance formula", "cond + scale * (cond - uncond)"),
        (lambda c, u: c + 4.5 * (u - c), "guidance formula", "exchanged"),
        (lambda c, u: c, "guidance missing", "conditional pass alone"),
        (rescaled_to("cond", 0.5), "guidance rescale", "conditional pass, phi 0.5"),
        (rescaled_to("uncond", 1.0), "guidance rescale", "unconditional pass, phi 1"),
        (some_channels, "guidance channels", "channels 3 of 4 are not guided"),
    ],
)
def test_what_a_scheduler_is_given_is_explained_by_the_passes(
    change: Callable[[Tensor, Tensor], Tensor], kind: str, words: str, batched: bool
) -> None:
    guess = found(guided(change, batched=batched))
    assert guess is not None
    assert guess.kind == kind
    assert words in guess.text


def test_guidance_with_another_tensor_in_it_is_not_explained() -> None:
    at = guided(lambda c, u: u + 4.5 * (c - u) + 0.1 * noise(1, 4, 6, 6, seed=9))
    assert found(at) is None


# Other recorded tensors


def test_another_layer_of_an_encoder_is_named() -> None:
    layers = {f"text/encoder.hidden_states{i}": noise(1, 7, 8, seed=i) for i in range(6)}
    last, before, other = (layers[f"text/encoder.hidden_states{i}"] for i in (0, 1, 2))
    reference, actual = torch.cat([last, before], -1), torch.cat([last, other], -1)
    guess = found(scene(actual, reference, "unet.forward.states", Shelf(layers)))
    assert guess is not None
    assert guess.kind == "text layer"
    assert "hidden_states2" in guess.text
    assert "the reference's of encoder.forward at step 0: output hidden_states1" in guess.text


@pytest.mark.parametrize(
    ("names", "kind"),
    [(("b", "a"), "order"), (("a", "c"), "another tensor"), (("a",), "part missing")],
)
def test_parts_that_are_exchanged_other_or_missing_are_named(
    names: tuple[str, ...], kind: str
) -> None:
    parts = {name: noise(1, 5, 4, seed=at) for at, name in enumerate("abc")}
    shelf = Shelf({f"text/{name}": part for name, part in parts.items()})
    reference = torch.cat([parts["a"], parts["b"]], 1)
    actual = torch.cat([parts[name] for name in names], 1)
    guess = found(scene(actual, reference, "unet.forward.states", shelf))
    assert guess is not None
    assert guess.kind == kind


# Orders, casts, ranges


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda x: x.flip(1), "order", "turned round along its channels"),
        (lambda x: x.roll(1, 1), "order", "rolled by 1 along its channels"),
        (lambda x: x[:, [1, 0, 2]], "order", "in the order 1, 0, 2"),
        (lambda x: x.flip(3), "order", "turned round along axis 3"),
        (lambda x: x.transpose(2, 3), "axes exchanged", "axes 2 and 3"),
        (lambda x: x.to(torch.bfloat16), "precision", "bfloat16"),
        (lambda x: (x + 1) / 2, "image range", "from 0 to 1"),
        (lambda x: -x, "sign", "other sign"),
        (lambda x: 1.25 * x, "scaled", "1.25 times"),
        (lambda x: x + 0.5, "offset", "plus 0.5"),
    ],
)
def test_one_change_of_a_tensor_is_named(
    change: Callable[[Tensor], Tensor], kind: str, words: str
) -> None:
    x = noise(1, 3, 8, 8).clamp(-2, 2).double() / 2
    guess = found(scene(change(x), x, "vae.encode.x"))
    assert guess is not None
    assert guess.kind == kind
    assert words in guess.text


def test_channels_that_are_scaled_are_listed_and_no_others() -> None:
    x = noise(1, 12, 8, 8).double()
    factors = torch.ones(1, 12, 1, 1, dtype=torch.float64)
    factors[:, [5, 9]] = 0.9
    guess = found(scene(factors * x, x, "vae.encode.x"))
    assert guess is not None
    assert guess.kind == "scaled by channel"
    assert guess.text.endswith("in 2 of 12 channels (5: 0.9 and 0, 9: 0.9 and 0)")
    factors[:, :6] = 0.9
    guess = found(scene(factors * x, x, "vae.encode.x"))
    assert guess is not None
    assert guess.text.endswith("3: 0.9 and 0, and 3 more)")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: 14.6 * x, "scheduler.init_noise_sigma"),
        (lambda x: x / 0.25, "divided by vae.scaling_factor"),
        (lambda x: x + 0.1 * 0.25, "vae.shift_factor times the scaling factor"),
    ],
)
def test_a_factor_of_a_component_is_named_by_it(
    change: Callable[[Tensor], Tensor], words: str
) -> None:
    class Scheduler:
        init_noise_sigma = property(lambda self: 14.6)

    x = noise(1, 3, 8, 8)
    configs = {"vae": VAE}
    shelf = Shelf(components={"vae": None, "scheduler": Scheduler()}, configs=configs)
    guess = found(scene(change(x), x, "transformer.forward.hidden_states", shelf))
    assert guess is not None
    assert words in guess.text
    assert guess.numbers == 0


def test_clips_normalisation_is_named() -> None:
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).double()[:, None, None]
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711]).double()[:, None, None]
    guess = found(scene((x - mean) / deviation, x * 2 - 1, "vae.encode.x"))
    assert guess is not None
    assert guess.kind == "image normalisation"
    assert "CLIP's" in guess.text


def test_another_filter_is_named() -> None:
    import numpy as np
    from PIL import Image
    from PIL.Image import Resampling

    pixels = torch.randint(0, 255, (24, 20, 3), generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(pixels.to(torch.uint8).numpy())

    def resized(way: Resampling) -> Tensor:
        small = np.array(picture.resize((8, 8), way))
        return torch.from_numpy(small).double().permute(2, 0, 1)[None] / 127.5 - 1

    sides = resized(Resampling.BILINEAR), resized(Resampling.LANCZOS)
    shelf = Shelf(arguments={"image": picture})
    guess = found(scene(*sides, "vae.encode.x", shelf))
    assert guess is not None
    assert guess.kind == "resize"
    assert "PIL's bilinear" in guess.text
    assert "PIL's lanczos" in guess.text
    assert found(scene(*sides, "vae.encode.x")) is None


def test_patches_that_are_put_together_otherwise_are_named() -> None:
    packed = noise(1, 4, 6, 2, 6, 2)
    sides = packed.permute(0, 1, 4, 3, 2, 5), packed
    guess = found(scene(*(x.reshape(1, 4, 12, 12) for x in sides), "vae.decode.z"))
    assert guess is not None
    assert guess.kind == "packing order"
    assert "columns of patches, rows in one, rows of patches, columns in one" in guess.text


def test_of_a_part_that_alone_differs_the_cause_is_named() -> None:
    x = noise(1, 12, 8)
    actual = x.clone()
    actual[:, 4:9] += 0.1 * 0.25
    shelf = Shelf(components={"vae": None}, configs={"vae": VAE})
    (part,) = part_of(scene(actual, x, "transformer.forward.hidden_states", shelf))
    guess = found(part)
    assert guess is not None
    assert guess.kind == "shift factor"
    assert "places 4 to 8 of axis 1" in guess.text
    assert not list(part_of(scene(-x, x, "transformer.forward.hidden_states", shelf)))


# Ids, masks, numbers

IDS = [9, 8, 7, 6, 5, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("ids", "kind", "words"),
    [
        ([0, 0, 0, 0, 9, 8, 7, 6, 5, 1], "text padding", "padded on the left"),
        ([9, 8, 7, 6, 5, 1, 1, 1, 1, 1], "text padding", "padded with 1"),
        ([40, 41, 9, 8, 7, 6, 5, 1, 0, 0], "text template", "2 tokens before"),
        ([9, 8, 7, 6, 5, 44, 1, 0, 0, 0], "text template", "1 tokens behind"),
        ([9, 8, 7, 6, 5, 0, 0, 0, 0, 0], "text template", "lacks its last token"),
        ([9, 8, 7, 6], "text length", "cut off at 4"),
    ],
)
def test_what_happened_to_ids_is_named(ids: list[int], kind: str, words: str) -> None:
    at = scene(torch.tensor([ids]), torch.tensor([IDS]), "text_encoder.forward.input_ids")
    guess = found(at)
    assert guess is not None
    assert guess.kind == kind
    assert words in guess.text


def test_a_text_that_was_cut_off_and_is_not_has_no_template() -> None:
    full, longer = [9, 8, 7, 6, 5, 1], [9, 8, 7, 6, 5, 4, 3, 1, 0, 0]
    at = scene(torch.tensor([longer]), torch.tensor([full]), "text_encoder.forward.input_ids")
    assert found(at) is None


def test_tokens_that_are_0_are_named_by_their_place() -> None:
    reference = noise(1, 24, 16).double()
    actual = reference.clone()
    actual[:, 0] = 0
    guess = found(scene(actual, reference, "transformer.forward.hidden_states"))
    assert guess is not None
    assert guess.kind == "zeroed"
    assert "is 0 in 0 of axis 1" in guess.text


def test_a_template_longer_than_the_prompt_and_other_ids_are_not_explained() -> None:
    for ids in ([40, 41, 42, 43, 9, 8, 7, 6, 5, 1], [11, 12, 13, 14, 15, 1, 0, 0, 0, 0]):
        at = scene(torch.tensor([ids]), torch.tensor([IDS]), "text_encoder.forward.input_ids")
        assert found(at) is None


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ([0, 0, 0, 1, 1], "inverted"),
        ([1, 1, 1, 1, 1], "1 everywhere"),
        ([1, 1, 0, 0, 0], "leaves out the last token"),
        ([1, 1, 1, 1, 0], "one token more at the end"),
    ],
)
def test_what_happened_to_a_mask_is_named(mask: list[int], words: str) -> None:
    at = scene(torch.tensor([mask]), torch.tensor([[1, 1, 1, 0, 0]]), "m.forward.attention_mask")
    guess = found(at)
    assert guess is not None
    assert guess.kind == "mask"
    assert words in guess.text


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda t: 1 - t, "time convention"),
        (lambda t: t * 1000, "time convention"),
        (lambda t: t - 1, "off by one"),
    ],
)
def test_the_convention_of_a_time_is_named(change: Callable[[Tensor], Tensor], kind: str) -> None:
    at = scene(change(torch.tensor([0.7317])), torch.tensor([0.7317]), "m.forward.timestep")
    guess = found(at, times)
    assert guess is not None
    assert guess.kind == kind


def test_a_setting_is_read_off_only_where_it_is_one() -> None:
    shelf = Shelf(arguments={"guidance_scale": 3.5})
    name = "m.forward.guidance"
    guess = found(scene(torch.full([2], 4.0), torch.full([2], 3.5), name, shelf))
    assert guess is not None
    assert guess.text.endswith("is 4, the reference's guidance_scale = 3.5")
    for actual in (torch.full([2], 4.02913), torch.tensor([4.0, 5.0]), torch.full([1], 4.0)):
        assert found(scene(actual, torch.full(actual.shape, 3.5), name, shelf)) is None


# Never by chance

CHANGES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll(1, 1),
    "scale": lambda x: x * 1.7,
    "offset": lambda x: x + 0.3,
    "bfloat16": lambda x: x.to(torch.bfloat16),
    "transposed": lambda x: x.transpose(2, 3),
    "sign": torch.neg,
}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(sorted(CHANGES)))
def test_a_relation_that_is_there_is_found(seed: int, change: str) -> None:
    x = noise(1, 4, 6, 6, seed=seed)
    assert found(scene(CHANGES[change](x), x, "vae.encode.x")) is not None


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["vae.decode.z", "scheduler.step.model_output", "m.forward.states"]),
    st.sampled_from([(1, 4, 6, 6), (1, 4), (2, 3), (1, 1), (1, 16, 1, 1)]),
)
def test_an_unrelated_tensor_is_not_explained(seed: int, name: str, shape: tuple[int, ...]) -> None:
    tensors = {f"prediction/{at}": noise(*shape, seed=seed + 7 * at + 3) for at in range(4)}
    shelf = Shelf(tensors, config={**VAE, **STATISTICS}, arguments={"guidance_scale": 3.5})
    at = scene(noise(*shape, seed=seed + 1), noise(*shape, seed=seed + 2), name, shelf)
    assert found(at) is None


# Whole pipelines


@functools.cache
def trusted() -> tuple[Any, truestep.Recording]:
    pipe = tiny.pipeline("FluxPipeline")
    pipe.set_progress_bar_config(disable=True)
    call = {k: v for k, v in tiny.example_call("FluxPipeline").items() if k != "generator"}
    return pipe, truestep.record(pipe, call=call)


def caused(change: Callable[[Any], object], depth: truestep.Depth = "cause") -> Comparison:
    pipe, reference = trusted()
    candidate = tiny.pipeline("FluxPipeline")
    candidate.set_progress_bar_config(disable=True)
    change(candidate)
    beside = {} if depth == "steps" else {"trusted": pipe}
    return truestep.check(candidate, reference, depth=depth, **beside)


def before_decoding(old: str, new: str) -> Callable[[Any], None]:
    return lambda pipe: edit(pipe, "__call__", (old, new))


OFFSET = "+ self.vae.config.shift_factor"


def other_scheduler(pipe: Any) -> None:
    pipe.scheduler.register_to_config(base_shift=0.9)


def other_factor(pipe: Any) -> None:
    pipe.vae.register_to_config(scaling_factor=0.18215)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (before_decoding(OFFSET, ""), "shift factor", "given latents / scaling_factor, the"),
        (other_factor, "scaling factor", "vae.config.scaling_factor is 0.18215"),
        (other_scheduler, "flow shift", "scheduler.config.base_shift is 0.9"),
    ],
)
def test_code_between_calls_of_a_pipeline_is_explained(
    change: Callable[[Any], object], kind: str, words: str
) -> None:
    first = caused(change).first_divergence
    assert first is not None
    assert first.cause is not None
    assert first.cause.kind == kind
    assert words in first.cause.text
    assert first.cause.error_after * 10 < first.cause.error_before


def test_in_sixteen_bits_the_numbers_are_those_of_the_code() -> None:
    def built() -> Any:
        pipe = tiny.pipeline("FluxPipeline").to(torch.bfloat16)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    call = {k: v for k, v in tiny.example_call("FluxPipeline").items() if k != "generator"}
    reference, candidate = truestep.record(built(), call=call), built()
    edit(candidate, "__call__", ("/ self.vae.config.scaling_factor", "/ 0.18215"))
    first = truestep.check(candidate, reference, depth="cause", trusted=built()).first_divergence
    assert first is not None
    assert first.cause is not None
    assert "latents are divided by 0.18215, the reference's" in first.cause.text


def test_what_nothing_explains_is_not_explained() -> None:
    told = caused(before_decoding(OFFSET, "+ 0.3 * latents.roll(1, -1).abs()"))
    assert told.first_divergence is not None
    assert told.first_divergence.cause is None
    assert any(note.startswith("no cause named: none of ") for note in told.notes)


def test_the_trusted_side_is_as_it_was() -> None:
    pipe, reference = trusted()
    before = dict(pipe.scheduler.config), dict(pipe.vae.config)
    caused(other_scheduler)
    assert (dict(pipe.scheduler.config), dict(pipe.vae.config)) == before
    assert truestep.check(pipe, reference).verdict.passed


@pytest.mark.parametrize("name", ["padding_side", "pad_token"])
def test_a_tokenizer_that_is_set_otherwise_is_read_and_put_back(name: str) -> None:
    pipe, _ = trusted()
    part = pipe.tokenizer_2
    other = "left" if name == "padding_side" else part.eos_token
    before = getattr(part, name)
    assert before != other
    first = caused(lambda candidate: setattr(candidate.tokenizer_2, name, other)).first_divergence
    assert getattr(part, name) == before
    assert first is not None
    assert first.cause is not None
    assert first.cause.kind == "text padding"
    assert f"tokenizer_2.{name} is {other}, the reference's {before}" in first.cause.text


def test_what_comes_next_is_the_cause() -> None:
    for depth in ("steps", "modules"):
        told = caused(other_factor, depth)  # type: ignore[arg-type]
        option = "" if depth == "steps" else f" --depth {depth}"
        repeated = told.model_copy(update={"repeat": f"truestep check cat{option}", "hint": ""})
        assert next_command(repeated) == "truestep check cat --depth cause"
    told = caused(other_factor).model_copy(update={"repeat": "truestep check cat --depth cause"})
    assert next_command(told.model_copy(update={"hint": ""})) == ""
