"""The quiz questions of the lectures, each answered by numbers that the code of this repository
computes.

    python experiments/quiz.py          # some 15 s; trains nothing

The questions are those of Stanford's CS234, Winter 2026: L8 and L9 are its Lectures 8 and 9, and a
letter is an option of "which of the following are true?". A policy is a table here, or two letters
that share one parameter, so every expectation is a sum over all that can happen, and its gradient

    grad J = sum_y pi(y) (r(y) - baseline) grad log pi(y)                 (Williams 1992)

is exact. The last four answers are read off finished runs. Where one is missing, the command that
makes it is named, and the question left out.

Reads   runs/reviews/ : SFT policy, pairs, reward model, DPO and PPO runs, if they are there
Writes  runs/quiz/ : results.jsonl, figure.png

Symbols: pi (K,) a policy, r (K,) rewards, J expected reward, p the chance of the letter a.
"""
from __future__ import annotations

import math
import sys
import textwrap
from pathlib import Path
from typing import Callable

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, for the imports below

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

import numpy as np
import torch
import torch.nn.functional as F

import bt
from common import pipeline, tasks
from common.comparisons import DISAGREE, borda, copeland
from common.figures import figure
from common.files import check_writable, read_json_object, write_jsonl
from common.pairs import label_pairs, pair_tensors, read_pairs, split
from common.rewards import all_scores
from common.run import load_run
from common.settings import parse, run_folder, settings
from common.training import device, fingerprint, generator, half_ties
from dpo import dpo_loss
from evaluate import optimal_weights
from model import ScalarModel, generate, response_logprobs, summed_logprobs
from ppo import compute_gae, policy_loss
from reinforce import leave_one_out


@settings
class Config:
    runs: str = "runs/reviews"  # Folder of the finished runs that some answers are read off.
    out: str = ""  # Folder for rows and figure, if not runs/quiz.

    def __post_init__(self) -> None:
        self.out = self.out or run_folder(self, "quiz")


# A question is a function. Its docstring is what the lecture says or asks; it returns whether that
# is true (None: left open), the numbers, why, and what the figure draws of it. Above the numbers
# stands what theory expects of them.

def double(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.double)


