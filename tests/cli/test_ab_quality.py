"""`truestep ab --quality`: the whole way on the digits, at few steps and few prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
)

from tests.commands import Run, runner
from truestep.experiment.quality import digits_judge as judge
from truestep.experiment.quality.records import Quality, Standing

CHANGES = """
import torch


def nothing(pipe):
    pass


def wrong(pipe):
    decode = pipe.decode
    pipe.decode = lambda inner, latent: -torch.ones_like(decode(inner, latent))


def nan(pipe):
    decode = pipe.decode

    def decoded(inner, latent):
        frames = decode(inner, latent)
        frames[..., 0, 0] = float("nan")
        return frames

    pipe.decode = decoded


def rounded(pipe):
    for block in pipe.transformer.blocks:
        weight = block.ffn.net[2].weight
        scale = weight.abs().amax() / 127
        weight.data = (weight.data / scale).round() * scale


def raises(pipe):
    def update(*arguments):
        raise RuntimeError("no such kernel")

    pipe.update = update


def bright(frames, prompt):
    return float(frames.mean())
"""

TINY = ("--vs", "steps=3", "--num-prompts", "4", "--seeds", "3")
CASE = "builtin:digits"


@pytest.fixture
def ab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `truestep ab` in a folder with changes."""
    (tmp_path / "change.py").write_text(CHANGES)
    monkeypatch.chdir(tmp_path)
    return runner(monkeypatch, capsys, "ab")


def result(path: str = "truestep-quality/result.json") -> Quality:
    return Quality.model_validate_json(Path(path).read_text())


def test_few_prompts_decide_nothing_and_the_result_says_how_many_would(ab: Run) -> None:
    code, out, _ = ab(CASE, "--quality", *TINY, "--set", "steps=4", "--report", "r.html")
    assert code == 4
    assert out.startswith("UNDECIDED ")
    assert "prompts would decide" in " ".join(out.split())
    found = result()
    assert found.prompts == 4
    assert len(found.clips) == 2 * 4 * 3
    page = Path("r.html").read_text()
    assert "Which metrics vote" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert "| digit |" in Path("truestep-quality/table.md").read_text()
    code, again, _ = ab("recover", "truestep-quality", "--quality", "--json")
    assert code == 4
    assert json.loads(again)["candidates"] == json.loads(found.model_dump_json())["candidates"]


def test_it_goes_on_where_it_stopped_and_refuses_another_experiment(ab: Run) -> None:
    ab(CASE, "--quality", *TINY, "--apply", "change.py:rounded")
    lines = Path("truestep-quality/clips.jsonl").read_text().splitlines()
    Path("truestep-quality/clips.jsonl").write_text("\n".join(lines[:7]) + "\n" + lines[7][:50])
    code, _, err = ab(CASE, "--quality", *TINY, "--apply", "change.py:rounded")
    assert code == 2
    assert "--resume" in err
    ab(CASE, "--quality", *TINY, "--apply", "change.py:rounded", "--resume")
    assert len(result().clips) == 24
    code, _, err = ab(CASE, "--quality", *TINY, "--apply", "change.py:wrong", "--resume")
    assert code == 2
    assert "another one: apply changed" in err


@pytest.mark.parametrize(
    ("name", "options", "code", "standing", "said"),
    [
        ("nothing", (), 0, Standing.IDENTICAL, "bit by bit"),
        ("nothing", ("--mechanism", "quantise"), 1, Standing.UNMET, "no layers quantised"),
        ("rounded", ("--mechanism", "skip"), 1, Standing.UNMET, "no blocks or forwards skipped"),
        ("rounded", ("--mechanism", "quantise"), 4, Standing.INCONCLUSIVE, "would decide"),
        ("wrong", (), 1, Standing.IDENTICAL, ""),
        ("nan", (), 1, Standing.DEGRADED, "not finite"),
        ("raises", (), 1, Standing.INVALID, "no such kernel"),
    ],
)
def test_outcomes(
    ab: Run, name: str, options: tuple[str, ...], code: int, standing: Standing, said: str
) -> None:
    own = (*TINY[:2], "--num-prompts", "12", *TINY[4:]) if name == "wrong" else TINY
    found, out, _ = ab(CASE, "--quality", *own, "--apply", f"change.py:{name}", *options)
    if name == "wrong":  # black frames of the same latents
        standing = Standing.DEGRADED
    assert found == code, out
    assert result().standing is standing
    assert said in " ".join(out.split())


