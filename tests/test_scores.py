"""experiments/scores.py: what cancels in a comparison, what a calibrated score is worth by theory
and by measurement, what a drift adds, and the experiment in small.
"""
import json
import math

import numpy as np
import pytest

from common.settings import parse
from experiments import scores


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_two_looks_are_a_bradley_terry_comparison_and_a_look_has_the_variance_that_is_said(rng):
    v = scores.look(np.tile([[1.3], [0.2]], 200_000), rng)
    assert (v[0] > v[1]).mean() == pytest.approx(1 / (1 + math.exp(-1.1)), abs=0.004)
    assert v.mean(1) == pytest.approx([1.3, 0.2], abs=0.01)
    assert v[0].var() == pytest.approx(scores.LOOK, rel=0.02)


def test_a_scale_changes_scores_but_no_comparison(rng):
    Phi = rng.normal(size=(2, 60, 4))
    v = scores.look(Phi @ np.array([2.0, -1, 1, 0]), rng)
    learned = [scores.learn("comparisons", Phi, v, person, 0.5, np.random.default_rng(1))
               for person in scores.PEOPLE]
    assert all(np.array_equal(w, learned[0]) for w in learned)
    assert np.array_equal(scores.learn("comparisons", Phi, np.exp(3 * v + 7), "calibrated", 0, rng),
                          learned[0])  # any increasing scale
    given = {person: scores.scale(person, v[0], 0.5, np.random.default_rng(1))
             for person in scores.PEOPLE}
    assert np.array_equal(given["calibrated"], v[0])
    squeezed = given["hard to please"]
    assert set(squeezed) <= set(range(11)) and np.median(squeezed) <= 2
    assert (np.diff(squeezed[v[0].argsort()]) >= 0).all()  # it stays in order
    still = scores.scale("drifting", v[0], 0.0, rng)
    assert np.array_equal(still, v[0])
    # a zero, and the unit of a scale, change no angle
    w = scores.learn("scores", Phi, v, "calibrated", 0, rng)
    moved = scores.learn("scores", Phi, v + 100, "calibrated", 0, rng)
    assert np.allclose(w, moved)


def test_a_mood_adds_what_is_said_to_the_variance_of_scores(rng):
    """drift^2 (n^2 - 1) / (6 n), of a random walk about its own mean."""
    n, drift = 80, 0.5
    moods = np.array([scores.scale("drifting", np.zeros(n), drift, rng) for _ in range(4000)])
    within = moods.var(1).mean()
    assert within == pytest.approx(drift**2 * (n**2 - 1) / (6 * n), rel=0.05)
    assert drift**2 * (n**2 - 1) / (6 * n) == pytest.approx(drift**2 * n / 6, rel=0.001)


def test_what_a_score_is_worth_by_numbers_and_by_measurement(rng):
    """With one feature beside w, the ratio of informations there; and squared angles have it."""
    Phi = rng.normal(size=(3000, 2))
    w = np.array([3.0, 0.0])
    theory = scores.worth(Phi, w, rng)
    # differences of both features are N(0, 2), and independent
    x = np.linspace(-40, 40, 20_001)
    density = np.exp(-x**2 / 36) / math.sqrt(36 * math.pi)
    p = 1 / (1 + np.exp(-x))
    of_comparison = 2 * (p * (1 - p) * density).sum() * (x[1] - x[0])
    assert theory == pytest.approx(1 / scores.LOOK / of_comparison, rel=0.06)
    squares = np.zeros((400, 2))
    for k in range(400):
        some = Phi[rng.integers(0, len(Phi), (2, 300))]
        v = scores.look(some @ w, rng)
        squares[k] = [scores.angle(scores.learn(kind, some, v, "calibrated", 0, rng), w)**2
                      for kind in ("comparisons", "scores")]
    assert squares[:, 0].mean() / squares[:, 1].mean() == pytest.approx(theory, rel=0.2)


def test_the_calibrated_persons_scores_win_and_the_drifting_ones_lose_in_the_end():
    config = scores.Config(drift=1.0)
    rows = [row for seed in range(12) for row in scores.one_person(config, seed)]

    def mean(person, kind):
        return np.mean(scores.values(rows, kind, person=person, answers=320, drift=1.0))
    assert mean("calibrated", "scores") < 0.7 * mean("calibrated", "comparisons")
    assert mean("drifting", "scores") > 1.3 * mean("drifting", "comparisons")
    assert mean("drifting", "differences") < mean("drifting", "comparisons")
    assert mean("hard to please", "scores") > 1.3 * mean("hard to please", "comparisons")


def test_overtaking_is_counted_from_where_comparisons_stay_ahead():
    comparisons, of_scores = (9, 8, 6, 5, 4, 3, 2), (10, 7, 7, 4, 4.5, 4.4, 4.3)
    rows = [{"answers": n, "comparisons": one, "scores": other}
            for n, one, other in zip(scores.COUNTS, comparisons, of_scores)]
    assert scores.overtakes(rows) == 80
    assert scores.overtakes([row | {"scores": 0} for row in rows]) is None


def test_it_leaves_rows_and_a_figure(tmp_path):
    scores.main(scores.Config(drift=0.3, seeds=2, out=str(tmp_path)))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").open()]
    assert {row.get("person") for row in rows} == {*scores.PEOPLE, None}
    assert (tmp_path / "figure.png").stat().st_size > 20_000


@pytest.mark.parametrize("arguments", ["--seeds 1", "--seeds 1001", "--drift -1", "--drift nan",
                                       "--drift 101", "--seed -1"])
def test_a_bad_setting_is_one_line(arguments):
    with pytest.raises(SystemExit) as stopped:
        parse(scores.Config, "", arguments.split())
    message = str(stopped.value)
    assert message.startswith("error: ") and arguments.split()[0] in message
    assert "\n" not in message
