"""experiments/effort.py: copying, scores of segments, what is counted as effort, and the experiment
in small.
"""
import json
import math

import numpy as np
import pytest

from common.pendulum import Grid, bumps, true_reward
from common.settings import parse
from experiments import effort


def test_a_copy_gives_the_torques_that_it_was_shown_and_no_others():
    rng = np.random.default_rng(0)
    states = rng.uniform([-np.pi, -8], [np.pi, 8], (3000, 2))
    theta = rng.normal(size=108)
    shown = np.clip(bumps(states) @ theta, -3, 3)
    assert np.abs(effort.copied(effort.copy(states, shown), states) - shown).mean() < 0.1
    assert np.abs(effort.copied(100 * theta, states)).max() == 3


def test_answers_are_counted_as_what_is_asked_of_the_person():
    """A demonstration is 100 steps; a round of DAgger 40 labels, of scores 10."""
    config = effort.Config(demonstrations=3, rounds=2)
    grid = Grid(21)
    V = grid.plan(true_reward(grid.states))
    assert [row["answers"] for row in effort.demonstrations(config, grid, V, 0)] == [100, 200, 300]
    assert [row["answers"] for row in effort.labels(config, grid, V, 0)] == [40, 80]
    assert [row["answers"] for row in effort.scores(config, grid, 0.0, 0)] == [0, 10, 20]
    assert effort.cost("comparisons, chosen", "seconds, in real time") == 5
    assert effort.cost("demonstrations", "seconds, in real time") == 0.1
    assert all(effort.cost(way, "decisions") == 1 for way in effort.WAYS)


def test_what_a_goal_needs_is_where_the_mean_stays_above_it():
    rows = [{"way": "random actions", "answers": 0, "return": 0.0},
            {"way": "true reward", "answers": 0, "return": 10.0}]
    rows += [{"way": "labels", "answers": n, "return": value + noise}
             for n, value in ((20, 9), (40, 7), (60, 8), (80, 9.5)) for noise in (-1, 1)]
    assert effort.needed(rows, "labels", 0.75) == 60
    assert effort.needed(rows, "labels", 0.6) == 20
    assert effort.needed(rows, "labels", 0.99) == math.inf


def test_scores_teach_it_to_stand():
    grid = Grid()
    rows = effort.scores(effort.Config(rounds=4), grid, 0.0, 0)
    assert rows[0]["return"] < 20 and rows[-1]["return"] > 60


def test_it_leaves_rows_and_a_figure(tmp_path):
    effort.main(effort.Config(demonstrations=1, rounds=1, seeds=2, out=str(tmp_path)))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").open()]
    assert {row["way"] for row in rows} == {*effort.WAYS, "true reward", "random actions"}
    assert (tmp_path / "figure.png").stat().st_size > 20_000


@pytest.mark.parametrize("arguments", ["--seeds 1", "--seeds 1001", "--demonstrations 0",
                                       "--demonstrations 10001", "--rounds 0", "--rounds 1001",
                                       "--seed -1"])
def test_a_bad_setting_is_one_line(arguments):
    with pytest.raises(SystemExit) as stopped:
        parse(effort.Config, "", arguments.split())
    message = str(stopped.value)
    assert message.startswith("error: ") and arguments.split()[0] in message
    assert "\n" not in message