def variation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Total variation between two policies."""
    return ((a - b).abs().sum() / 2).item()


# ---- Lecture 8: "Which of the following are true about REINFORCE?" -------------------------------

LOGITS, REWARDS = double([0.5, 0.0, -0.5, -1.0]), double([0.2, 0.9, 0.5, 1.0])  # of four responses
BATCH = 4  # responses that a gradient is estimated from


def gradients(pi: torch.Tensor, r: torch.Tensor,
              baseline: float | str) -> tuple[torch.Tensor, float]:
    """REINFORCE's estimate of the gradient from a batch of responses: its mean (K,) and its
    variance (summed over the K logits), over all K^BATCH batches."""
    batches = torch.cartesian_prod(*[torch.arange(len(pi))] * BATCH)  # (N, BATCH)
    returns = r[batches].flatten()
    if baseline == "leave-one-out":
        advantages = leave_one_out(returns, BATCH)
    else:
        advantages = returns - baseline
    grad_logprobs = torch.eye(len(pi)) - pi  # (K, K): row y is the gradient of log pi(y)
    estimates = (advantages.view(-1, BATCH, 1) * grad_logprobs[batches]).mean(1)  # (N, K)
    chance = pi[batches].prod(1)  # (N,)
    mean = chance @ estimates
    return mean, (chance @ (estimates - mean).square().sum(1)).item()


def optimal_baseline(pi: torch.Tensor, r: torch.Tensor) -> float:
    """The constant of least variance: E[r |g|^2] / E[|g|^2], g = grad log pi."""
    weights = pi * (torch.eye(len(pi)) - pi).square().sum(1)
    return ((weights * r).sum() / weights.sum()).item()


def a_baseline_reduces_variance() -> tuple:
    """L8 quiz (a): Adding a baseline can reduce the variance of the gradient."""
    # expected: one mean; variance none > leave-one-out > mean reward > optimal. A constant added to
    # the rewards: a parabola without a baseline, whose lowest point is the optimum; else nothing
    pi, shifts = LOGITS.softmax(0), np.linspace(-1.5, 0.5, 41)
    baselines = {"none": lambda r: 0.0, "leave-one-out": lambda r: "leave-one-out",
                 "mean reward": lambda r: (pi @ r).item(),
                 "the best constant": lambda r: optimal_baseline(pi, r)}
    means, numbers, curve = [], {}, {"x": shifts}
    for name, of in baselines.items():
        mean, numbers[f"variance, {name}"] = gradients(pi, REWARDS, of(REWARDS))
        means.append(mean)
        curve[name] = [gradients(pi, REWARDS + c, of(REWARDS + c))[1] for c in shifts]
    numbers["the mean gradients differ by"] = (torch.stack(means) - means[0]).abs().max()
    numbers["variance, none, rewards + 10"] = gradients(pi, REWARDS + 10, 0.0)[1]
    return numbers["variance, leave-one-out"] < numbers["variance, none"], numbers, (
        "It takes away what all responses have in common, which tells none from another. \"Can\": "
        "rewards that lie around 0 need none."), curve


LETTER_A = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
TWO_HILLS = double([1, 0, 0, 0.5])  # rewards of aa, ab, ba, bb: letters that agree are good
ONE_HILL = double([0, 1, 1, 0])  # letters that differ are good


def two_letters(theta: torch.Tensor) -> torch.Tensor:
    """log pi of both letters of aa, ab, ba and bb, (4, 2), under a policy with one parameter: a has
    the chance p = sigmoid(theta), whatever came before."""
    return F.logsigmoid(torch.where(LETTER_A, theta, -theta))


def objective(theta: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """J, exactly."""
    return two_letters(theta).sum(1).exp() @ r


def uphill(theta: torch.Tensor, value: torch.Tensor, step_size: float) -> torch.Tensor:
    """One step along the gradient of `value`."""
    gradient, = torch.autograd.grad(value, theta)
    return (theta + step_size * gradient).detach().requires_grad_()


def at(p: float) -> torch.Tensor:
    """The parameter where a has the chance p."""
    return double(math.log(p / (1 - p))).requires_grad_()


def reinforce_finds_the_global_optimum() -> tuple:
    """L8 quiz (b): REINFORCE converges to a global optimum."""
    # expected: J = p^2 + (1 - p)^2 / 2 has a valley at p = 1/3: 0.5 from below it, 1 from above. A
    # table, where grad J = pi (r - J), has none (Mei et al. 2020), and climbs to 1 from both
    numbers = {}
    for p in (0.3, 0.4):
        theta = at(p)
        logits = two_letters(theta).sum(1).detach()
        for _ in range(500):
            theta = uphill(theta, objective(theta, TWO_HILLS), 5.0)
            pi = logits.softmax(0)
            logits = logits + 5 * pi * (TWO_HILLS - pi @ TWO_HILLS)
        numbers[f"J after 500 exact steps from p = {p}, one parameter"] = objective(
            theta, TWO_HILLS)
        numbers[f"J after 500 exact steps from p = {p}, a table"] = logits.softmax(0) @ TWO_HILLS
    thetas = torch.linspace(-5, 5, 101, dtype=torch.double)
    curve = {"x": thetas.tolist(), "J": [objective(theta, TWO_HILLS) for theta in thetas]}
    return min(numbers.values()) > 0.99, numbers, (
        "Where parameters are shared, as in a network, J can have two hills, and the start decides "
        "which of them is climbed. No noise is needed for it."), curve


def a_deterministic_policy_improves() -> tuple:
    """L8 quiz (c): It can start from a suboptimal, deterministic policy and still converge to a
    local optimum."""
    # expected: the gradient falls as exp(-gap), and is 0 at the end
    numbers = {f"|gradient|, one response ahead by {gap:g} nats": gradients(
        double([0, -gap, -gap, -gap]).softmax(0), REWARDS, "leave-one-out")[0].norm()
        for gap in (0, 5, 10, 20, math.inf)}
    return min(numbers.values()) > 0, numbers, (
        "What is never sampled is never reinforced, and the only response that is sampled is as "
        "good as its own average.")


def same_batch(theta: torch.Tensor, step_size: float, steps: int, clip: float) -> torch.Tensor:
    """Several steps with ppo.py's loss on one batch: all four responses, at their chances.

    Args:
        clip: range of the ratio; infinite = not clipped.
    """
    old_logprobs, p = two_letters(theta).detach(), theta.sigmoid().detach()  # (4, 2)
    chance = old_logprobs.sum(1).exp()
    rewards = torch.stack([torch.zeros(4), ONE_HILL], 1)  # (4, 2): it comes with the last letter
    after_first = ONE_HILL.view(2, 2) @ torch.stack([p, 1 - p])  # the value of an a, and of a b
    values = torch.stack([(chance @ ONE_HILL).expand(4), after_first.repeat_interleave(2)], 1)
    mask = torch.ones(4, 2, dtype=torch.bool)
    advantages, _ = compute_gae(rewards, values, mask, gamma=1.0, lam=1.0)
    for _ in range(steps):
        losses, _ = policy_loss(two_letters(theta), old_logprobs, advantages, mask, clip)
        theta = uphill(theta, -(chance @ losses.sum(1)), step_size)
    return theta


def one_step_can_make_it_worse() -> tuple:
    """L8 quiz (d): After one step along the gradient the policy may be worse."""
    # expected, from p = 0.1: J = 2 p (1 - p) is back at 0.18 where p = 0.9, after a step of size
    # 2 log 9 / 0.144 = 30.5. Many small steps on one batch go as far. With clipping they stop where
    # the ratio of b is 0.8: p = 0.28, J = 0.40. The first step has ratio 1: nothing is clipped
    start, sizes = at(0.1), np.logspace(-1, 2, 31)  # ten a decade; number 10 is 1, 20 is 10
    ways = {"1 step": (1, math.inf), "20 steps": (20, math.inf), "20 steps, clipped": (20, 0.2)}
    J_start = objective(start, ONE_HILL)
    numbers, curve = {"J at the start": J_start}, {"x": sizes}
    for name, (steps, clip) in ways.items():
        J = [objective(same_batch(start, size, steps, clip), ONE_HILL) for size in sizes]
        numbers |= {f"{name}: J, size 1": J[10], f"{name}: J, size 10": J[20],
                    f"{name}: smallest size that ends below the start": min(sizes[
                        [value < J_start for value in J]])}
        curve[name] = J
    p = same_batch(start, 10.0, 20, 0.2).sigmoid()
    numbers |= {"20 steps, clipped: ratio of an a, size 10": p / 0.1,
                "20 steps, clipped: ratio of a b, size 10": (1 - p) / 0.9}
    numbers["1 step: clipping changes the parameter by"] = (
        same_batch(start, 40.0, 1, 0.2) - same_batch(start, 40.0, 1, math.inf))
    return min(curve["1 step"]) < J_start, numbers, (
        "The gradient is that of one point, and a long step ends beyond the hill. PPO's clipping "
        "bounds what many steps on a batch add up to. It does not bound the first one, where every "
        "ratio is 1, so it does not save the policy from steps that are far too long."), curve


# ---- Lecture 8: "Assume that the expert's policy is optimal" -------------------------------------

def action_values(P: np.ndarray, R: np.ndarray, discount: float = 0.9) -> np.ndarray:
    """Q (S, A) of the optimal policy, by value iteration. P, R: (S, A, S)."""
    Q = np.zeros(P.shape[:2])
    for _ in range(500):  # 0.9^500 is 1e-23
        Q = (P * (R + discount * Q.max(1))).sum(2)
    return Q


def small_world() -> tuple[np.ndarray, np.ndarray]:
    """P and R, (20, 3, 20), drawn at random. In the last state the episode has ended: nothing
    happens there, for nothing."""
    rng = np.random.default_rng(0)
    P, R = rng.dirichlet(np.full(20, 0.2), (20, 3)), rng.normal(size=(20, 3, 20))
    P[-1], R[-1] = np.eye(20)[-1], 0.0
    return P, R


def a_single_reward_explains_the_expert() -> tuple:
    """L8 quiz: There is a single R that makes the expert's policy optimal."""
    # expected: no action changes with 3 R, R + 2 for ever, or a potential; nearly all do with -R.
    # Some do if the 2 ends with the episode, because then it pays to live long
    P, R = small_world()
    potential = np.append(np.random.default_rng(1).normal(size=19), 0.0)
    alive = np.append(np.ones(19), 0.0)[:, None, None]
    shaping = 0.9 * potential - potential[:, None, None]
    rewards = {"3 R": 3 * R, "R + 2 for ever": R + 2, "R + 0.9 f(s') - f(s)": R + shaping,
               "R + 2 until the episode ends": R + 2 * alive, "-R": -R}
    best = action_values(P, R)[:-1].argmax(1)
    numbers = {f"of 19 states another best action, {name}": np.sum(
        action_values(P, other)[:-1].argmax(1) != best) for name, other in rewards.items()}
    numbers["R = 0: the values of all actions differ by"] = np.ptp(action_values(P, 0 * R))
    r, beta = REWARDS[None], 0.5  # responses to one prompt; pi_ref is uniform
    for name, other in {"r + 2": optimal_weights(r + 2, beta), "3 r": optimal_weights(3 * r, beta),
                        "3 r and 3 beta": optimal_weights(3 * r, 3 * beta)}.items():
        numbers[f"KL penalty: pi* moves by, {name}"] = variation(other, optimal_weights(r, beta))
    return numbers["of 19 states another best action, 3 R"] > 0, numbers, (
        "There are infinitely many: a R + c with a > 0, if c is paid for ever; R with any "
        "potential f (Ng et al. 1999); R = 0. With a KL penalty a matters: a R at beta "
        "is R at beta / a.")


