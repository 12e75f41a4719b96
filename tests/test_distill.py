"""experiments/distill.py: logits and KL by position against loops and enumeration; a small run,
with the first gradient by hand.
"""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate
from common.run import load_run
from common.settings import parse
from common.training import generator
from conftest import every_response, naive_logprobs, tiny_gpt
from experiments import distill
from experiments.distill import Config, kl_by_position, response_logits, student_of
from model import generate, response_logprobs


@pytest.fixture(scope="module")
def pair():
    """A student and a teacher."""
    return tiny_gpt(4, 4, seed=0), tiny_gpt(4, 4, seed=1)


def sampled(model, count, seed=0):
    """Responses to two prompts of different lengths, of at most 2 and 3 tokens; <eos> is 0."""
    return generate(model, [[1], [2, 1]] * count, 4, 0, 0, torch.Generator().manual_seed(seed))


def each(samples):
    """Every row's ids, the length of its prompt, and its own length."""
    return zip(samples.tokens.tolist(), samples.prompt_lengths.tolist(), samples.lengths.tolist())


# ---- logits and KL -------------------------------------------------------------------------------

@torch.no_grad()
def test_the_logits_are_those_that_sampling_and_scoring_use(pair):
    samples = sampled(pair[0], 20)
    logprobs = F.log_softmax(response_logits(pair[1], samples), 1)
    scored = response_logprobs(pair[1], *samples[:3])
    row = 0
    for i, (tokens, start, end) in enumerate(each(samples)):
        response = torch.tensor(tokens[start:end])[:, None]
        own = logprobs[row:row + end - start].gather(1, response).squeeze(1)
        torch.testing.assert_close(own, scored[i, :end - start])
        by_definition = naive_logprobs(pair[1], tokens[:start], tokens[start:end])
        torch.testing.assert_close(own, by_definition)
        row += end - start
    assert row == len(logprobs)
    assert len(set((samples.lengths - samples.prompt_lengths).tolist())) == 3


def test_kl_by_position_is_the_loop_over_responses_and_tokens(pair):
    """More rows than go through the models at once; a policy is at no distance from itself."""
    student, teacher = pair
    samples, found = sampled(student, 45), {}
    for tokens, start, end in each(samples):
        p, q = (torch.log_softmax(model(torch.tensor([tokens[:end]]))[0].double(), -1)
                for model in pair)
        for t in range(start, end):
            kl = (p[t - 1].exp() * (p[t - 1] - q[t - 1])).sum().item()
            found.setdefault(t - start, []).append(kl)
    kl, alive = kl_by_position(student, teacher, samples)
    assert kl == pytest.approx([np.mean(found[r]) for r in sorted(found)], rel=1e-4)
    assert alive == pytest.approx([len(found[r]) / 90 for r in sorted(found)])
    assert not kl_by_position(student, student, samples)[0].any()


@torch.no_grad()
def test_summed_over_positions_it_is_the_kl_of_whole_responses(pair):
    """The chain rule, against the sum over all responses; and no other way round."""
    student, teacher = pair

    def exact(p, q):
        total = 0.0
        for prompt in ([1], [2, 1]):
            for response in every_response(4, 4 - len(prompt), 0):
                log_p, log_q = (naive_logprobs(model, prompt, response).sum().item()
                                for model in (p, q))
                total += math.exp(log_p) * (log_p - log_q) / 2
        return total

    forwards, backwards = exact(student, teacher), exact(teacher, student)
    parts = np.array([np.dot(*kl_by_position(student, teacher, sampled(student, 100, seed)))
                      for seed in range(20)])
    standard_error = parts.std(ddof=1) / math.sqrt(20)
    assert abs(parts.mean() - forwards) < 4 * standard_error < 0.2 * abs(forwards - backwards)


# ---- a small run ---------------------------------------------------------------------------------

