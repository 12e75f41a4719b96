"""experiments/quiz.py: every number against a closed form, a sample, or a formula written another way; what finished runs give
against loops over their pairs.
"""
import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch

import dpo
import ppo
import reward_model
from clone import ROOT
from common import pipeline
from common.pairs import split
from common.run import load_run
from common.training import fingerprint
from conftest import naive_logprobs
from experiments import quiz
from model import ScalarModel
from reinforce import leave_one_out

COMMITTED = [json.loads(line) for line in (ROOT / "results/quiz/results.jsonl").read_text().splitlines()]
PI, R = quiz.LOGITS.softmax(0), quiz.REWARDS


@pytest.fixture(scope="module")
def rows():
    """The answers that need no run, by the function that gives them."""
    return {question.__name__: quiz.answer(question) for question in quiz.ENUMERATED}


# ---- the answers -----------------------------------------------------------------------------------------------------

def test_the_answers_are_those_of_the_lectures(rows):
    """As the lectures' solutions have them. The slides' claims are ours to judge: Borda's is not the one that the code uses."""
    assert {name: row["answer"] for name, row in rows.items()} == {
        "a_baseline_reduces_variance": "true", "reinforce_finds_the_global_optimum": "false",
        "a_deterministic_policy_improves": "false", "one_step_can_make_it_worse": "true",
        "a_single_reward_explains_the_expert": "false", "bradley_terry_is_transitive": "true",
        "a_reward_is_learned_from_comparisons": "true", "a_shift_changes_nothing": "true",
        "a_scale_changes_nothing": "false", "rankings_are_pairs": "true", "borda_counts_majorities": "false",
        "both_learn_an_explicit_reward": "false", "as_good_as_the_best_example": "false", "dpo_needs_no_reference": "false"}


def test_the_committed_rows_are_what_the_code_gives(rows):
    """Numbers of rounding size aside; and every answer that needs a run is among them."""
    assert [row["question"] for row in COMMITTED] == [
        quiz.asked(question).split(": ", 1)[1] for question in [*quiz.ENUMERATED, *quiz.FROM_RUNS]]
    for row, committed in zip(rows.values(), COMMITTED):
        assert row["answer"] == committed["answer"] and row["why"] == committed["why"]
        assert row["numbers"] == pytest.approx(committed["numbers"], rel=1e-4, abs=1e-6)


def test_the_page_beside_the_rows_has_their_errors_and_their_answers():
    page = (ROOT / "results/quiz/README.md").read_text(encoding="utf-8")
    measured = [value for row in COMMITTED for value in row["numbers"].values() if isinstance(value, dict)]
    for value in measured:
        if value["se"] > 0.002:  # the others are named without
            assert f"{value['mean']:.3f} ± {value['se']:.3f}" in page, value
    assert len(measured) == 12
    table = [line.split(" | ") for line in page.splitlines() if line.startswith("| L")]
    assert sorted(cells[2] for cells in table) == sorted(row["answer"] for row in COMMITTED)


# ---- policy gradients ------------------------------------------------------------------------------------------------

def test_the_variance_of_a_batch_is_that_of_one_response_by_its_size_and_with_leave_one_out_a_u_statistics():
    """With a constant b: tr Var[(r - b) g] / n. Leave-one-out is a mean over pairs of responses, a U-statistic, whose variance
    Hoeffding (1948) has: 2 / (n (n - 1)) (2 (n - 2) zeta_1 + zeta_2)."""
    n, g = quiz.BATCH, torch.eye(4) - PI
    for b in (0.0, 0.3, (PI @ R).item(), quiz.optimal_baseline(PI, R)):
        terms = (R - b)[:, None] * g
        mean = PI @ terms
        found, variance = quiz.gradients(PI, R, b)
        torch.testing.assert_close(found, PI * (R - PI @ R))  # the gradient of J
        torch.testing.assert_close(found, mean)
        assert variance == pytest.approx((PI @ (terms - mean).square().sum(1)).item() / n)
    # U-statistic with the kernel h(y, z) = (r_y - r_z)(g_y - g_z) / 2
    kernel = (R[:, None] - R)[:, :, None] * (g[:, None] - g) / 2
    mean, first = torch.einsum("y,z,yzk->k", PI, PI, kernel), torch.einsum("z,yzk->yk", PI, kernel)
    zeta_1 = (PI @ (first - mean).square().sum(1)).item()
    zeta_2 = torch.einsum("y,z,yz->", PI, PI, (kernel - mean).square().sum(2)).item()
    expected = (2 / (n * (n - 1))) * (2 * (n - 2) * zeta_1 + zeta_2)
    found, variance = quiz.gradients(PI, R, "leave-one-out")
    torch.testing.assert_close(found, PI * (R - PI @ R))
    assert variance == pytest.approx(expected)


