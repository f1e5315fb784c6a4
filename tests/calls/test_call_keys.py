"""Keys of tensors: a value in code, a text in files."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truestep.calls.keys import STAGES, Key, dotted, key_of
from truestep.keys import PRECISIONS, spread_key, stage_key

NAMES = st.text(max_size=8) | st.sampled_from(["", "%", "a/b", "in", "step", "x.y", "%41", "é\n"])

KEYS = st.builds(
    Key,
    stage=st.sampled_from(STAGES),
    component=NAMES,
    method=NAMES,
    call=st.integers(0, 10**6),
    side=st.sampled_from(["in", "out"]),
    path=st.lists(NAMES, max_size=4).map(tuple),
    step=st.none() | st.integers(0, 10**5),
    precision=st.sampled_from(["", *PRECISIONS]),
)


@given(KEYS)
def test_the_text_of_a_key_is_read_as_the_key(key: Key) -> None:
    assert key_of(str(key)) == key
    assert str(key).isprintable() or not str(key).isascii()
    assert "\n" not in str(key)


@given(KEYS, KEYS)
def test_two_keys_never_share_a_text(first: Key, second: Key) -> None:
    assert (first == second) == (str(first) == str(second))


@given(st.text(max_size=40) | st.from_regex(r"(step/\d{1,5}/)?text/[%a.]{0,4}/a/\d+/in/[%\w.]*"))
def test_a_text_is_a_key_or_refused(text: str) -> None:
    try:
        key = key_of(text)
    except ValueError:
        return
    assert str(key) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "step/0001",
        "step/1/text/a/b/0/in",
        "text/a/b/0/both",
        "text/a/b/00/in",
        "dream/a/b/0/in",
    ],
)
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not"):
        key_of(text)


def test_texts_say_where_a_tensor_is() -> None:
    key = Key("prediction", "transformer", "forward", 1, "out", ("sample",), step=3)
    assert str(key) == "step/0003/prediction/transformer/forward/1/out/sample"
    assert dotted(("args", "0")) == "args.0"


def test_steps_share_their_noise_floor_and_the_tensors_of_a_call_its_spread() -> None:
    key = Key("update", "scheduler", "step", 0, "in", ("sample",), step=3, precision="float32")
    assert stage_key(str(key)) == "float32/step/*/update/scheduler/step/0/in/sample"
    assert spread_key(str(key)) == "float32/step/*/update/scheduler/step/0/in"