# ---- Bradley-Terry: Lecture 8's slides; Lecture 9: "Select all that are true" --------------------

def bradley_terry_is_transitive() -> tuple:
    """L8, L9 slides: Under Bradley-Terry p_ik is determined by p_ij and p_jk."""
    # expected: odds multiply: 4 * 7/3 = 9.33, p_ik = 9.33 / 10.33 = 0.903
    r = bt.fit_bradley_terry(np.array([[0, 80, 0], [20, 0, 70], [0, 30, 0]]))  # i and k never met
    odds = (0.8 / 0.2) * (0.7 / 0.3)
    numbers = {"p_ij": 0.8, "p_jk": 0.7, "p_ik, from the product of the odds": odds / (1 + odds),
               "p_ik, as bt.py fits it": bt.sigmoid(r[0] - r[2]),
               "Elo points of a unit of strength, 400 / ln 10": 400 / math.log(10),
               "chance to win with 200 Elo points more": bt.sigmoid(200 * math.log(10) / 400)}
    return math.isclose(odds / (1 + odds), bt.sigmoid(r[0] - r[2]), rel_tol=1e-6), numbers, (
        "Strengths add, so odds multiply. Elo is the same model in other units.")


def a_reward_is_learned_from_comparisons() -> tuple:
    """L9 quiz (a), (b): Bradley-Terry expresses the probability that i is selected over j, and a
    reward can be learned from such comparisons."""
    # expected: errors of about 2 / sqrt(2/5 of 100,000) = 0.01
    rng = np.random.default_rng(0)
    r = rng.normal(size=5)
    fitted = bt.fit_bradley_terry(bt.simulate(r, 100_000, rng))
    p, fitted_p = (bt.sigmoid(x[:, None] - x) for x in (r, fitted))
    error = abs(fitted - (r - r.mean())).max()
    numbers = {"largest error of 5 strengths, 100,000 comparisons": error,
               "largest error of P(i beats j)": abs(fitted_p - p).max()}
    return max(numbers.values()) < 0.05, numbers, (
        "Maximum likelihood finds the strengths, up to a constant.")