def test_a_setting_that_acts_shows_its_counts(ab: Run) -> None:
    code, out, _ = ab(CASE, "--quality", *TINY, "--set", "text_cache=true", "-v")
    assert code == 0
    assert "cache hits per step 0 to" in out
    assert result().candidates[0].mechanisms["cache"] > 0


def clip_folder(folder: Path) -> Path:
    """A CLIP model with random weights, and all that its loader needs."""
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    words = sorted({word for prompt in judge.prompts() for word in prompt.split()})
    vocabulary = {word: at for at, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=CLIPTextConfig(
            vocab_size=len(vocabulary), num_attention_heads=2, max_position_embeddings=8,
            eos_token_id=1, bos_token_id=1, pad_token_id=0, **size,
        ).to_dict(),
        vision_config=CLIPVisionConfig(
            num_attention_heads=2, image_size=32, patch_size=8, **size
        ).to_dict(),
        projection_dim=16,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    square = {"height": 32, "width": 32}
    CLIPImageProcessor(size=square, crop_size=square).save_pretrained(folder)
    return folder


def test_a_random_clip_and_a_blind_metric_have_no_vote(ab: Run, tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "clip")
    code, out, err = ab(
        CASE, "--quality", *TINY[:2], "--num-prompts", "12", "--seeds", "3", "--set", "steps=4",
        "--metric", f"clip:{folder}", "--metric", "change.py:bright",
    )  # fmt: skip
    votes = {vote.metric: vote for vote in result().votes}
    assert not votes["clip"].votes
    assert "wrong prompt" in votes["clip"].reason
    assert not votes["bright"].votes
    assert votes["digit"].votes
    assert "no vote: clip" in out
    assert code == 4, err


def test_a_frontier_sets_fewer_steps_beside(ab: Run) -> None:
    code, out, _ = ab(
        CASE, "--frontier", "--vs", "steps=8", "--num-prompts", "3", "--seeds", "3",
        "--matrix", "cfg=batched", "--report", "r.html",
    )  # fmt: skip
    assert code in (0, 1, 4)
    found = result()
    assert found.candidates[0].cell.name == "cfg=batched"
    points = [cell.point for cell in found.candidates]
    assert all(point is not None for point in points)
    assert [point.fewer_steps for point in points if point] == [False, True, True, True]
    svg = Path("truestep-quality/frontier.svg").read_text()
    assert svg.count("<rect") == 2 * 3
    assert svg.count("<circle") == 2
    assert svg in Path("r.html").read_text()
    assert len(out.splitlines()) <= 12


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--num-prompts", "2"), "cannot decide anything"),
        ((), "the arms do not differ"),
        (("--set", "height=64"), "would not share their noise"),
        (("--set", "steps=4", "--margin", "x=1"), "there is no such metric"),
        (("--set", "steps=4", "--margin", "0"), "neither a share"),
        (("--set", "steps=4", "--broken", "2"), "not a share"),
        (("--set", "steps=4", "--matrix", "steps=5,6"), "one would hide the other"),
        (("--set", "steps=4", "--prompts", "none.txt"), "cannot be read"),
    ],
)
def test_what_means_nothing_is_refused_before_any_run(
    ab: Run, words: tuple[str, ...], said: str
) -> None:
    code, _, err = ab(CASE, "--quality", *words)
    assert code == 2
    assert said in " ".join(err.split())
    assert not Path("truestep-quality/clips.jsonl").exists()


def test_prompts_come_of_a_file_each_once(ab: Run) -> None:
    own = "\n".join(["# mine", *judge.prompts()[5:8], ""])
    Path("p.txt").write_text(own)
    ab(
        CASE,
        "--quality",
        "--vs",
        "steps=2",
        "--seeds",
        "3",
        "--set",
        "steps=3",
        "--prompts",
        "p.txt",
    )
    assert [c.content["prompt"] for c in result().quality.cases] == list(judge.prompts()[5:8])
    Path("p.txt").write_text("a red three moving left\n" * 3)
    code, _, err = ab(CASE, "--quality", "--set", "steps=3", "--prompts", "p.txt")
    assert code == 2
    assert "given twice" in err
