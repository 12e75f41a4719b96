"""derive.py: both sides of every step agree, the numbers are those of a slow computation, and finite pairs cost what the
Fisher information says."""
import io
import math
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

import derive
from derive import (Config, all_pairs, has_optimum, kl_divergence, minimise, optimum, policy_by_dpo, preference,
                    reward_by_bradley_terry, sample_wins)

PAGE = Path(__file__).resolve().parents[1] / "docs" / "course" / "4-dpo.md"
REF = torch.tensor(derive.REFERENCE, dtype=torch.double).log()
REWARD = torch.tensor(derive.REWARD, dtype=torch.double)


@pytest.fixture(scope="module")
def printed():
    """printed(beta, seed): what the command prints, without the finite pairs unless there are draws of them."""
    def run(beta=0.5, seed=0, draws=0):
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
            patch.setattr(derive, "DRAWS", draws)
            derive.main(Config(beta=beta, seed=seed))
        return out.getvalue()
    return run


@pytest.mark.parametrize("beta, seed", [(0.5, 0), (0.05, 1), (0.1, 2), (5.0, 3)])
def test_both_sides_of_every_step_agree(printed, beta, seed):
    text = printed(beta, seed)
    differences = [float(x) for x in re.findall(r"difference (\d\S+)", text)]
    assert len(differences) == 11 and max(differences) < 1e-12
    roads = [float(x) for x in re.findall(r"ends within (\S+) of pi\*", text)]
    assert len(roads) == 3 and max(roads) < 1e-9
    assert "above pi* are 0" in text
    for number in range(1, 11):
        assert f"\n({number}) " in text


def test_the_numbers_are_those_of_a_slow_computation(printed):
    beta, ref, r = 0.5, derive.REFERENCE, derive.REWARD
    Z = sum(p * math.exp(x / beta) for p, x in zip(ref, r))
    best = [p * math.exp(x / beta) / Z for p, x in zip(ref, r)]
    J = sum(q * x for q, x in zip(best, r)) - beta * sum(q * math.log(q / p) for q, p in zip(best, ref))
    loss = [[-math.log(1 / (1 + math.exp(b - a))) / (1 + math.exp(b - a)) for b in r if b != a] for a in r]
    text = printed()
    for number in f"= {Z:.6f}", f"= {J:+.6f}", f"least is {min(best):.4f}", f"= {sum(map(sum, loss)) / 15:+.6f}":
        assert number in text, number
    for name, q in zip(derive.RESPONSES, best):
        assert re.search(rf"{re.escape(name)} +{q:.3f} ", text), name


def test_the_roads_agree_for_any_finite_pairs():
    """Where the reward that is likeliest exists, its optimum is the policy with the least DPO loss, whatever the pairs."""
    draw = torch.Generator().manual_seed(0)
    for pairs in (60, 200):
        wins = sample_wins(REF, REWARD, pairs, draw)
        assert wins.sum() == pairs and has_optimum(wins, 6)
        other = optimum(REF, reward_by_bradley_terry(wins, 6), 0.1)
        torch.testing.assert_close(policy_by_dpo(REF, wins, 0.1).exp(), other.exp(), rtol=0, atol=1e-9)


def test_finite_pairs_cost_what_the_fisher_information_says():
    """The errors of the rewards have the covariance I^+ / pairs, where I is the information of one pair, so the mean of
    beta KL(pi || pi*) is tr(C I^+) / (2 beta pairs), where C is the covariance of an indicator of each response under pi*."""
    beta, pairs, draws = 0.5, 10_000, 60
    A, B = all_pairs(6)
    met = (REF[A] + REF[B]).exp()  # each unordered pair twice
    met = met / met.sum()
    p = preference(REWARD)
    information = torch.zeros(6, 6, dtype=torch.double)
    for a, b, weight in zip(A, B, met * p * (1 - p)):
        information[a, a] += weight
        information[b, b] += weight
        information[a, b] -= weight
        information[b, a] -= weight
    best = optimum(REF, REWARD, beta).exp()
    C = best.diag() - best.outer(best)
    expected = (C @ torch.linalg.pinv(information, hermitian=True)).trace() / (2 * beta * pairs)

    draw = torch.Generator().manual_seed(1)
    regrets = torch.stack([beta * kl_divergence(policy_by_dpo(REF, sample_wins(REF, REWARD, pairs, draw), beta), best.log())
                           for _ in range(draws)])
    assert abs(regrets.mean() - expected) < 3 * regrets.std() / math.sqrt(draws)


def test_where_there_is_no_optimum():
    A, B = all_pairs(3)

    def wins(*won):
        return torch.tensor([float((a, b) in won) for a, b in zip(A.tolist(), B.tolist())])
    assert has_optimum(wins((0, 1), (1, 2), (2, 0)), 3)  # a cycle
    assert not has_optimum(wins((0, 1), (0, 2), (1, 2), (2, 1)), 3)  # 0 never lost
    assert not has_optimum(wins((0, 1), (1, 0)), 3)  # 2 never met the others


def test_newton_says_so_if_it_has_not_converged():
    with pytest.raises(ArithmeticError, match="Newton"):  # no minimum: its slope is never 0
        minimise(lambda x: (x**3 + x).sum(), torch.zeros(1, dtype=torch.double))


def test_the_course_shows_what_it_prints(printed):
    """The block in the page is the whole output, but for `...` and for the differences, which are rounding."""
    def plain(text):
        return re.sub(r"(difference|within) \S+|\d+e-\d\d", "~", text)
    lines = plain(printed(draws=derive.DRAWS)).splitlines()
    block = next(b for b in re.findall(r"```text\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
                 if b.startswith("Prompt 'The film was'"))
    at = 0
    for line in plain(block).splitlines():
        if line.strip() != "...":
            assert line in lines[at:], line
            at = lines.index(line, at) + 1