def a_shift_changes_nothing() -> tuple:
    """L9 quiz (c): The reward can be shifted by any constant without changing the preferences."""
    # expected: the same likelihood
    r, wins = np.array([0.8, 0.1, -0.9]), np.array([[0, 6, 9], [3, 0, 7], [2, 3, 0]])
    numbers = {f"-log likelihood of 30 comparisons, r + {c}": bt.neg_log_likelihood(r + c, wins)
               for c in (0, 10)}
    return np.ptp(list(numbers.values())) < 1e-9, numbers, (
        "Only differences of rewards are in the model.")


def a_scale_changes_nothing() -> tuple:
    """L9 quiz (d): The reward can be multiplied by any constant without changing the
    preferences."""
    # expected: sigmoid(0.7) = 0.668, sigmoid(1.4) = 0.802, sigmoid(-0.7) = 0.332
    numbers = {f"P(1 beats 2), r times {a}": bt.sigmoid(a * 0.8 - a * 0.1) for a in (1, 2, -1)}
    return np.ptp(list(numbers.values())) < 1e-9, numbers, (
        "A constant above 0 keeps the order and changes how often it is seen; one below 0 reverses "
        "it.")


def rankings_are_pairs() -> tuple:
    """L9 slide: A ranking of K outputs, as InstructGPT asks for, gives K (K - 1) / 2 pairs."""
    # expected: 6, 36; 5 where A = B makes no pair
    numbers = {f"pairs of {name}": len(label_pairs(double([r]), "argmax", 1.0, generator(0)))
               for name, r in {"4 outputs": [4, 3, 2, 1], "9 outputs": list(range(9)),
                               "D > C > A = B": [1, 1, 2, 3]}.items()}
    return list(numbers.values())[:2] == [6, 36], numbers, (
        "Any two of them are a comparison, unless they are tied.")


