"""The derivation of DPO, from the objective of RLHF to the loss of dpo.py: every step with its two
sides as numbers.

    maximise over pi   J(pi) = E_{y ~ pi}[ r(y) ] - beta KL( pi || pi_ref )                (Eq. 3)
    ends in            L(pi) = - E_{(y_w, y_l)} log sigmoid( beta log pi(y_w)/pi_ref(y_w)
                                                           - beta log pi(y_l)/pi_ref(y_l) )  (Eq. 7)

(Rafailov et al. 2023, section 4 and appendix A; the slides of lectures 8 and 9.) Here there is one
prompt and six responses, so every expectation is a sum of six terms, and nothing is sampled or
estimated. A derivation is a chain of equations; whoever believes a step may skip it, and whoever
does not can change the numbers and look.

    python derive.py                 # five seconds
    python derive.py --beta 0.1      # a small beta: the optimum is nearly one response
    python derive.py --seed 1        # another policy to try the steps on

The last part leaves the derivation and asks what it promises. Three roads lead to the same policy:
DPO's loss, a fitted reward and then Eq. 4, and ascent of the objective. And pairs are finite: how
far from the optimum does that leave a policy that can represent anything?

Differs from dpo.py: no network and no tokens. A policy is one logit for each response, every step
is exact, and the minimum is found to the last digits. The losses are those of dpo.py and
reward_model.py.

Symbols: pi, ref, optimal = pi, pi_ref, pi*, as log-probabilities (..., responses); r rewards
(..., responses); A, B = all ordered pairs of different responses. KL and log Z are in nats. The
prompt x is left out: every line holds for each prompt by itself.
"""
from __future__ import annotations

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

import math
from typing import Callable

import torch

from common.settings import parse, require, require_numbers, settings
from common.statistics import mean_se
from dpo import dpo_loss
from reward_model import reward_loss

PROMPT = "The film was"
RESPONSES = [" superb.", " good.", " fine.", " long.", " dull.", " awful."]
REFERENCE = [0.05, 0.30, 0.20, 0.15, 0.20, 0.10]  # pi_ref: what the policy says before it learns
REWARD = [1.0, 0.7, 0.4, -0.1, -0.6, -1.0]
DRAWS = 20  # sets of finite pairs, over which their error is averaged


@settings
class Config:
    beta: float = 0.5  # Weight of the KL to the reference: small = far from it.
    seed: int = 0  # Seed of the policy that the steps are tried on, and of the finite pairs.

    def __post_init__(self) -> None:
        require_numbers(self, above_0="beta", from_0="seed")
        require(0.01 <= self.beta <= 10, f"--beta {self.beta}: must be from 0.01 to 10")


# ---- the mathematics, exactly --------------------------------------------------------------------