def test_the_optimal_baseline_is_the_lowest_point_of_the_parabola():
    best = quiz.optimal_baseline(PI, R)
    lowest, *others = [quiz.gradients(PI, R, best + shift)[1] for shift in (0, -0.2, -0.01, 0.01, 0.2)]
    assert all(lowest < other for other in others)
    assert others[0] == pytest.approx(others[3])


def test_sampled_batches_have_the_enumerated_mean_and_variance():
    draw = torch.Generator().manual_seed(0)
    responses = torch.multinomial(PI, 40_000 * quiz.BATCH, replacement=True, generator=draw)
    advantages = leave_one_out(R[responses], quiz.BATCH)
    estimates = (advantages[:, None] * (torch.eye(4) - PI)[responses]).view(-1, quiz.BATCH, 4).mean(1)
    mean, variance = quiz.gradients(PI, R, "leave-one-out")
    assert (estimates.mean(0) - mean).norm() < 4 * math.sqrt(variance / 40_000)
    assert estimates.var(0).sum().item() == pytest.approx(variance, rel=0.03)


def test_the_two_letters_are_independent_and_their_hill_and_valley_where_algebra_has_them():
    for p in (0.1, 1 / 3, 0.9):
        theta = quiz.at(p)
        pi = quiz.two_letters(theta).sum(1).exp()
        torch.testing.assert_close(pi, quiz.double([p * p, p * (1 - p), (1 - p) * p, (1 - p) ** 2]))
        J = quiz.objective(theta, quiz.TWO_HILLS)
        assert J.item() == pytest.approx(p * p + (1 - p) ** 2 / 2)
        slope, = torch.autograd.grad(J, theta)
        assert slope.item() == pytest.approx((3 * p - 1) * p * (1 - p), abs=1e-12)


def test_the_hill_that_is_climbed_is_decided_by_the_valley_at_one_third(rows):
    numbers = rows["reinforce_finds_the_global_optimum"]["numbers"]
    low, table, high, other_table = numbers.values()
    assert low == pytest.approx(0.5, abs=1e-3) and min(table, high, other_table) > 0.999


def test_the_gradient_of_a_nearly_deterministic_policy_falls_as_the_chance_of_the_others(rows):
    *norms, last = rows["a_deterministic_policy_improves"]["numbers"].values()
    assert norms[3] / norms[2] == pytest.approx(math.exp(-10), rel=1e-3) and last == 0


def test_a_first_step_is_the_gradient_clipped_or_not_and_comes_back_down_at_30():
    """theta + eta 0.144; J is at its start again where p = 0.9."""
    start, limit = quiz.at(0.1), 2 * math.log(9) / 0.144
    for clip in (0.2, math.inf):
        moved = quiz.same_batch(start, 2.0, 1, clip) - start
        assert moved.item() == pytest.approx(2.0 * 0.144)
    J = [quiz.objective(quiz.same_batch(start, size, 1, 0.2), quiz.ONE_HILL).item() for size in (limit - 0.1, limit + 0.1)]
    assert J[0] > 0.18 > J[1]