def majority_count(P: np.ndarray) -> np.ndarray:
    """How many others an item beats more often than not, (K,); a draw counts half."""
    return np.sign(P - 0.5).sum(1) / 2 + (len(P) - 1) / 2


def borda_counts_majorities() -> tuple:
    """L9 slide: Borda's score against an item is 1 if P(i beats j) > 0.5."""
    # expected: that count orders the items as Copeland's score does; the mean of P often does not
    rng, same, agrees = np.random.default_rng(0), 0, 0
    for _ in range(1000):
        P = np.triu(rng.random((5, 5)), 1)
        P += np.tril(1 - P.T, -1) + np.eye(5) / 2
        count = majority_count(P)
        same += np.flatnonzero(count == count.max()).tolist() == copeland(P)
        agrees += count[borda(P)[0]] == count.max()
    numbers = {}
    for i, name in enumerate(["A, which beats all three narrowly", "B, which beats two by far"]):
        numbers[f"{name}: majorities"] = majority_count(DISAGREE)[i]
        numbers[f"{name}: mean P"] = (DISAGREE[i].sum() - 0.5) / 3
    numbers |= {"of 1,000 random P, the winners by majorities are Copeland's": same,
                "of 1,000 random P, the winner by mean P is one of them": agrees}
    return same < 1000, numbers, (
        "That is Copeland's score in other units. Borda's is the expected score, the mean of P, as "
        "Lecture 8 words it and common/comparisons.py has it: it sees by how much an item wins.")


# ---- DPO: Lecture 9: "Refresh your understanding" ------------------------------------------------