def kl_divergence(logprobs: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(p || q) = sum_y p(y) (log p(y) - log q(y)) in nats, (...), of log p and log q (...,
    responses)."""
    return (logprobs.exp() * (logprobs - other)).sum(-1)


def objective(logprobs: torch.Tensor, ref: torch.Tensor, r: torch.Tensor,
              beta: float) -> torch.Tensor:
    """J(pi) = E[r] - beta KL(pi || pi_ref), (...): what RLHF maximises, Eq. 3."""
    return (logprobs.exp() * r).sum(-1) - beta * kl_divergence(logprobs, ref)


def log_partition(ref: torch.Tensor, r: torch.Tensor, beta: float) -> torch.Tensor:
    """log Z = log sum_y pi_ref(y) exp(r(y) / beta), (..., 1)."""
    return torch.logsumexp(ref + r / beta, -1, keepdim=True)


def optimum(ref: torch.Tensor, r: torch.Tensor, beta: float) -> torch.Tensor:
    """log pi* = log of pi_ref exp(r / beta) / Z, (..., responses), Eq. 4."""
    return ref + r / beta - log_partition(ref, r, beta)


def all_pairs(responses: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two sides A and B of all ordered pairs of different responses, (P,) each."""
    return (~torch.eye(responses, dtype=torch.bool)).nonzero(as_tuple=True)


def preference(r: torch.Tensor) -> torch.Tensor:
    """How often an annotator with rewards r prefers A to B, (..., P): Bradley-Terry."""
    A, B = all_pairs(r.shape[-1])
    return torch.sigmoid(r[..., A] - r[..., B])


# ---- the three roads -----------------------------------------------------------------------------

def minimise(loss: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor) -> torch.Tensor:
    """Where a convex loss is least, from `start`: Newton's method, to a gradient of 1e-13. Raises
    ArithmeticError if it does not get there.

    A constant added to all logits or rewards of a prompt changes nothing, so the Hessian has flat
    directions; the pseudo-inverse leaves them alone.
    """
    x = start.clone()
    for _ in range(100):
        x.requires_grad_()
        gradient = torch.autograd.grad(loss(x), x)[0].flatten()
        if gradient.abs().max() < 1e-13:
            return x.detach()
        x = x.detach()
        hessian = torch.autograd.functional.hessian(loss, x).view(x.numel(), x.numel())
        step = torch.linalg.pinv(hessian, rtol=1e-9, hermitian=True) @ gradient
        x = x - step.view(start.shape)
    raise ArithmeticError(f"Newton's method: a gradient of {gradient.abs().max():.0e} is left")


def policy_by_dpo(ref: torch.Tensor, wins: torch.Tensor, beta: float) -> torch.Tensor:
    """log pi (..., responses) with the least DPO loss, Eq. 7.

    Args:
        wins: (..., P) how often A won over B, as counts or as chances.
    """
    A, B = all_pairs(ref.shape[-1])

    def loss(logits: torch.Tensor) -> torch.Tensor:
        logprobs = logits.log_softmax(-1)
        losses, _, _ = dpo_loss(logprobs[..., A], logprobs[..., B], ref[..., A], ref[..., B], beta)
        return (wins * losses).sum() / wins.sum()

    return minimise(loss, ref).log_softmax(-1)


def reward_by_bradley_terry(wins: torch.Tensor, responses: int) -> torch.Tensor:
    """The rewards (..., responses) under which these wins (..., P) are likeliest, Eq. 2; their mean
    is 0, because the likelihood does not see a constant."""
    A, B = all_pairs(responses)

    def loss(r: torch.Tensor) -> torch.Tensor:
        return (wins * reward_loss(r[..., A], r[..., B])).sum() / wins.sum()

    r = minimise(loss, torch.zeros(*wins.shape[:-1], responses, dtype=wins.dtype))
    return r - r.mean(-1, keepdim=True)


def policy_by_ascent(ref: torch.Tensor, r: torch.Tensor, beta: float) -> torch.Tensor:
    """log pi (..., responses) after gradient ascent of J, from the reference.

    The gradient is the natural one: that of J with respect to log pi, whose direction is r - beta
    log pi/pi_ref. It halves the distance to the optimum at every step; the plain gradient is as
    exact, but slow where pi is near 0.
    """
    logits = ref.clone()
    for _ in range(60):
        logprobs = logits.log_softmax(-1)
        logits = logits + 0.5 / beta * (r - beta * (logprobs - ref))
    return logits.log_softmax(-1)


# ---- finite pairs --------------------------------------------------------------------------------

def sample_wins(ref: torch.Tensor, r: torch.Tensor, pairs: int,
                draw: torch.Generator) -> torch.Tensor:
    """How often A won over B, (P,), in so many pairs: both responses drawn from pi_ref until they
    differ, and labelled by Bradley-Terry."""
    A, B = all_pairs(len(ref))
    chance = (ref[A] + ref[B]).exp() * preference(r)  # of drawing this pair with this winner
    drawn = chance.multinomial(pairs, replacement=True, generator=draw)
    return drawn.bincount(minlength=len(A)).to(r)


def has_optimum(wins: torch.Tensor, responses: int) -> bool:
    """Whether the likelihood of these wins has a maximum: from every response a chain of wins leads
    to every other. If not, the rewards of some grow without end, and so does DPO's margin."""
    A, B = all_pairs(responses)
    won = torch.eye(responses, dtype=wins.dtype)
    won[A, B] = (wins > 0).to(wins)
    return bool((torch.matrix_power(won, responses) > 0).all())


# ---- what is printed -----------------------------------------------------------------------------

def show(left: str, left_value: float, right: str, right_value: float) -> None:
    """Both sides of a step, and their difference."""
    print(f"      {left:42} = {left_value:+.6f}")
    print(f"      {right:42} = {right_value:+.6f}"
          f"     difference {abs(left_value - right_value):.0e}")


def print_derivation(ref: torch.Tensor, r: torch.Tensor, beta: float,
                     draw: torch.Generator) -> None:
    """The ten steps from Eq. 3 to Eq. 7, each with both sides."""
    logits = torch.randn(len(r), generator=draw, dtype=torch.double)
    logprobs = logits.log_softmax(0)  # log pi of a policy of no merit: the steps hold for any

    def mean(values: torch.Tensor) -> float:
        """E_{y ~ pi} of the values of the responses."""
        return (logprobs.exp() * values).sum().item()

    kl = kl_divergence(logprobs, ref).item()
    J = objective(logprobs, ref, r, beta).item()
    log_ratio = logprobs - ref
    log_Z = log_partition(ref, r, beta).item()
    optimal = optimum(ref, r, beta)
    kl_to_optimal = kl_divergence(logprobs, optimal).item()

    print(f"Prompt {PROMPT!r}, six responses, beta = {beta:g}. pi is a policy drawn at random: the "
          "steps\nhold for any. E means: sum over the responses y of pi(y) times what stands in "
          "brackets.\n")
    print(f"      {'response y':12}{'pi_ref':>8}{'r':>8}{'pi':>8}{'r - beta log pi/pi_ref':>26}")
    for name, *row in zip(RESPONSES, ref.exp(), r, logprobs.exp(), r - beta * log_ratio):
        print(f"      {name:12}{row[0]:8.3f}{row[1]:8.2f}{row[2]:8.3f}{row[3]:26.3f}")

    print("\n(1) RLHF wants a high reward near the reference: maximise J (Eq. 3)")
    print(f"      J(pi) = E[r] - beta KL(pi || pi_ref) = {mean(r):.4f} - {beta:g} x {kl:.4f} = "
          f"{J:+.6f}")
    print("(2) the KL is an expectation under pi, too, so both go under one")
    show("E[r] - beta KL(pi || pi_ref)", J,
         "E[r - beta log pi/pi_ref]", mean(r - beta * log_ratio))
    print("(3) divide by -beta: the largest J is where this is least, so max becomes min")
    show("-J / beta", -J / beta,
         "E[log pi/pi_ref - r / beta]", mean(log_ratio - r / beta))
    print("(4) r / beta = log exp(r / beta), and then there is one logarithm")
    show("E[log pi/pi_ref - r / beta]", mean(log_ratio - r / beta),
         "E[log pi/(pi_ref exp(r / beta))]", mean((logprobs.exp() / (ref + r / beta).exp()).log()))

    print("(5) what stands below is no distribution, because it does not sum to 1. Its sum is")
    Z = (ref + r / beta).exp().sum().item()
    print(f"      Z = sum over y of pi_ref(y) exp(r(y) / beta) = {Z:.6f}, and with it")
    print(f"      pi*(y) = pi_ref(y) exp(r(y) / beta) / Z is one: all above 0 (the least is "
          f"{optimal.exp().min():.4f}),")
    print(f"      and their sum is {optimal.exp().sum():.6f}")
    print("      (Six terms. A GPT with 1,024 tokens has 1024^40 = 10^120 responses of 40 tokens: "
          "nobody can\n      add them up. evaluate.py estimates Z from samples of pi_ref; DPO "
          "needs no Z at all.)")
    print("(6) multiply and divide by Z. log Z does not depend on pi")
    show("E[log pi/(pi_ref exp(r / beta))]", mean((logprobs.exp() / (ref + r / beta).exp()).log()),
         "KL(pi || pi*) - log Z", kl_to_optimal - log_Z)

    print("(7) a KL is never negative, and 0 only for pi = pi*: pi* is the only optimum (Eq. 4)")
    show("J(pi)", J, "beta log Z - beta KL(pi || pi*)", beta * log_Z - beta * kl_to_optimal)
    show("J(pi*)", objective(optimal, ref, r, beta).item(), "beta log Z", beta * log_Z)
    others = torch.randn(10_000, len(r), generator=draw, dtype=torch.double).log_softmax(-1)
    J_others = objective(others, ref, r, beta)
    above = (J_others > objective(optimal, ref, r, beta)).sum()
    print(f"      10,000 policies drawn at random: the best has J = {J_others.max():+.6f}; "
          f"above pi* are {above}")

    print("\n(8) Eq. 4 the other way round: take logarithms and solve for r (Eq. 5)")
    implicit = beta * (optimal - ref)
    print(f"      beta log Z = {beta * log_Z:.4f}")
    print(f"      {'response y':12}{'pi*':>8}{'beta log pi*/pi_ref':>22}{'+ beta log Z':>14}"
          f"{'r':>8}")
    for name, *row in zip(RESPONSES, optimal.exp(), implicit, implicit + beta * log_Z, r):
        print(f"      {name:12}{row[0]:8.3f}{row[1]:22.4f}{row[2]:14.4f}{row[3]:8.2f}")
    print("      positive where pi* likes y more than pi_ref does, negative where it likes it less")

    first, second = 1, 4
    print(f"(9) people compare: p(y1 > y2) = sigmoid(r(y1) - r(y2)), Bradley-Terry. Take "
          f"y1 ={RESPONSES[first]}\n    and y2 ={RESPONSES[second]} and put (8) into it: both "
          "rewards contain beta log Z, and it cancels")
    show("sigmoid(r(y1) - r(y2))", torch.sigmoid(r[first] - r[second]).item(),
         "sigmoid of the difference without log Z",
         torch.sigmoid(implicit[first] - implicit[second]).item())
    show("1 / (1 + exp(r(y2) - r(y1)))", 1 / (1 + math.exp(r[second] - r[first])),
         "exp r(y1) / (exp r(y1) + exp r(y2))",
         math.exp(r[first]) / (math.exp(r[first]) + math.exp(r[second])))
    print("      (mind the sign: 1 / (1 + exp(r(y1) - r(y2))) = "
          f"{1 / (1 + math.exp(r[first] - r[second])):.4f} is how often y2 wins)")

    print("(10) so the likelihood of the pairs can be written with a policy in place of a reward: "
          "Eq. 7")
    A, B = all_pairs(len(r))
    wins = preference(r)

    def expected_dpo_loss(policy: torch.Tensor) -> float:
        """Eq. 7 over all pairs, each labelled either way as often as people do."""
        losses, _, _ = dpo_loss(policy[A], policy[B], ref[A], ref[B], beta)
        return ((wins * losses).sum() / wins.sum()).item()

    reward_model_loss = ((wins * reward_loss(r[A], r[B])).sum() / wins.sum()).item()
    show("the reward model's loss of r (Eq. 2)", reward_model_loss,
         "DPO's loss of pi* (Eq. 7)", expected_dpo_loss(optimal))
    show("DPO's loss of pi_ref, where it starts", expected_dpo_loss(ref),
         "ln 2: no pair is told apart", math.log(2))

    print("     and its gradient (below Eq. 7): the more wrong the implicit rewards have a pair, "
          "the more pi(y_w)\n     is pushed up. For pi and the pair y_w = y1, y_l = y2:")
    chosen, rejected = logprobs[[first]].requires_grad_(), logprobs[[second]]
    loss, chosen_reward, rejected_reward = dpo_loss(chosen, rejected, ref[[first]], ref[[second]],
                                                    beta)
    gradient, = torch.autograd.grad(loss.sum(), chosen)
    show("-beta sigmoid(r_l - r_w)",
         -beta * torch.sigmoid(rejected_reward - chosen_reward).item(),
         "d loss / d log pi(y_w), by autograd", gradient.item())


def print_roads(ref: torch.Tensor, r: torch.Tensor, beta: float) -> None:
    """Three ways to find pi* from the preferences alone, and how near to it each ends."""
    print("\nThree roads to pi*, each from all pairs with the labels that people give:")
    wins = preference(r)
    optimal = optimum(ref, r, beta)
    fitted = reward_by_bradley_terry(wins, len(r))
    roads = {
        "DPO: the least loss of Eq. 7": policy_by_dpo(ref, wins, beta),
        "a reward fitted by Bradley-Terry, then Eq. 4": optimum(ref, fitted, beta),
        "that reward, and ascent of E[r] - beta KL": policy_by_ascent(ref, fitted, beta),
    }
    for name, policy in roads.items():
        distance = (policy.exp() - optimal.exp()).abs().max()
        print(f"      {name:46} ends within {distance:.0e} of pi*, J = "
              f"{objective(policy, ref, r, beta):+.6f}")


def print_finite_pairs(ref: torch.Tensor, r: torch.Tensor, beta: float,
                       draw: torch.Generator) -> None:
    """What the policy that is best for a finite number of labelled pairs loses against pi*."""
    optimal = optimum(ref, r, beta)
    print(f"\nWith finite pairs, {DRAWS} times each: what the best policy for the pairs loses")
    print(f"      {'pairs':>7}{'J(pi*) - J(pi)':>22}{'times pairs':>14}{'DPO from reward road':>24}"
          f"{'no optimum':>13}")
    for pairs in (30, 100, 300, 1000, 3000, 10_000, 30_000):
        regrets, apart, endless = [], 0.0, 0
        for _ in range(DRAWS):
            wins = sample_wins(ref, r, pairs, draw)
            if not has_optimum(wins, len(r)):
                endless += 1
                continue
            policy = policy_by_dpo(ref, wins, beta)
            other = optimum(ref, reward_by_bradley_terry(wins, len(r)), beta)
            apart = max(apart, (policy.exp() - other.exp()).abs().max().item())
            regrets.append(beta * kl_divergence(policy, optimal).item())
        lost, times, difference = "", "", ""
        if len(regrets) > 1:
            mean_regret, error = mean_se(torch.tensor(regrets).numpy())
            lost = f"{mean_regret:.5f} +- {error:.5f}"
            times = f"{pairs * mean_regret:.2f}"
            difference = f"{apart:.0e}"
        print(f"      {pairs:7,}{lost:>22}{times:>14}{difference:>24}{endless:>13}")
    print("""\
      By (7) that is beta KL(pi || pi*). It falls like 1 / pairs: the error of a reward falls like
      the root of that, and J is flat near its top. Both roads end at the same policy, whatever the
      pairs: where DPO and PPO differ, this loss is not why. No optimum: a response never lost, say,
      and its reward grows without end. Then the number of steps decides where DPO stops, not beta.\
""")


# ---- the command ---------------------------------------------------------------------------------

def main(config: Config) -> None:
    """Print the derivation, the three roads, and what finite pairs change."""
    ref = torch.tensor(REFERENCE, dtype=torch.double).log()  # (6,) log pi_ref
    r = torch.tensor(REWARD, dtype=torch.double)  # (6,)
    draw = torch.Generator().manual_seed(config.seed)
    print_derivation(ref, r, config.beta, draw)
    print_roads(ref, r, config.beta)
    print_finite_pairs(ref, r, config.beta, draw)


if __name__ == "__main__":
    main(parse(Config, __doc__))