def test_many_small_clipped_steps_end_where_the_ratio_of_b_is_at_the_clip():
    """p = 1 - 0.8 * 0.9; without clipping p goes to 1."""
    start = quiz.at(0.1)
    assert quiz.same_batch(start, 1.0, 400, 0.2).sigmoid().item() == pytest.approx(0.28, abs=0.02)
    assert quiz.same_batch(start, 1.0, 400, math.inf).sigmoid().item() > 0.99


def test_the_ratios_of_both_letters_are_those_of_one_policy(rows):
    """0.1 a + 0.9 b = 1, and the b is near its clip."""
    numbers = rows["one_step_can_make_it_worse"]["numbers"]
    a, b = (numbers[f"20 steps, clipped: ratio of {letter}, size 10"] for letter in ("an a", "a b"))
    assert 0.1 * a + 0.9 * b == pytest.approx(1, rel=1e-5) and b == pytest.approx(0.8, abs=0.02)
    assert 2 * 0.1 * a * 0.9 * b == pytest.approx(numbers["20 steps, clipped: J, size 10"], rel=1e-5)


# ---- rewards of an expert --------------------------------------------------------------------------------------------

def test_value_iteration_has_the_values_of_the_best_of_all_policies():
    """A world of 4 states and 2 actions: each of the 8 policies solved as a linear system."""
    rng = np.random.default_rng(0)
    P, reward = rng.dirichlet(np.ones(4), (4, 2)), rng.normal(size=(4, 2, 4))
    P[-1], reward[-1] = np.eye(4)[-1], 0
    values = []
    for policy in itertools.product((0, 1), repeat=3):
        chosen = np.arange(4), np.array([*policy, 0])
        values.append(np.linalg.solve(np.eye(4) - 0.9 * P[chosen], (P[chosen] * reward[chosen]).sum(1)))
    assert quiz.action_values(P, reward).max(1) == pytest.approx(np.max(values, axis=0))


def test_scaled_shifted_and_shaped_rewards_have_the_values_that_theory_says():
    """a Q; Q + c / (1 - 0.9); Q - f."""
    P, reward = quiz.small_world()
    Q, f = quiz.action_values(P, reward), np.random.default_rng(3).normal(size=20)
    assert P.sum(2) == pytest.approx(np.ones((20, 3)))
    assert quiz.action_values(P, 3 * reward) == pytest.approx(3 * Q)
    assert quiz.action_values(P, reward + 2) == pytest.approx(Q + 20)
    assert quiz.action_values(P, reward + 0.9 * f - f[:, None, None]) == pytest.approx(Q - f[:, None])


def test_some_rewards_leave_the_expert_and_some_do_not(rows):
    scaled, shifted, shaped, alive, reversed_, zero, *kl = rows["a_single_reward_explains_the_expert"]["numbers"].values()
    assert scaled == shifted == shaped == zero == 0 and alive > 0 and reversed_ > 10
    assert kl[0] < 1e-12 and kl[2] < 1e-12
    r = quiz.REWARDS
    expected = ((3 * r / 0.5).softmax(0) - (r / 0.5).softmax(0)).abs().sum() / 2
    assert kl[1] == pytest.approx(expected.item(), rel=1e-5)


# ---- Bradley-Terry ---------------------------------------------------------------------------------------------------

def test_the_numbers_of_bradley_terry_are_the_closed_forms(rows):
    numbers = list(rows["bradley_terry_is_transitive"]["numbers"].values())
    assert numbers == pytest.approx([0.8, 0.7, 28 / 31, 28 / 31, 173.718, 1 / (1 + 10 ** -0.5)], rel=1e-5)
    assert max(rows["a_reward_is_learned_from_comparisons"]["numbers"].values()) < 0.02
    assert len(set(rows["a_shift_changes_nothing"]["numbers"].values())) == 1
    once, twice, minus = rows["a_scale_changes_nothing"]["numbers"].values()
    odds = once / (1 - once)
    assert twice / (1 - twice) == pytest.approx(odds ** 2, rel=1e-5) and minus == pytest.approx(1 - once, rel=1e-5)
    assert list(rows["rankings_are_pairs"]["numbers"].values()) == [6, 36, 5]