def dpo_policy(logprobs_of: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor,
               ref_logprobs: torch.Tensor, r: torch.Tensor, pairs: torch.Tensor,
               beta: float) -> torch.Tensor:
    """What dpo.py's loss ends at with endless Bradley-Terry labels: log pi, (K,).

    Args:
        logprobs_of: parameters -> log pi (K,) of all responses; they begin at `start`.
        pairs: (N, 2) responses that are compared.
    """
    a, b = torch.cat([pairs, pairs.flip(1)]).unbind(1)  # each of the two may be the chosen one
    chance = (r[a] - r[b]).sigmoid()
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([parameters], max_iter=500, tolerance_grad=1e-10,
                                  tolerance_change=0, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logprobs = logprobs_of(parameters)
        losses, _, _ = dpo_loss(logprobs[a], logprobs[b], ref_logprobs[a], ref_logprobs[b], beta)
        mean = chance @ losses
        mean.backward()
        return mean

    optimizer.step(loss)
    return logprobs_of(parameters).detach()


def dpo_table(ref_logprobs: torch.Tensor, beta: float) -> torch.Tensor:
    """log pi (4,) of DPO on a table, with all pairs of the four responses."""
    return dpo_policy(lambda logits: logits.log_softmax(0), ref_logprobs, ref_logprobs, REWARDS,
                      torch.combinations(torch.arange(4)), beta)


def both_learn_an_explicit_reward() -> tuple:
    """L9 refresher, 1: RLHF and DPO both learn an explicit representation of a reward model."""
    # expected: beta log pi/pi_ref is r less a constant
    ref_logprobs = LOGITS.log_softmax(0)
    implicit = 0.5 * (dpo_table(ref_logprobs, 0.5) - ref_logprobs)
    numbers = {}
    for i in (1, 2, 3):
        numbers[f"r(y{i}) - r(y0)"] = REWARDS[i] - REWARDS[0]
        numbers[f"DPO's beta log pi/pi_ref, y{i} less y0"] = implicit[i] - implicit[0]
    return not torch.allclose(implicit - implicit[0], REWARDS - REWARDS[0], atol=1e-6), numbers, (
        "RLHF does. DPO trains a policy and nothing else; the reward is implicit, in how far the "
        "policy is from its reference.")


def as_good_as_the_best_example() -> tuple:
    """L9 refresher, 2: RLHF and DPO are at most as good as the best examples in the data."""
    # expected: theta = theta_ref + 1 / beta = 2, p = 0.881: 2 p = 1.76 letters a, p^2 = 0.776
    r, ref_logprobs = double([2, 1, 1, 0]), two_letters(double(0.0)).sum(1)  # r counts the a's
    logprobs = dpo_policy(lambda theta: two_letters(theta).sum(1), double(0.0), ref_logprobs, r,
                          torch.tensor([[1, 3], [2, 3]]), 0.5)  # ab and ba, each against bb
    numbers = {"best reward in the pairs (ab, bb) and (ba, bb)": 1.0,
               "mean reward of DPO": logprobs.exp() @ r,
               "how often it writes aa, which is in no pair": logprobs[0].exp()}
    return numbers["mean reward of DPO"] <= 1, numbers, (
        "What is good in two examples comes together in one that nobody wrote, because the "
        "parameters are shared.")


def dpo_needs_no_reference() -> tuple:
    """L9 refresher, 3: DPO does not use a reference policy."""
    # expected: pi_ref exp(r / beta) / Z for each, so two references end in two policies
    refs = [LOGITS.log_softmax(0), LOGITS.flip(0).log_softmax(0)]
    ends = [dpo_table(ref_logprobs, 0.5).exp() for ref_logprobs in refs]
    theory = [(ref_logprobs + REWARDS / 0.5).softmax(0) for ref_logprobs in refs]
    numbers = {"same pairs, two references: total variation between the ends": variation(*ends),
               "the first end from pi_ref exp(r / beta) / Z": variation(ends[0], theory[0]),
               "the second end from pi_ref exp(r / beta) / Z": variation(ends[1], theory[1])}
    return variation(*ends) < 1e-6, numbers, "It is in the loss, and decides where the policy ends."


# ---- answers that finished runs give -------------------------------------------------------------

def clustered(values: torch.Tensor, groups: torch.Tensor) -> dict[str, float]:
    """Mean of values (N,), and its standard error where those of one of G groups go together:
    sqrt(G / (G - 1) * sum over the groups of (sum of a group's deviations)^2) / N."""
    mean, G = values.mean(), int(groups.max()) + 1
    sums = torch.zeros(G, dtype=values.dtype).index_add(0, groups, values - mean)
    error = (G / (G - 1) * sums.square().sum()).sqrt() / len(values)
    return {"mean": mean.item(), "se": error.item()}


def the_reward_model_is_updated(start: pipeline.Start) -> tuple:
    """L9 quiz (e): In RLHF we update the reward model after each PPO rollout."""
    # expected: the same 16 digits
    config = read_json_object(start.folder / "ppo-beta0.1-seed0/config.json", "built_from")
    model, _ = load_run(start.folder / "reward-model", ScalarModel)
    numbers = {"fingerprint of its weights when PPO began": config["built_from"]["reward"],
               "fingerprint of its weights now": fingerprint(model.state_dict())}
    return len(set(numbers.values())) > 1, numbers, (
        "ppo.py asks it for scores without a gradient (all_scores in common/rewards.py), and has "
        "optimizers for the policy and the value network only.")


def the_implicit_reward_is_as_good(start: pipeline.Start) -> tuple:
    """L9 slide: The DPO implicit reward is as good as the explicit one."""
    # expected: all between a half and what the gold reward gets right of labels with noise
    rows, tensors = read_pairs(start.pairs_file), pair_tensors(start.pairs, start.tokenizer.pad)
    _, held = split(start.pairs, draw=False)
    responses = tuple(x[:, held].flatten(0, 1) for x in tensors)  # (2 N, ...): chosen, rejected
    prompts = [rows[i]["prompt"] for i in held.tolist()]
    groups = torch.tensor([sorted(set(prompts)).index(prompt) for prompt in prompts])  # (N,)

    def right(values: torch.Tensor) -> torch.Tensor:
        """1 where the chosen response has the higher value, (N,); values (2 N,)."""
        return half_ties(*values.view(2, -1)).double()

    gold = torch.tensor([rows[i][f"{side}_reward"] for side in ("chosen", "rejected")
                         for i in held.tolist()])
    model, _ = load_run(start.folder / "reward-model", ScalarModel)
    explicit = right(all_scores(model, responses[0], responses[2]))
    numbers = {"held-out pairs": len(held), "their prompts": len(set(prompts)),
               "labels that the gold reward gets right": clustered(right(gold), groups),
               "labels that the reward model gets right": clustered(explicit, groups)}
    ref_logprobs = summed_logprobs(start.ref, *responses)
    for path in sorted(start.folder.glob("dpo-beta*-seed0/model.pt")):
        config = read_json_object(path.parent / "config.json", "beta", "built_from")
        name = f"dpo-beta{config['beta']:g}-seed0"
        made_of = {"policy": start.policy_id, "pairs": start.pairs_id}
        if path.parent.name == name and config["built_from"] == made_of:
            policy, _ = load_run(path.parent)
            implicit = right(summed_logprobs(policy, *responses) - ref_logprobs)
            numbers[f"{name}, labels that it gets right"] = clustered(implicit, groups)
            numbers[f"{name}, less the reward model"] = clustered(implicit - explicit, groups)
    return None, numbers, (
        "The lecture leaves it open. It is no single number, because every beta has an implicit "
        "reward of its own; a difference of less than two standard errors shows nothing.")


def as_good_as_the_best_of_a_prompt(start: pipeline.Start) -> tuple:
    """L9 refresher, 2, on text: DPO is at most as good as the best response to a prompt in its
    data."""
    # expected: DPO above the best of a prompt's four, below the best of all: no reward is above 1
    best: dict[str, float] = {}
    rows = read_pairs(start.pairs_file)
    for pair in rows:
        higher = max(pair["chosen_reward"], pair["rejected_reward"])
        best[pair["prompt"]] = max(higher, best.get(pair["prompt"], 0.0))
    table = read_json_object(start.folder / "dpo-beta0.1-seed0/evaluation.json", "table")["table"]
    measured = {name: {"mean": line["reward"], "se": line["reward_se"]}
                for name, line in table.items()}
    numbers = {"pairs: the chosen response": np.mean([pair["chosen_reward"] for pair in rows]),
               "pairs: the best of a prompt's responses": np.mean(list(best.values())),
               "pairs: the best of all": max(best.values()),
               "test prompts: best of 4 of the SFT policy": measured["best of 4"],
               "test prompts: DPO beta 0.1": measured["DPO beta 0.1"]}
    most = numbers["pairs: the best of a prompt's responses"]
    return measured["DPO beta 0.1"]["mean"] <= most, numbers, (
        "Mean gold rewards. No pair is of a test prompt: what it has learned is of use where it "
        "has seen no example at all.")


def a_response_has_a_price(start: pipeline.Start) -> tuple:
    """L8, L9 slides: RLHF pays a price where the policy likes a response more than the reference
    does: beta log(pi/pi_ref), token by token."""
    # expected: the tokens add up to the response; some are below 0, and most are near it
    policy, _ = load_run(start.folder / "dpo-beta0.1-seed0")
    tokenizer, prompt = start.tokenizer, tasks.prompts(start.dataset, "test")[0]
    ids = [tokenizer.bos] + tokenizer.encode_batch([prompt])[0]
    sample = generate(policy, [ids], policy.config.block_size, tokenizer.eos, tokenizer.pad,
                      generator(0))[:3]
    with torch.no_grad():
        tokens, ref_tokens = (response_logprobs(model, *(x.to(device()) for x in sample))[0]
                              for model in (policy, start.ref))
    whole = (summed_logprobs(policy, *sample) - summed_logprobs(start.ref, *sample)).item()
    log_ratios, response = tokens - ref_tokens, sample[0][0, len(ids):]
    texts = [tokenizer.decode([i]) or "<eos>" for i in response.tolist()]
    numbers = {"prompt": prompt, "log pi/pi_ref of each token, nats": " ".join(
                   f"{text.replace(' ', '_')} {x:+.2f}" for text, x in zip(texts, log_ratios)),
               "their sum": log_ratios.sum(), "log pi/pi_ref of the response": whole,
               "its price at beta 0.1": 0.1 * whole,
               "tokens": len(texts), "tokens with a price below 0": (log_ratios < 0).sum()}
    return abs(log_ratios.sum() - whole) < 1e-3, numbers, (
        "One response of DPO with beta 0.1. The mean price over its responses is beta times the "
        "KL.")


# ---- the command ---------------------------------------------------------------------------------

ENUMERATED = [
    a_baseline_reduces_variance, reinforce_finds_the_global_optimum,
    a_deterministic_policy_improves, one_step_can_make_it_worse,
    a_single_reward_explains_the_expert, bradley_terry_is_transitive,
    a_reward_is_learned_from_comparisons, a_shift_changes_nothing, a_scale_changes_nothing,
    rankings_are_pairs, borda_counts_majorities, both_learn_an_explicit_reward,
    as_good_as_the_best_example, dpo_needs_no_reference]
FROM_RUNS = {  # and the runs that they read
    the_reward_model_is_updated: ["reward-model", "ppo-beta0.1-seed0"],
    the_implicit_reward_is_as_good: ["reward-model", "dpo-beta0.1-seed0"],
    as_good_as_the_best_of_a_prompt: ["dpo-beta0.1-seed0"],
    a_response_has_a_price: ["dpo-beta0.1-seed0"]}
MADE_BY = {"reward-model": "python reward_model.py", "ppo-beta0.1-seed0": "python ppo.py",
           "dpo-beta0.1-seed0": "python dpo.py --beta 0.1"}


def plain(value: object) -> object:
    """Numbers of six digits, in any nesting of dicts and lists."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, np.ndarray)):
        return [plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        value = value.item()
    return value if isinstance(value, str) else float(f"{value:.6g}")


def asked(question: Callable) -> str:
    return " ".join(question.__doc__.split())


def answer(question: Callable, *arguments: pipeline.Start) -> dict:
    """A question's row of results.jsonl, which is printed, too."""
    true, numbers, why, *curve = question(*arguments)
    lecture, text = asked(question).split(": ", 1)
    found = "open" if true is None else "true" if true else "false"
    row = {"lecture": lecture, "question": text, "answer": found, "numbers": plain(numbers),
           "why": why, **({"curve": plain(curve[0])} if curve else {})}
    print(textwrap.fill(f"\n{lecture}: {text}", 100, replace_whitespace=False))
    print(textwrap.fill(f"{found}. {why}", 100, initial_indent="  ", subsequent_indent="  "))
    for name, value in row["numbers"].items():
        if isinstance(value, dict):
            value = f"{value['mean']:.3f} +- {value['se']:.3f}"
        elif isinstance(value, float):
            value = f"{value:.4g}"
        print(textwrap.fill(f"    {name:62} {value}", 100, subsequent_indent=" " * 8))
    return row


def finished_runs(folder: Path) -> pipeline.Start:
    """The SFT policy and the pairs in a folder of runs."""
    config = read_json_object(folder / "sft/config.json", "dataset", "preset")
    start = pipeline.load(folder / "sft", config["dataset"], config["preset"])
    path = folder / f"pairs-{tasks.load(start.dataset).labels}/pairs.jsonl"
    pipeline.use_pairs(start, read_pairs(path), path)
    return start


def draw(rows: list[dict], path: Path) -> None:
    """The variance with each baseline, the two hills, and J after steps of each size."""
    curves = [row["curve"] for row in rows if "curve" in row]
    with figure(path, 3, width=4.8) as (_, axes):
        for axis, curve in zip(axes, curves):
            for name, values in curve.items():
                if name != "x":
                    axis.plot(curve["x"], values, label=name)
        axes[0].set(xlabel="constant added to the rewards", ylabel="variance of the gradient",
                    title="baselines")
        axes[1].axvline(-math.log(2), color="black", linestyle=":", label="the valley, p = 1/3")
        axes[1].set(xlabel=r"parameter $\theta$", ylabel="expected reward J", title="two hills")
        axes[2].axhline(0.18, color="black", linestyle=":", label="at the start")
        axes[2].set(xscale="log", xlabel="step size", ylabel="expected reward J",
                    title="steps on one batch")
        for axis in axes:
            axis.legend(fontsize=8, framealpha=0.6)


def main(config: Config) -> None:
    """Answer all questions; write the rows and the figure."""
    check_writable(config.out)
    rows = [answer(question) for question in ENUMERATED]
    start = None
    for question, runs in FROM_RUNS.items():
        missing = [run for run in runs if not (Path(config.runs) / run / "model.pt").exists()]
        if missing:
            commands = " and ".join(MADE_BY[run] for run in missing)
            print(f"\n{asked(question)}\n  (needs {commands} first: skipped)")
        else:
            start = start or finished_runs(Path(config.runs))
            rows.append(answer(question, start))
    write_jsonl(Path(config.out) / "results.jsonl", rows)
    draw(rows, Path(config.out) / "figure.png")
    print(f"\nrows and figure  ->  {config.out}")


if __name__ == "__main__":
    main(parse(Config, __doc__))