def test_a_student_has_half_the_channels_and_a_quarter_of_the_matrices():
    teacher = tiny_gpt(11, 12, 3, 4, 16)
    student, again, other = (student_of(teacher.config, seed) for seed in (0, 0, 1))
    assert vars(student.config) == {**vars(teacher.config), "n_embd": 8, "n_head": 2}
    sizes = [sum(p.numel() for p in model.h.parameters() if p.dim() == 2)
             for model in (teacher, student)]
    assert sizes[0] == 4 * sizes[1] > 0
    assert torch.equal(student.wte.weight, again.wte.weight)
    assert not torch.equal(student.wte.weight, other.wte.weight)


def test_cloning_learns_from_the_teachers_samples_and_on_policy_from_the_students_own(
        small_reviews, sft_run, tmp_path, gradients, monkeypatch):
    """Channels tell who wrote: cloning's responses are all the teacher's (32), on-policy the
    student's own (16) from the second round on. The first step's gradient is that of the
    cross-entropy to the teacher's distributions, token by token."""
    drawn, measured, sample_policy = [], [], evaluate.sample_policy

    def spy_generate(model, *args):
        drawn.append((model.config.n_embd, generate(model, *args)))
        return drawn[-1][1]

    def spy_sample(*args, **settings):
        measured.append(sample_policy(*args, **settings))
        return measured[-1]
    monkeypatch.setattr(distill, "generate", spy_generate)
    monkeypatch.setattr(evaluate, "sample_policy", spy_sample)
    distill.main(Config(sft=str(sft_run), responses=16, iterations=2, steps=6, seeds=2,
                        out=str(tmp_path)))

    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("cloning", 0), ("on-policy", 0), ("cloning", 1), ("on-policy", 1)]
    cloning = [(32, 8), (32, 8), (16, 64)]  # two rounds, and then to be judged
    on_policy = [(32, 8), (16, 8), (16, 64)]
    assert [(size, len(samples.tokens)) for size, samples in drawn] == 2 * (cloning + on_policy)
    assert torch.equal(drawn[0][1].tokens, drawn[3][1].tokens)
    assert not torch.equal(drawn[0][1].tokens, drawn[6][1].tokens)
    for row, policy in zip(rows, measured, strict=True):
        kl = policy.kl
        assert row["kl_sampled"] == pytest.approx(kl.mean().item(), rel=1e-5)
        error = kl.std() * math.sqrt(1 / kl.numel() + 1 / 64)
        assert abs(row["kl"] - row["kl_sampled"]) < 4 * error

    teacher, draw = load_run(sft_run)[0], generator(0, 1, 0)
    student, losses = student_of(teacher.config, 0), []
    torch.randint(1, (), generator=draw)  # which round: there is one
    for i in torch.randint(8, (32,), generator=draw).tolist():
        tokens, start, end = (x[i] for x in drawn[0][1][:3])
        log_p, log_q = (model(tokens[None, :end])[0, start - 1:end - 1].log_softmax(-1)
                        for model in (student, teacher))
        losses += [-(q.exp() * p).sum() for p, q in zip(log_p, log_q)]
    torch.stack(losses).mean().backward()
    for own, found in zip(student.parameters(), gradients[0], strict=True):
        torch.testing.assert_close(found, own.grad, rtol=1e-3, atol=1e-6)
    assert len(gradients) == 4 * 6


# ---- settings ------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments", [
    "--responses 3", "--responses 1000001", "--responses -1", "--iterations 0", "--steps 3",
    "--steps 0", "--lr nan", "--lr 0", "--seeds 1", "--seeds 1001", "--seed -1", "--dataset nope"])
def test_a_bad_setting_is_one_line(arguments):
    with pytest.raises(SystemExit) as stopped:
        parse(Config, "", arguments.split())
    message = str(stopped.value)
    assert message.startswith("error: ") and arguments.split()[0] in message
    assert "\n" not in message


def test_a_folder_that_cannot_be_written_stops_it_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="^error: .*file/below: cannot be written"):
        distill.main(Config(out=str(tmp_path / "file/below")))


def test_other_settings_are_another_folder():
    assert Config().out == "runs/reviews/distill"
    assert Config(responses=400, sft="somewhere/sft").out == "somewhere/distill-responses400"