def test_a_majority_count_is_copelands_score_in_other_units(rows):
    """(victories - defeats + K - 1) / 2; counted in a loop. A Condorcet winner has all of them."""
    for P in (quiz.DISAGREE, np.array([[0.5, 0.7, 0.5], [0.3, 0.5, 0.1], [0.5, 0.9, 0.5]])):
        for i, count in enumerate(quiz.majority_count(P)):
            others = [P[i, j] for j in range(len(P)) if j != i]
            assert count == sum(1.0 if p > 0.5 else 0.5 if p == 0.5 else 0.0 for p in others)
    a, mean_a, b, mean_b, same, agrees = rows["borda_counts_majorities"]["numbers"].values()
    assert (a, b) == (3, 2) and mean_a == pytest.approx(0.51) and mean_b == pytest.approx((0.49 + 2 * 0.95) / 3, rel=1e-5)
    assert same == 1000 and 500 < agrees < 1000


# ---- DPO -------------------------------------------------------------------------------------------------------------

def test_dpo_on_a_table_ends_at_its_optimum_and_two_letters_put_together_what_no_pair_has(rows):
    ref_logprobs = quiz.LOGITS.log_softmax(0)
    expected = (ref_logprobs + R / 0.3).log_softmax(0)
    torch.testing.assert_close(quiz.dpo_table(ref_logprobs, 0.3), expected, rtol=1e-6, atol=1e-6)
    implicit = list(rows["both_learn_an_explicit_reward"]["numbers"].values())
    assert implicit[::2] == pytest.approx(implicit[1::2], rel=1e-5)
    p = 1 / (1 + math.exp(-2))  # theta = 1 / beta
    best, reward, both = rows["as_good_as_the_best_example"]["numbers"].values()
    assert best == 1 and reward == pytest.approx(2 * p, rel=1e-5) and both == pytest.approx(p * p, rel=1e-5)
    moved, first, second = rows["dpo_needs_no_reference"]["numbers"].values()
    assert moved > 0.1 and max(first, second) < 1e-6


# ---- finished runs ---------------------------------------------------------------------------------------------------

