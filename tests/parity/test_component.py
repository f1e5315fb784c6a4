"""Declaring a case: names, kinds, tolerances, typed reasons and places."""

from __future__ import annotations

import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from truestep.errors import ComponentMissingError, UsageError
from truestep.parity import Family, Loosened, Parity, missing
from truestep.parity.evidence import Evidence, MissingPart, Numbers, State, Tolerance, state_of

TODAY = date(2026, 12, 1)


def declare(**changes: object) -> Parity:
    given = {"family": "acme", "component": "vae", "kind": "vae", "coverage": "both"}
    return Parity(**{**given, "official": dict, "port": dict, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "encode"}, r"kind='encode' is not known(.|\n)*did you mean 'encoder'\?"),
        ({"coverage": "all"}, "coverage='all' is not known"),
        ({"component": "../vae"}, "cannot name anything"),
        ({"seeds": ()}, "seeds is empty"),
        ({"allow_shared": {"norm.py": " "}}, "needs a reason"),
    ],
)
def test_what_cannot_be_declared(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        declare(**changes)


def test_start_tolerances_follow_the_kind() -> None:
    assert declare().start_tolerance == 5e-2
    assert declare(kind="encoder").start_tolerance == 1e-3


def test_a_loosened_tolerance_needs_reason_owner_and_expiry() -> None:
    good = Loosened(0.1, reason="cross-kernel bf16", owner="ada", expires="2026-12-01")
    assert not good.expired(TODAY)
    assert good.expired(date(2026, 12, 2))
    with pytest.raises(UsageError, match="needs a reason"):
        Loosened(0.1, reason="", owner="ada", expires="2026-12-01")
    with pytest.raises(UsageError, match="needs a owner"):
        Loosened(0.1, reason="x", owner=" ", expires="2026-12-01")
    with pytest.raises(UsageError, match="expires='soon' is no date"):
        Loosened(0.1, reason="x", owner="ada", expires="soon")
    with pytest.raises(TypeError):
        Loosened(0.1, reason="x", owner="ada")  # type: ignore[call-arg]


def numbers(verdict: str) -> Numbers:
    return Numbers(verdict=verdict, sentence=f"{verdict}: x", tensors=1, samples=1)


@pytest.mark.parametrize(
    ("fields", "state", "reason"),
    [
        ({"numbers": numbers("equivalent")}, State.NON_SKIP_PASS, ""),
        ({"numbers": numbers("drifted")}, State.DEBUG_RED, "drifted: x"),
        ({}, State.DEBUG_RED, "passed, and no numbers were compared"),
        (
            {"numbers": numbers("identical"), "result": "xfailed"},
            State.DEBUG_RED,
            "xfailed, although the numbers agree",
        ),
        (
            {"numbers": numbers("identical"), "shared": ("a.py",)},
            State.DEBUG_RED,
            "proves nothing: both sides share a.py",
        ),
        (
            {"missing": MissingPart(kind="weights", what="a.pt"), "result": "skipped"},
            State.SCAFFOLD_SKIP,
            "missing: weights: a.pt",
        ),
        (
            {"missing": MissingPart(kind="weights", what="a.pt", decision="ada: buy it")},
            State.BLOCKED,
            "missing: weights: a.pt; needs: ada: buy it",
        ),
        (
            {
                "numbers": numbers("equivalent"),
                "tolerance": Tolerance(rel_l2=1, reason="r", owner="ada", expires="2026-11-30"),
            },
            State.DEBUG_RED,
            "the loosened tolerance expired on 2026-11-30 (owner: ada)",
        ),
    ],
)
def test_states_are_derived(fields: dict[str, object], state: State, reason: str) -> None:
    evidence = Evidence(**{"result": "passed", "date": "2026-12-01", **fields})  # type: ignore[arg-type]
    assert state_of(evidence, TODAY) == (state, reason)


def test_a_reason_is_one_of_four_and_says_what() -> None:
    with pytest.raises(UsageError, match=r"did you mean 'weights'\?"):
        missing("weight", "a.pt")
    with pytest.raises(UsageError, match="say exactly what is missing"):
        missing("weights", " ")
    error = missing("weights", "a.pt", searched=["$X (not set)"], hint="export X=DIR")
    assert str(error) == ("missing: weights: a.pt\n\n  where    $X (not set)\n\nhint: export X=DIR")
    assert error.exit_code == 3


def test_places_have_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = Family("ltx-2", weights_dir=tmp_path / "default")
    with pytest.raises(ComponentMissingError, match=r"a\.bin in .*default"):
        family.weights("a.bin")
    (tmp_path / "a.bin").write_bytes(b"1")
    monkeypatch.setenv("LTX_2_LOCAL_WEIGHTS_DIR", str(tmp_path))
    assert family.weights("*.bin") == [tmp_path / "a.bin"]
    with pytest.raises(ComponentMissingError, match=r"missing: converted_weights: b\.bin of ltx-2"):
        family.converted("b.bin")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "zz_broken.py").write_text("1 / 0\n")
    (tmp_path / "zz_needs.py").write_text("import zz_private_kernels\n")
    (tmp_path / "zz_has.py").write_text("class WanModel: pass\n")
    return tmp_path


def test_imports_skip_only_for_what_is_not_there(packages: Path) -> None:
    family = Family("acme")
    for load, kind in ((family.official_class, "official_import"), (family.port_class, "port_cl")):
        with pytest.raises(ComponentMissingError, match=rf"missing: {kind}\w*: module zz_nothing"):
            load("zz_nothing.model:Model")
        with pytest.raises(ComponentMissingError, match="class WanModell in zz_has"):
            load("zz_has:WanModell")
        with pytest.raises(ZeroDivisionError):
            load("zz_broken:Model")
        with pytest.raises(UsageError, match="names no class"):
            load("zz_has")
    with pytest.raises(ComponentMissingError, match=r"hint: set it: export \w+_OFFICIAL_REF_DIR="):
        family.official_class("zz_nothing.model:Model")
    with pytest.raises(ComponentMissingError, match="zz_private_kernels, which zz_needs imports"):
        family.official_class("zz_needs:Model")
    with pytest.raises(ModuleNotFoundError, match="zz_private_kernels"):
        family.port_class("zz_needs:Model")


def test_an_official_class_from_elsewhere_is_an_error(
    packages: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("official")
    monkeypatch.setenv("ACME_OFFICIAL_REF_DIR", str(folder))
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(UsageError, match="was not imported from the official folder"):
        Family("acme").official_class("zz_has:WanModel")


def test_declaring_imports_no_torch() -> None:
    code = "import truestep.parity, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
