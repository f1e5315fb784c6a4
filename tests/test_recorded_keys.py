"""Names of tensors: read as values, written again, and what they say."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from truestep.keys import Key, key_of, module_name, spread_key, stage_key, step_name

WORD = st.text("abcdefgh_0123456789.", min_size=1, max_size=8)
PREFIXES = st.sampled_from(
    [(), ("stats",), ("sketch", "float32"), ("float64",), ("audio",), ("float32", "audio")]
)
NUMBER = st.integers(0, 12_000)


def keys() -> st.SearchStrategy[Key]:
    fqn = WORD.filter(lambda text: text not in {"stats", "sketch"})
    return st.one_of(
        st.builds(Key, st.sampled_from(["text", "connector"]), WORD, prefixes=PREFIXES),
        st.builds(Key, st.just("text"), WORD, part=st.just("mask"), prefixes=PREFIXES),
        st.builds(Key, st.sampled_from(["schedule", "video"]), WORD, prefixes=PREFIXES),
        st.builds(Key, st.just("latent"), st.sampled_from(["initial", "final"]), prefixes=PREFIXES),
        st.builds(Key, st.just("step"), WORD, NUMBER, prefixes=PREFIXES),
        st.builds(
            Key, st.just("sample"), WORD, NUMBER, st.sampled_from(["input", "output"]),
            prefixes=PREFIXES,
        ),
        st.builds(
            Key, st.just("module"), WORD, NUMBER, WORD, fqn, st.integers(0, 30), prefixes=PREFIXES
        ),
    )  # fmt: skip


@given(keys())
def test_a_key_is_read_as_it_was_written(key: Key) -> None:
    assert key_of(str(key)) == key
    assert key_of(str(key)).written == ""


PARTS = ["step", "7", "0007", "stats", "float32", "audio", "module", "text", "latent", "x", ""]


@given(st.one_of(st.text(max_size=30), st.lists(st.sampled_from(PARTS)).map("/".join)))
def test_every_text_is_written_as_it_was_read(text: str) -> None:
    assert str(key_of(text)) == text
    assert key_of(str(key_of(text))) == key_of(text)


def test_what_names_say() -> None:
    update = key_of("float32/audio/step/0007/latent")
    assert (update.stage, update.step, update.branch) == ("update", 6, None)
    assert (update.precision, update.modality) == ("float32", "audio")
    assert (key_of("step/0000/latent").stage, key_of("step/0000/latent").step) == ("latent", None)
    assert (key_of("step/0003/uncond").stage, key_of("step/0003/uncond").branch) == (
        "prediction",
        "uncond",
    )
    assert key_of("text/mask/cond").branch == "cond"
    assert key_of("samples/prediction").stage == "prediction"
    assert key_of("audio/waveform").stage == "decoding"
    module = key_of("stats/module/blocks.0#12/7/cond/in.hidden_states")
    assert (module.fqn, module.call, module.label) == ("blocks.0", 12, "blocks.0#12")
    assert (module.step, module.branch, module.name) == (7, "cond", "in.hidden_states")
    assert module.inward
    assert not module.outward
    sample = key_of("sample/0003/output/frames")
    assert (sample.stage, sample.number, sample.name, sample.step) == ("output", 3, "frames", None)


def test_names_that_say_nothing_are_kept_as_they_are() -> None:
    for text in ("weight", "a/b", "step/x/cond", "latent/other", "module/a/b", "", "stats"):
        assert key_of(text) == Key(name=text)
        assert key_of(text).stage == ""
    odd = key_of("step/7/cond")  # not as it would be written here, and yet clear
    assert (odd.stage, odd.step, str(odd)) == ("prediction", 7, "step/7/cond")


def test_names_are_made_of_values() -> None:
    assert key_of(step_name(7, "cond")) == Key("step", "cond", 7)
    made = module_name("blocks.0", step=7, branch="cond", slot="out.0", call=1)
    assert key_of(made) == Key("module", "out.0", 7, "cond", "blocks.0", 1)


def test_floors_are_shared_over_steps() -> None:
    assert stage_key("float32/audio/step/0007/cond") == "float32/audio/step/*/cond"
    assert stage_key("sample/0003/output/a/b") == "sample/*/output/a/b"
    assert stage_key("module/a/7/cond/out.0") == "module/a/7/cond/out.0"
    assert spread_key("module/a/7/cond/out.0") == "module/out"
    assert spread_key("step/0007/uncond") == "step/*/prediction"