def test_a_clustered_error_is_that_of_group_means_where_groups_are_alike_and_the_plain_one_without_groups():
    x = torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    found = quiz.clustered(x, torch.arange(60) // 6)
    means = x.view(10, 6).mean(1)
    assert found == pytest.approx({"mean": x.mean().item(), "se": means.std().item() / math.sqrt(10)})
    assert quiz.clustered(x, torch.arange(60))["se"] == pytest.approx(x.std().item() / math.sqrt(60))
    copies = quiz.clustered(means.repeat_interleave(6), torch.arange(60) // 6)
    assert copies == pytest.approx(found)  # six copies say no more than one


@pytest.fixture(scope="module")
def runs(small_reviews_folder, sft_run, tmp_path_factory):
    """A folder of small finished runs, as the commands that the script names would make them."""
    import data.reviews
    from common import tasks
    from conftest import smaller
    folder = tmp_path_factory.mktemp("work") / "runs"
    shutil.copytree(sft_run, folder / "sft")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "prepared", lambda dataset: small_reviews_folder)
        patch.setattr(data.reviews, "TASK", smaller(data.reviews.TASK, pair_prompts=40))
        short = dict(sft=str(folder / "sft"), warmup=1, batch_size=8, epochs=0.3)
        dpo.train(dpo.Config(**short, out=str(folder / "dpo-beta0.1-seed0")))
        reward_model.train(reward_model.Config(**short, out=str(folder / "reward-model")))
        ppo.train(ppo.Config(sft=str(folder / "sft"), reward=str(folder / "reward-model"), steps=2, batch_size=8, warmup=1,
                             out=str(folder / "ppo-beta0.1-seed0")))
    return folder


def answers(folder, out, capsys):
    quiz.main(quiz.Config(runs=str(folder), out=str(out)))
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return rows, capsys.readouterr().out


def test_answers_from_finished_runs_are_those_of_loops_over_their_pairs(runs, small_reviews, tmp_path, capsys):
    rows, said = answers(runs, tmp_path, capsys)
    assert (tmp_path / "figure.png").stat().st_size > 10_000 and "skipped" not in said
    frozen, implicit, best, price = [row["numbers"] for row in rows[-4:]]
    assert [row["answer"] for row in rows[-4:-2]] == ["false", "open"] and rows[-1]["answer"] == "true"

    reward, _ = load_run(runs / "reward-model", ScalarModel)
    assert list(frozen.values()) == [fingerprint(reward.state_dict())] * 2

    pairs = [json.loads(line) for line in (runs / "pairs-bt/pairs.jsonl").read_text().splitlines()]
    start = quiz.finished_runs(runs)
    policy, _ = load_run(runs / "dpo-beta0.1-seed0")
    _, held = split(start.pairs, draw=False)
    right = {"gold": [], "reward model": [], "DPO": []}
    with torch.no_grad():
        for i in held.tolist():
            prompt, *responses = start.pairs[i]
            scores = [reward.score(torch.tensor([prompt + y]), torch.tensor([len(prompt + y)])).item() for y in responses]
            ratios = [sum((naive_logprobs(policy, prompt, y) - naive_logprobs(start.ref, prompt, y)).tolist())
                      for y in responses]
            gold = [pairs[i]["chosen_reward"], pairs[i]["rejected_reward"]]
            for name, (a, b) in zip(right, (gold, scores, ratios)):
                right[name].append((a > b) + (a == b) / 2)
    assert implicit["held-out pairs"] == len(held) > 6
    found = [value["mean"] for value in implicit.values() if isinstance(value, dict)]
    expected = [np.mean(values) for values in right.values()]
    assert found == pytest.approx([*expected, expected[2] - expected[1]], abs=1e-5)

    highest = {}
    for pair in pairs:
        highest.setdefault(pair["prompt"], []).extend([pair["chosen_reward"], pair["rejected_reward"]])
    assert best["pairs: the best of a prompt's responses"] == pytest.approx(
        np.mean([max(values) for values in highest.values()]), rel=1e-5)
    table = json.loads((runs / "dpo-beta0.1-seed0/evaluation.json").read_text())["table"]
    assert best["test prompts: DPO beta 0.1"]["mean"] == pytest.approx(table["DPO beta 0.1"]["reward"], rel=1e-5)

    each = [float(x) for x in price["log pi/pi_ref of each token, nats"].split()[1::2]]
    assert len(each) == price["tokens"] and price["tokens with a price below 0"] <= len(each)
    assert sum(each) == pytest.approx(price["their sum"], abs=0.005 * len(each) + 1e-6)
    assert price["its price at beta 0.1"] == pytest.approx(0.1 * price["log pi/pi_ref of the response"], rel=1e-4)


def test_without_runs_it_names_the_commands_that_make_them_and_answers_the_rest(tmp_path, capsys, monkeypatch):
    def never(*_):
        raise AssertionError("nothing is trained or sampled")
    for name in ("sft_policy", "sampled_pairs", "sample_bank", "stage"):
        monkeypatch.setattr(pipeline, name, never)
    rows, said = answers(tmp_path / "runs", tmp_path / "out", capsys)
    assert len(rows) == len(quiz.ENUMERATED)
    for command in ("python dpo.py --beta 0.1", "python reward_model.py", "python ppo.py"):
        assert f"{command} first: skipped" in said or f"{command} and " in said
    assert said.count("skipped") == 4


def test_a_folder_that_cannot_be_written_stops_it_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="^error: .*file/below: cannot be written"):
        quiz.main(quiz.Config(out=str(tmp_path / "file/below")))
    assert quiz.Config().out == "runs/quiz"
