"""The answer in a dozen lines: what is first, what goes where there is no room, what is pasted."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truestep.explanations import Cause, Elsewhere, Recheck
from truestep.report.answer import LINES, answer, answers, headline, next_line, word_of
from truestep.report.words import also_lines, recheck_line
from truestep.text import command_lines, wrapped
from truestep.verdict import (
    Comparison,
    Divergence,
    FloorUsed,
    Metrics,
    Results,
    Row,
    Rows,
    Rule,
    Side,
    Verdict,
)


def row(name: str, verdict: Verdict, *, bound: float = 3.0, stage: str = "prediction") -> Row:
    metrics = Metrics(
        count=8,
        rel_l2=1e-2,
        max_abs=1e-2,
        max_abs_index=(0,),
        cosine_distance=1e-4,
        norm_ratio=1.0,
        gain=1.0,
        rms_reference=1.0,
    )
    floor = FloorUsed(
        rel_l2=1e-2, max_abs=1e-2, bound=bound, source="measured", pair="float32/float32"
    )
    return Row(name=name, verdict=verdict, stage=stage, metrics=metrics, floor=floor, ratio=9.0)


def compared(verdict: Verdict, rows: tuple[Row, ...], **fields: object) -> Comparison:
    return Comparison(
        verdict=verdict,
        sentence=f"{verdict.value}: {len(rows)} tensors",
        rows=Rows.of(rows),
        rule=Rule(name="r", text="the rule"),
        actual=Side(label="apply port"),
        reference=Side(label="reference"),
        case_id="cat",
        **fields,  # type: ignore[arg-type]
    )


def full(names: list[str], verdict: Verdict) -> Comparison:
    """A comparison that has more to say than there is room for."""
    return compared(
        verdict,
        tuple(row(name, verdict) for name in names),
        first_divergence=Divergence(name=names[0], stage="prediction", operator="aten.mm " * 60),
        notes=tuple(f"note {at} " * 30 for at in range(9)),
        looked_at=("everything " * 30,),
        not_looked_at=("nothing " * 30,),
        repeat="truestep check cat --apply port.py:f",
    )


@given(
    st.lists(st.text(min_size=1, max_size=300), min_size=1, max_size=30),
    st.sampled_from(list(Verdict)),
    st.integers(40, 120),
)
def test_it_fits_whatever_there_is_to_say(names: list[str], verdict: Verdict, width: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        comparison = full(names, verdict)
        lines = answer(comparison)
        assert len(lines) <= LINES
        several = answers(Results.of([comparison] * 40))
        assert len(several) <= LINES
        for line in (*lines, *several):
            assert len(line) <= width
            assert line.isprintable() or not any(c in line for c in "\n\x1b\r")


def test_the_verdict_is_first_and_the_line_of_code_second() -> None:
    lines = answer(full(["a"], Verdict.DRIFTED))
    assert lines[0] == "FAILED drifted: 1 tensors"
    assert lines[1].startswith("  at           aten.mm")
    assert lines[-1] == "next: truestep check cat --apply port.py:f --depth modules"


def test_an_undecided_result_has_not_failed() -> None:
    assert word_of("inconclusive", passed=False) == "UNDECIDED"
    text = "\n".join(answer(full(["a"], Verdict.INCONCLUSIVE)))
    assert text.startswith("UNDECIDED 1 tensors")
    assert "FAILED" not in text
    assert "inconclusive" not in text
    assert "more failed" not in text
    assert answer(full(["a"], Verdict.MISSING))[0].startswith("MISSING ")
    assert answer(full(["a"], Verdict.INCOMPARABLE))[0].startswith("INCOMPARABLE ")
    assert answer(full(["a"], Verdict.IDENTICAL))[0].startswith("PASSED identical")


def test_a_place_that_is_missing_can_be_copied() -> None:
    """A path longer than the line is not broken; text is."""
    path = "references/" + "of-a-team/" * 12 + "a.safetensors"
    told = full(["a"], Verdict.MISSING).model_copy(update={"notes": (path, "a b " * 30)})
    lines = answer(told)
    assert f"  note         {path}" in lines
    assert all(len(line) <= 80 for line in lines if path not in line)


def test_a_pass_that_could_not_see_much_says_so_first() -> None:
    seeing = compared(Verdict.EQUIVALENT, (row("a", Verdict.EQUIVALENT, bound=3.0),))
    assert headline(seeing) == "PASSED equivalent: 1 tensors"
    blind = compared(Verdict.EQUIVALENT, (row("a", Verdict.EQUIVALENT, bound=31.0),))
    assert headline(blind) == (
        "PASSED equivalent, but only a relative change of 3.1e-01 would have been seen: 1 tensors"
    )


def test_a_deeper_look_is_offered_where_a_model_is_at_fault_and_was_not_opened() -> None:
    drifted = full(["a"], Verdict.DRIFTED)
    assert next_line(drifted).endswith(" --depth modules")
    for other in (
        {"repeat": "truestep check cat --depth modules"},
        {"repeat": "truestep compare a b"},
        {"first_divergence": Divergence(name="a", stage="guidance")},
    ):
        assert next_line(drifted.model_copy(update=other)) == ""
    for freely, deeper in (
        ("check cat --depth final", "check cat --depth modules"),
        ("check cat --depth=final", "check cat --depth=final --depth modules"),
        (
            "check cat --prompt 'a --depth final'",
            "check cat --prompt 'a --depth final' --depth modules",
        ),
    ):
        told = drifted.model_copy(
            update={
                "repeat": f"truestep {freely}",
                "first_divergence": Divergence(name="latent/final", stage="update"),
            }
        )
        assert next_line(told) == f"next: truestep {deeper}"
    looked = {"repeat": "truestep check cat --depth modules"}
    at = Divergence(name="m", stage="module", fqn="blocks.1")
    named = drifted.model_copy(update={**looked, "first_divergence": at})
    assert next_line(named) == "next: truestep check cat --depth cause"
    cause = Cause(kind="epsilon", text="eps is 1", error_before=1.0, error_after=0.0, tried=1)
    told = named.model_copy(update={"first_divergence": at.model_copy(update={"cause": cause})})
    assert next_line(told) == ""
    lines = answer(told)
    assert lines[1].split() == ["cause", "eps", "is", "1"]
    hinted = drifted.model_copy(update={"hint": "give both sides"})
    assert next_line(hinted) == "hint: give both sides"


def test_what_is_left_out_is_counted() -> None:
    names = [f"t{at}" for at in range(30)]
    text = "\n".join(
        answer(compared(Verdict.DRIFTED, tuple(row(n, Verdict.DRIFTED) for n in names)))
    )
    assert sum(line.startswith("  t") and "9" in line for line in text.splitlines()) == 3
    assert "  ... 27 more failed (-v)" in text


def test_a_command_that_is_broken_into_lines_is_the_same_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    words = ["a 'b'", 'c "d"  e', "$x", "plain", "--flag=1", "x" * 60]
    from truestep.text import pasteable

    line = f"printf %s\\\\n {pasteable(words)}"
    lines = command_lines(f"{line}  # why it is given, in more words than fit")
    assert len(lines) > 3
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, check=True)
    assert done.stdout.decode().splitlines() == words
    monkeypatch.delenv("COLUMNS")
    assert command_lines(line) == [line]  # in a pipe


def test_text_that_is_cut_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert wrapped("note", "word " * 30, most=1)[0].endswith(" ...")
    assert len(wrapped("note", "word " * 30)) > 4
    assert wrapped("note", "\x1b[31m", most=1) == ["  note         \\x1b[31m"]


def test_what_is_wrong_beside_the_first_module_is_told_in_groups() -> None:
    def cause(name: str, text: str = "is 1") -> Cause:
        said = f"`{name}.eps` {text}"
        return Cause(kind="epsilon", text=said, error_before=1.0, error_after=0.0, tried=1)

    same = tuple(
        Elsewhere(fqn=f"transformer.b.{at}.n", cause=cause(f"b.{at}.n")) for at in range(1, 6)
    )
    other = Elsewhere(fqn="transformer.out", cause=cause("out", "is 2"))
    first = Divergence(
        name="m",
        stage="module",
        fqn="transformer.b.0.n",
        cause=cause("b.0.n"),
        also=(Elsewhere(fqn="transformer.b.9"), other, *same),
        recheck=Recheck(modules=8, error_before=0.5, error_after=0.25, ratio=3e4, passed=False),
    )
    assert also_lines(first) == [
        "the same in `transformer.b.1.n`, `transformer.b.2.n`, `transformer.b.3.n` and 2 more",
        "wrong by itself, too: `transformer.b.9`",
        "`out.eps` is 2",
    ]
    drifted = compared(Verdict.DRIFTED, (row("t", Verdict.DRIFTED),))
    told = " ".join(
        " ".join(answer(drifted.model_copy(update={"first_divergence": first}))).split()
    )
    assert "also the same in `transformer.b.1.n`" in told
    assert (
        "recheck with these 8 modules as the reference has them, 2.5e-01 of 5.0e-01 is left "
        "(3e+04 x the floor): something else is wrong, too"
    ) in told


def test_a_recheck_that_passes_says_so() -> None:
    fields = {"error_before": 0.5, "ratio": 0.5, "passed": True}
    assert recheck_line(Recheck(modules=1, error_after=0.0, **fields)) == (
        "with this module as the reference has it, the model agrees bit for bit"
    )
    whole = Recheck(modules=1, error_after=0.0, whole=("blocks.2",), **fields)
    assert recheck_line(whole).endswith("the model agrees bit for bit; with all inside `blocks.2`")
    assert recheck_line(Recheck(modules=2, error_after=1e-7, **fields)) == (
        "with these 2 modules as the reference has them, 1.0e-07 of 5.0e-01 is left, within the "
        "model's floor"
    )
