"""`truestep ab ablate`: options, outputs, exit codes, and its page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.commands import Run, runner
from truestep.experiment import ablation as module
from truestep.experiment.ablation_records import Ablation, Matrix
from truestep.replay.record import record_pipeline
from truestep.report import ablation as page

SCHEMAS = Path(__file__).parents[2] / "docs" / "schema"
TO = ("--from", "official@f4b06fb", "--to", "official@822ce3c")
"""Two controls differ, and in float32 without an image neither does anything."""

HOSTILE = "</title><script>alert(1)</script>|`x`"


@pytest.fixture
def folder(tiny_ltx2: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a case file to run in; nothing measures a noise floor."""

    def unmeasured(pipe: Any, *, case: Any, **given: object) -> Any:
        return record_pipeline(pipe, case=case, floor="none")

    monkeypatch.setattr(module, "record_pipeline", unmeasured)
    text = f"""
[case.tiny]
model = "{tiny_ltx2["2.3"]}"
prompt = '{HOSTILE}'
height = 32
width = 32
num_frames = 9
steps = 2
max_sequence_length = 16
settings = {{ stg_blocks = [1], audio_stg_blocks = [1], device = "cpu" }}

[case.other]
model = "x"
prompt = "p"
"""
    (tmp_path / "truestep.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ablate(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Run:
    """Run `truestep ab ablate`."""
    return runner(monkeypatch, capsys, "ab", "ablate")


def schema(name: str) -> Any:
    return json.loads((SCHEMAS / f"{name}.json").read_text())


def test_tables_json_markdown_and_page(ablate: Run, folder: Path) -> None:
    code, out, _ = ablate(
        "tiny", *TO, "--set", "dtype=bfloat16",
        "--json", "r.json", "--report", "r.html", "--output", "r.md",
    )  # fmt: skip
    assert code == 0
    lines = out.splitlines()
    assert lines[-3:-1] == ["table: r.md", "report: r.html"]
    assert lines[-1].startswith("repeat: truestep ab ablate tiny --from official@f4b06fb")
    data = json.loads((folder / "r.json").read_text())
    jsonschema.validate(data, schema("ablation-1"))
    found = Ablation.model_validate(data)
    assert " ".join(out.split()).startswith(f"MEASURED {found.sentence}")
    assert found.order == ("av_adaln", "guidance_dtype")
    assert found.explained
    assert found.case["dtype"] == "bfloat16"
    dtype = found.switches[1]
    assert (dtype.choice.from_value, dtype.choice.to_value) == ("float32", "model")
    assert {s.stage for s in dtype.stages} == {"guidance"}
    assert any(line.strip().startswith("guidance_dtype ") for line in lines)
    table = (folder / "r.md").read_text()
    assert table.splitlines()[0] == f"**{found.sentence}**"
    assert re.search(
        r"\| guidance_dtype \| float32 -> model \| \w+: guidance \S+ / \S+ x \|", table
    )
    assert "| audio | interaction remainder |" in table
    html = (folder / "r.html").read_text()
    assert html.strip() == page.render(found)
    assert "<script>alert" not in html
    assert not re.search(r"(src|href)=\"(https?:)?//", html)
    assert html.count("<svg") == 4


def test_the_plot_has_a_lane_a_control_and_one_for_all(ablate: Run) -> None:
    found = Ablation.model_validate_json(ablate("tiny", *TO, "--json")[1])
    laid = page.plot(found)
    assert laid is not None
    assert [lane.name for lane in laid.lanes] == [
        "av_adaln",
        "guidance_dtype",
        "all: official@822ce3c",
    ]
    assert [lane.text for lane in laid.lanes] == ["identical"] * 3
    assert all(lane.marks == () for lane in laid.lanes)
    assert laid.left < laid.floor_x < laid.right
    far = found.whole.ends[0].model_copy(update={"multiple": 1e5, "rel_l2": 0.1})
    whole = found.whole.model_copy(update={"ends": (far, found.whole.ends[1])})
    moved = page.plot(found.model_copy(update={"whole": whole}))
    assert moved is not None
    (mark,) = moved.lanes[-1].marks
    assert moved.floor_x < mark.x <= moved.right
    assert "video: 1.0e+05 x floor" in mark.title


def test_a_difference_that_is_not_explained_fails(
    ablate: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "first_difference", lambda actual, reference: "latent/final")
    code, out, _ = ablate("tiny", *TO, "-v")
    assert code == 1
    assert "the controls do not explain the difference: official@f4b06fb with every" in out
    assert "(first tensor that differs: `latent/final`)" in " ".join(out.split())
    assert "`latent/final` is not that of official@822ce3c: something else differs" in " ".join(
        out.split()
    )


def test_every_profile_against_every_other(ablate: Run, folder: Path) -> None:
    code, out, _ = ablate("tiny", "--all", "--json", "m.json", "--report", "m.html")
    assert code == 0
    data = json.loads((folder / "m.json").read_text())
    jsonschema.validate(data, schema("ablation-matrix-1"))
    found = Matrix.model_validate(data)
    assert found.sentence.startswith("5 profiles: ")
    assert found.sentence in " ".join(out.split())
    for _, (heads, rows) in page.matrix_tables(found):
        assert heads[1:] == found.profiles
        assert [row[0] for row in rows] == list(found.profiles)
        assert [row[at + 1] for at, row in enumerate(rows)] == ["="] * 5
    assert (folder / "m.html").read_text().strip() == page.render(found)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiny"], "ablate needs --from and --to, or --all alone"),
        (["tiny", "--from", "sglang-0.5.23"], "ablate needs --from and --to, or --all alone"),
        (["tiny", "--all", *TO], "ablate needs --from and --to, or --all alone"),
        (["tiny", *TO[:3], "official"], "there is no profile 'official'"),
        (["tiny", *TO[:3], "vllm-omni-0.3"], "did you mean 'vllm-omni-0.30'?"),
        (["tiny", *TO[:3], TO[1]], "both profiles are 'official@f4b06fb'"),
        ([*TO], "ablate takes one case, 2 were chosen"),
        (["tyni", *TO], "no case named 'tyni'"),
        (["tiny", *TO, "--set", "stg_blocks=28"], "stg_blocks names block 28"),
    ],
)
def test_what_cannot_be_run_is_said(ablate: Run, arguments: list[str], said: str) -> None:
    code, out, err = ablate(*arguments)
    assert (code, out) == (2, "")
    assert said in err
