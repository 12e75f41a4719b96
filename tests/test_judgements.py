"""experiments/judgements.py: a file with a known answer, missing judgements, errors against parts of it, what is refused."""
import json

import pytest
import torch

from common.settings import parse
from experiments import judgements
from experiments.judgements import Config, as_matrices, rates, read_judgements
from experiments.winrate import length_controlled

QUALITY = {"terse": 1.0, "plain": 0.0, "wordy": -1.0}  # log-odds of winning at equal length
WORDS = {"terse": 60, "plain": 120, "wordy": 240}


@pytest.fixture(scope="module")
def rows():
    """A judge who takes the longer text too often: logit P(win) = quality + 2 log(words / reference's). The terse model is the
    best of the three at equal length, and looks the worst. A tenth of the judgements is missing."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for model, quality in QUALITY.items():
        for i in range(2000):
            words = WORDS[model] * float(torch.exp(0.4 * torch.randn(1, generator=draw)))
            p = 1 / (1 + torch.exp(-torch.tensor(quality) - 2 * torch.log(torch.tensor((words + 1) / 121))))
            win = float(torch.rand(1, generator=draw) < p)
            if torch.rand(1, generator=draw) < 0.9:
                found.append({"model": model, "instruction": f"question {i}", "win": win, "words": words,
                              "words_reference": 120})
    return found


def test_a_file_with_a_known_answer(rows):
    """At equal length sigmoid(quality), within three of its errors; the raw rate has them the other way round."""
    found = {row["model"]: row for row in rates(rows, 30)}
    assert list(found) == ["terse", "plain", "wordy"]
    for model, row in found.items():
        truth = torch.tensor(QUALITY[model]).sigmoid().item()
        assert 0.005 < row["length_controlled_se"] < 0.05
        assert row["length_controlled"] == pytest.approx(truth, abs=3 * row["length_controlled_se"])
        assert row["length_ratio"] == pytest.approx(WORDS[model] / 120, rel=0.05) and 1700 < row["judgements"] < 1900
    raw = [row["win_rate"] for row in found.values()]
    assert raw[0] < raw[1] < raw[2]
    wins = torch.tensor([row["win"] for row in rows if row["model"] == "plain"])
    assert found["plain"]["win_rate"] == pytest.approx(wins.mean().item())
    assert found["plain"]["win_rate_se"] == pytest.approx((wins.std() / len(wins)**0.5).item(), rel=1e-5)


def test_a_judgement_that_is_missing_counts_for_nothing(rows):
    """Whatever number stands in its place; and without any missing the mask changes nothing."""
    _, win, log_ratio, judged = as_matrices(rows)
    assert not judged.all()
    expected = length_controlled(win, log_ratio, judged)
    other = length_controlled(win.masked_fill(~judged, 0.7), log_ratio, judged)
    assert torch.equal(expected, other) and not torch.allclose(expected, length_controlled(win, log_ratio), atol=0.01)
    assert torch.equal(length_controlled(win, log_ratio, torch.ones_like(judged)), length_controlled(win, log_ratio))
    alone = length_controlled(win[:1][judged[:1]][None], log_ratio[:1][judged[:1]][None])
    assert length_controlled(win[:1], log_ratio[:1], judged[:1]).item() == pytest.approx(alone.item(), abs=1e-9)


def test_the_error_is_how_far_another_draw_of_instructions_would_be(rows):
    """The bootstrap's error against the spread over ten parts of the instructions, each with root ten times the error."""
    found = {row["model"]: row["length_controlled_se"] for row in rates(rows, 60)}
    models, win, log_ratio, judged = as_matrices(rows)
    parts = torch.stack([length_controlled(win[:, i::10], log_ratio[:, i::10], judged[:, i::10]) for i in range(10)])
    for k, model in enumerate(models):
        assert found[model] == pytest.approx((parts[:, k].std() / 10**0.5).item(), rel=0.7)


def test_the_command_prints_the_table(rows, tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows[::10]))
    judgements.main(parse(Config, "", ["--data", str(path), "--draws", "10"]))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| terse", "| plain", "| wordy"]
    row = rates(read_judgements(str(path)), 10)[0]
    assert lines[2].endswith(f"| {100 * row['length_controlled']:.1f} ± {100 * row['length_controlled_se']:.1f} |")


@pytest.mark.parametrize("change, says", [
    ({"win": 1.2}, "line 2: field 'win' is 1.2, expected 0 to 1"), ({"win": float("nan")}, "line 2: field 'win' is nan"),
    ({"words": -1}, "line 2: field 'words' is -1"),
    ({"words_reference": float("inf")}, "line 2: field 'words_reference' is inf"),
    ({"model": 3}, "line 2"), ({"instruction": "a"}, "line 2: a second judgement of model 'm' on the same instruction")])
def test_a_bad_row_stops_with_its_line(change, says, tmp_path):
    good = {"model": "m", "instruction": "a", "win": 0.5, "words": 3, "words_reference": 4}
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | {"instruction": "b"} | change) + "\n")
    with pytest.raises(SystemExit) as stop:
        judgements.main(Config(data=str(path)))
    assert says in str(stop.value) and "\n" not in str(stop.value)


@pytest.mark.parametrize("flags, says", [([], "--data: expected"), (["--data", "x.jsonl", "--draws", "1"], "--draws 1: must")])
def test_what_cannot_be_run_is_said(flags, says):
    with pytest.raises(SystemExit) as stop:
        parse(Config, judgements.__doc__, flags)
    assert says in str(stop.value)
