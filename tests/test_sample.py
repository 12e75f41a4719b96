"""sample.py: what is shown is what was sampled, with the numbers of its definition; an exported policy is the same policy.

What it refuses is in test_cli.py, with what the other scripts refuse.
"""
import io
import json
import math
import os
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import regex
import torch

import clone
import sample
import sft
from common import gpt2, pipeline
from common.run import load_run, load_tensors, save_tensors
from common.tokenizer import PATTERN, Tokenizer, byte_letters
from common.training import generator
from conftest import every_response, naive_logprobs, tiny_gpt
from data.reviews.grammar import gold_reward, sample_review
from model import ScalarModel
from test_model import slow_generate

PROMPT = "This film"


@pytest.fixture(scope="module")
def work(root, tmp_path_factory) -> Path:
    """A folder with an SFT policy, a copy of it, one with other weights as a training would leave it, and a reward model."""
    work = tmp_path_factory.mktemp("work")
    runs = work / "runs/reviews"
    assert clone.run_here(root, work, "sft", *clone.SFT) == 0
    clone.write_pairs(work / "pairs.jsonl")
    assert clone.run_here(root, work, "reward_model", "--sft", "runs/reviews/sft", "--pairs", "pairs.jsonl",
                          "--out", "runs/reviews/reward-model") == 0
    for name in "copy", "other":
        shutil.copytree(runs / "sft", runs / name)
        (runs / name / "config.json").write_text(json.dumps({"script": "dpo.py", "dataset": "reviews", "preset": "cpu"}))
    state = load_tensors(runs / "other/model.pt")
    noise = torch.Generator().manual_seed(0)
    for tensor in state["model"].values():
        tensor += 0.2 * tensor.std().nan_to_num() * torch.randn(tensor.shape, generator=noise)
    save_tensors(runs / "other/model.pt", state)
    return work


def said(root, work, capsys, *argv) -> str:
    """What sample.py prints."""
    capsys.readouterr()
    assert clone.run_here(root, work, "sample", *argv) == 0
    return capsys.readouterr().out


ROW = re.compile(r" *(\d+)? +(-?\d\.\d\d) +([+-]\d+\.\d\d)  (\S+(?: [\d.]+)?) +(.*)")


def rows_of(shown: str) -> list[tuple[float, float, str, str]]:
    """(gold reward, log-ratio, name, text) of each response on a wide screen."""
    found = [ROW.fullmatch(line) for line in shown.splitlines()]
    return [(float(row[2]), float(row[3]), row[4], row[5]) for row in found if row]


# ---- the same random numbers -------------------------------------------------------------------------------------------

def test_every_policy_gets_the_same_numbers_one_for_each_row_and_position(work):
    """Two policies: both are the slow loop that reads the numbers of (seed, prompt), whatever was sampled before."""
    tokenizer = Tokenizer.load(work / "runs/reviews/sft/tokenizer.tiktoken")
    uniform = torch.rand(3, 24, generator=generator(5, "sample", PROMPT))
    ids = [tokenizer.bos, *tokenizer.encode(PROMPT)]
    found = []
    for name in "sft", "other":
        policy, _ = load_run(work / "runs/reviews" / name)
        samples = sample.sample(policy, tokenizer, PROMPT, 3, 24, 5, 0.7)
        rows = [row[:n] for row, n in zip(samples.tokens.tolist(), samples.lengths.tolist())]
        assert rows == slow_generate(policy, [ids] * 3, 24, 0.7, uniform)
        found.append(rows)
    assert found[0] != found[1]


def test_equal_weights_say_the_same_and_other_weights_do_not(root, work, capsys, monkeypatch):
    """By the command: beside a copy of itself, and beside another policy; and stdin's prompt is --prompt's."""
    monkeypatch.setenv("COLUMNS", "2000")
    runs = [f"runs/reviews/{name}" for name in ("sft", "copy", "other")]
    shown = said(root, work, capsys, *runs, "--prompt", PROMPT, "--n", "3", "--temperature", "0.7")
    rows = rows_of(shown)
    assert [row[2] for row in rows] == ["sft", "copy", "other"] * 3
    for first, copy, other in zip(rows[::3], rows[1::3], rows[2::3]):
        assert first[3] == copy[3] != other[3] and first[1] == copy[1] == 0 != other[1]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"\nA comedy\n{PROMPT}\n"))
    both = said(root, work, capsys, *runs, "--n", "3", "--temperature", "0.7")
    assert rows_of(both)[9:] == rows and rows_of(both)[:9] != rows
    assert rows_of(said(root, work, capsys, *runs, "--prompt", PROMPT, "--n", "1", "--temperature", "0.7")) == rows[:3]
    assert rows_of(said(root, work, capsys, *runs, "--prompt", PROMPT, "--seed", "1", "--n", "3")) != rows


def test_a_screen_of_100_columns(root, work, capsys, monkeypatch):
    """Nothing is longer; the texts stand in one column, and put together they are what a wide screen shows."""
    runs = ["runs/reviews/sft", "runs/reviews/other", "--prompt", PROMPT, "--n", "2"]
    monkeypatch.setenv("COLUMNS", "2000")
    wide = rows_of(said(root, work, capsys, *runs))
    monkeypatch.setenv("COLUMNS", "100")
    lines = said(root, work, capsys, *runs).splitlines()
    assert max(map(len, lines)) <= 100
    at = next(line for line in lines if " sft " in line).index(wide[0][3][:20])
    texts = []
    for line in lines[lines.index(PROMPT) + 2:]:
        if line[:at].strip():
            texts.append(line[at:])
        else:
            texts[-1] += " " + line[at:]
    assert texts == [row[3] for row in wide]


def test_a_terminal_is_asked_for_prompts(root, work, capsys, monkeypatch):
    """What is typed is a prompt each time, until Ctrl-D; a typing pause (an empty line) is none."""
    typed = iter(["A comedy", "", PROMPT])

    def answer(_):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", screen)
    monkeypatch.setattr("builtins.input", answer)
    assert clone.run_here(root, work, "sample", "runs/reviews/sft", "--n", "1") == 0
    shown = capsys.readouterr()
    answered = [line for line in shown.out.splitlines() if line in ("A comedy", PROMPT)]
    assert "Ctrl-D" in shown.err and answered == ["A comedy", PROMPT]


@pytest.mark.parametrize("content, expected", [
    (None, "stdin: no prompt there"), ("", "stdin: no prompt there"), ("\n \n", "stdin: no prompt there"),
    ("A comedy\n" + "film," * 90 + "\n", "stdin, line 2: no room for a response: prompt "),
    ("a\udcff\n", "stdin, line 1: not UTF-8")])
def test_prompts_that_are_none(content, expected, root, work, monkeypatch):
    monkeypatch.setattr("sys.stdin", None if content is None else io.StringIO(content))  # None: it is closed
    stopped = clone.run_here(root, work, "sample", "runs/reviews/sft", "--n", "1")
    assert isinstance(stopped, str) and stopped.startswith("error: " + expected)


# ---- the numbers beside a response -------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_reward_and_log_ratio_by_their_definition(temperature, work):
    """At temperature 1 whatever they were sampled at; some end and some are cut, and the texts say no <eos>."""
    tokenizer = Tokenizer.load(work / "runs/reviews/sft/tokenizer.tiktoken")
    policy, ref = (load_run(work / "runs/reviews" / name)[0] for name in ("other", "sft"))
    start = SimpleNamespace(ref=ref, tokenizer=tokenizer,
                            gold=lambda prompts, texts: torch.tensor([gold_reward(p + t) for p, t in zip(prompts, texts)]))
    samples = sample.sample(policy, tokenizer, PROMPT, 12, 48, 1, temperature)
    found = sample.responses_of(policy, start, PROMPT, samples)
    prompt = [tokenizer.bos, *tokenizer.encode(PROMPT)]
    for response, ids in zip(found, samples.response_ids()):
        by_hand = (naive_logprobs(policy, prompt, ids) - naive_logprobs(ref, prompt, ids)).sum().item()
        assert response.log_ratio == pytest.approx(by_hand, abs=1e-3)
        assert response.text == tokenizer.decode(ids)
        assert response.reward == pytest.approx(gold_reward(PROMPT + response.text), abs=1e-6)
        assert response.cut == (tokenizer.eos not in ids)
    assert temperature == 0 or len({response.cut for response in found}) == 2


def test_the_reference_is_that_of_the_runs(root, work, capsys):
    """An SFT policy of another name is its own, or takes that of the run beside it; --sft names any."""
    shutil.copytree(work / "runs/reviews/sft", work / "mine/policy", dirs_exist_ok=True)
    argv = ["--prompt", PROMPT, "--n", "1"]
    assert "pi_ref: mine/policy;" in said(root, work, capsys, "mine/policy", *argv)
    assert "pi_ref: runs/reviews/sft;" in said(root, work, capsys, "mine/policy", "runs/reviews/other", *argv)
    assert "pi_ref: runs/reviews/other;" in said(root, work, capsys, "mine/policy", "--sft", "runs/reviews/other", *argv)


# ---- the optimum -------------------------------------------------------------------------------------------------------

def test_the_optimum_of_three_responses_by_hand():
    """Frequencies are exp(r / beta) / sum, within four standard errors; log-ratios r / beta - log mean exp(r / beta)."""
    rewards, beta, count = torch.tensor([0.1, 0.5, 0.9]), 0.5, 20_000
    w = [math.exp(r / beta) for r in (0.1, 0.5, 0.9)]
    picks, log_ratio, ess = sample.optimum(rewards, beta, count, generator(0))
    for i, r in enumerate((0.1, 0.5, 0.9)):
        p = w[i] / sum(w)
        assert abs((picks == i).double().mean().item() - p) < 4 * math.sqrt(p * (1 - p) / count)
        assert log_ratio[picks == i][0].item() == pytest.approx(r / beta - math.log(sum(w) / 3), abs=1e-6)
    assert ess == pytest.approx(sum(w) ** 2 / sum(x * x for x in w), rel=1e-6)
    assert sample.optimum(torch.full((7,), 0.3), 0.01, 2, generator(0))[2] == pytest.approx(7)


def test_resampled_responses_follow_equation_4():
    """A model of 4 tokens, whose 40 responses are enumerated: N samples of pi_ref, resampled, are pi_ref exp(r / beta) / Z."""
    ref, beta, eos = tiny_gpt(vocab_size=4, block_size=4, seed=5, size=0.4), 0.4, 2
    tokenizer = SimpleNamespace(bos=1, eos=eos, pad=0, encode=lambda text: [])
    every = [tuple(response) for response in every_response(4, 3, eos)]
    reward = dict(zip(every, torch.rand(40, generator=generator(1)).tolist()))
    with torch.no_grad():
        q = torch.stack([naive_logprobs(ref, [1], list(y)).sum().double().exp() for y in every])
    wanted = q * torch.tensor([math.exp(reward[y] / beta) for y in every], dtype=torch.float64)
    wanted /= wanted.sum()
    drawn = [tuple(ids) for ids in sample.sample(ref, tokenizer, "", 20_000, 4, 0).response_ids()]
    picks, log_ratio, _ = sample.optimum(torch.tensor([reward[y] for y in drawn]), beta, 20_000, generator(2))
    found = torch.zeros(40, dtype=torch.float64)
    for i in picks.tolist():
        found[every.index(drawn[i])] += 1 / 20_000
    assert (found - wanted).abs().sum() < 0.06 and (q - wanted).abs().sum() > 0.3
    ratio = {drawn[i]: value for i, value in zip(picks.tolist(), log_ratio.tolist())}
    for y, exact, before in zip(every, wanted.tolist(), q.tolist()):
        assert y not in ratio or ratio[y] == pytest.approx(math.log(exact / before), abs=0.05)


def test_the_optimum_comes_from_the_bank_where_it_has_the_prompt(root, work, capsys, monkeypatch):
    """The rows shown are responses of the bank with their rewards, whose mean is that of Eq. 4; too few are not shown."""
    monkeypatch.setenv("COLUMNS", "2000")
    assert "fresh responses" in said(root, work, capsys, "runs/reviews/other", "--prompt", PROMPT, "--optimum", "1", "--n", "1")
    assert not (work / "runs/reviews/bank").exists()  # nothing is written
    assert clone.run_here(root, work, "evaluate", "runs/reviews/sft") == 0
    bank = [json.loads(line) for line in (work / "runs/reviews/bank/bank.jsonl").read_text().splitlines()][0]
    argv = ["runs/reviews/other", "--prompt", bank["prompt"], "--n", "40", "--optimum"]
    for beta in "10", "0.05":
        shown = said(root, work, capsys, *argv, beta)
        assert f"optimum at beta {beta}: drawn from 256 responses of the bank, effective sample size " in shown
        rows = [row for row in rows_of(shown) if row[2] == f"optimum {beta}"]
        assert len(rows) == 40
        known = {sample.on_one_line(text): reward for text, reward in zip(bank["responses"], bank["rewards"])}
        assert all(row[0] == pytest.approx(known[row[3]], abs=0.0051) for row in rows)
        weights = [math.exp(r / float(beta)) for r in bank["rewards"]]
        mean, square = (sum(w * r ** k for w, r in zip(weights, bank["rewards"])) / sum(weights) for k in (1, 2))
        assert abs(sum(row[0] for row in rows) / 40 - mean) < 4 * math.sqrt((square - mean ** 2) / 40)
    assert "fresh responses" in said(root, work, capsys, "runs/reviews/other", "--prompt", PROMPT, "--optimum", "1", "--n", "1")
    shown = said(root, work, capsys, *argv, "0.0001")
    assert "; not shown, as it needs 5: take a larger BETA" in shown
    assert {row[2] for row in rows_of(shown)} == {"other"}


# ---- scores ------------------------------------------------------------------------------------------------------------

def test_scores_of_texts(root, work, capsys, tmp_path):
    """A row comes back as it was, in its place, with the score of <bos> prompt response <eos>, row by row."""
    model, _ = load_run(work / "runs/reviews/reward-model", ScalarModel)
    tokenizer = Tokenizer.load(work / "runs/reviews/reward-model/tokenizer.tiktoken")
    rows = [{"prompt": PROMPT, "response": " is good. 很好", "id": 7}, {"response": " is bad.", "prompt": ""},
            {"prompt": PROMPT, "response": " is good. 很好"}, {"prompt": PROMPT, "response": ""}]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = said(root, work, capsys, "runs/reviews/reward-model", "--score", tmp_path / "texts.jsonl")
    found = [json.loads(line) for line in shown.splitlines()]
    for row, scored in zip(rows, found, strict=True):
        ids = [tokenizer.bos, *tokenizer.encode(row["prompt"]), *tokenizer.encode(row["response"]), tokenizer.eos]
        score = scored.pop("score")
        assert scored == row and score == pytest.approx(model(torch.tensor([ids]))[0, -1].item(), abs=1e-3)
    (tmp_path / "texts.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps({"prompt": "a", "response": " film" * 200}))
    stopped = clone.run_here(root, work, "sample", "runs/reviews/reward-model", "--score", tmp_path / "texts.jsonl")
    assert stopped.startswith(f"error: {tmp_path / 'texts.jsonl'}, line 2: prompt and response have ")


def test_a_classifier_scores_no_pairs(root, work, tmp_path):
    """It has the same kind of network, and has never seen an <eos>."""
    shutil.copytree(work / "runs/reviews/reward-model", tmp_path / "classifier")
    (tmp_path / "classifier/config.json").write_text('{"script": "classifier.py"}')
    assert "classifier: a classifier of texts, expected a reward model" in clone.run_here(
        root, work, "sample", tmp_path / "classifier", "--score", "pairs.jsonl")


# ---- export ------------------------------------------------------------------------------------------------------------

def texts() -> list[str]:
    """Reviews, and what a byte-level tokenizer may stumble over: white space, other scripts, our special tokens as text."""
    rng = random.Random(4)
    odd = ["", " ", PROMPT, "  two  spaces \n\n and\tmore ", "it's I'll 12 3x ½", "很好 🎬 é e\u0301 \u2028 \u00a0",
           "\x00\x7f\xad", "a <|eos|> b<|bos|><|pad|> <|endoftext|>", "aaaaaaa" * 5]
    letters = ["".join(rng.choice("ab ' .stlve\n1é很🎬<|") for _ in range(50)) for _ in range(60)]
    return odd + letters + [sample_review(rng)[0] for _ in range(60)]


@pytest.fixture(scope="module")
def exported(root, work) -> Path:
    assert clone.run_here(root, work, "sample", "runs/reviews/other", "--export", "exported") == 0
    return work / "exported"


def test_an_exported_policy_comes_back(exported, work):
    """Equal logits to the last bit, the same vocabulary, and no half-written folder beside it. sft.py --init reads it so."""
    policy, _ = load_run(work / "runs/reviews/other")
    tokenizer = Tokenizer.load(work / "runs/reviews/other/tokenizer.tiktoken")
    model, back = sft.initial_model(sft.Config(init=str(exported)), str(exported))
    tokens = torch.randint(tokenizer.vocab_size, (2, 30), generator=generator(0))
    assert torch.equal(model(tokens), policy(tokens))
    assert back.fingerprint == tokenizer.fingerprint
    assert sorted(os.listdir(exported)) == ["config.json", "generation_config.json", "merges.txt", "model.safetensors",
                                            "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    assert not list(work.glob(".*"))
    config = json.loads((exported / "config.json").read_text())
    assert [config[f"{name}_token_id"] for name in ("pad", "bos", "eos")] == [tokenizer.pad, tokenizer.bos, tokenizer.eos]


def merged(word: str, merges: list[str], table: list[str]) -> list[str]:
    """BPE as Sennrich et al. write it, from the lines of merges.txt: each merge in turn, wherever it applies."""
    parts = [table[byte] for byte in word.encode()]
    for line in merges:
        a, b = line.split(" ")
        i = 0
        while i < len(parts) - 1:
            if (parts[i], parts[i + 1]) == (a, b):
                parts[i:i + 2] = [a + b]
            i += 1
    return parts


def test_the_exported_merges_give_the_ids_of_our_tokenizer(exported, work):
    """By a slow BPE of the files alone; tokenizer.json says the same as they do."""
    tokenizer = Tokenizer.load(work / "runs/reviews/other/tokenizer.tiktoken")
    vocab = json.loads((exported / "vocab.json").read_text())
    version, *merges = (exported / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert version.startswith("#version") and len(merges) == tokenizer.vocab_size - 256 - 3 > 100
    for text in texts():
        words = regex.findall(PATTERN, text)
        parts = [part for word in words for part in merged(word, merges, byte_letters())]
        assert [vocab[part] for part in parts] == tokenizer.encode(text), text
    whole = json.loads((exported / "tokenizer.json").read_text())
    assert whole["model"]["vocab"] == vocab and [" ".join(pair) for pair in whole["model"]["merges"]] == merges
    assert {token["content"]: token["id"] for token in whole["added_tokens"]} == {
        f"<|{name}|>": getattr(tokenizer, name) for name in ("pad", "bos", "eos")}


def test_bytes_are_written_as_gpt2_writes_them():
    """A space is U+0120, a new line U+010A; those that print are themselves; no two are the same, and none is white space."""
    letters = byte_letters()
    assert (letters[32], letters[10], letters[0], letters[127], letters[173]) == ("Ġ", "Ċ", "Ā", "ġ", "Ń")
    assert all(letters[byte] == chr(byte) for byte in [*range(33, 127), *range(161, 173), *range(174, 256)])
    assert len(set(letters)) == 256 and not any(letter.isspace() for letter in letters)


def test_gpt2s_own_merges_are_recovered_from_its_ranks(tmp_path):
    """All 50,000, in their order, as OpenAI published them; and GPT-2's one special token stays the only one."""
    if "PREFERENCE_DATA" not in os.environ:
        pytest.skip("PREFERENCE_DATA (a folder with gpt2_bpe/encoder.json and vocab.bpe) is not set")
    folder = Path(os.environ["PREFERENCE_DATA"], "gpt2_bpe")
    shutil.copyfile(folder / "encoder.json", tmp_path / "vocab.json")
    tokenizer, letters = Tokenizer.gpt2(tmp_path), byte_letters()
    found = [" ".join("".join(letters[byte] for byte in token) for token in pair)
             for pair in gpt2.merges(tokenizer.ranks)]
    assert found == (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    gpt2.save_tokenizer(tokenizer, 1024, tmp_path)
    assert json.loads((tmp_path / "vocab.json").read_text()) == json.loads((folder / "encoder.json").read_text())
    added = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    assert [(token["content"], token["id"]) for token in added] == [("<|endoftext|>", 50256)]


def test_a_vocabulary_that_is_no_bpe_is_refused():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"abc": 256}  # neither ab nor bc is there
    with pytest.raises(SystemExit, match="the token b'abc' of this tokenizer is no merge of two others"):
        gpt2.merges(ranks)


def test_transformers_loads_an_exported_policy(exported, work):
    """Equal logits; equal ids, with <bos> in front and without; no text is a special token; generate() ends at our <eos>."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing else reads the folder")
    policy, _ = load_run(work / "runs/reviews/other")
    ours = Tokenizer.load(work / "runs/reviews/other/tokenizer.tiktoken")
    model = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    tokens = torch.randint(ours.vocab_size, (2, 30), generator=generator(0))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, policy(tokens), rtol=0, atol=1e-4)
    for text in texts():
        assert tokenizer(text, add_special_tokens=False).input_ids == ours.encode(text), text
        assert tokenizer(text).input_ids == [ours.bos, *ours.encode(text)]
        assert tokenizer.decode(ours.encode(text)) == text
    assert [len(tokenizer), tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [
        ours.vocab_size, ours.pad, ours.bos, ours.eos]
    inputs = tokenizer([PROMPT] * 64, return_tensors="pt")
    torch.manual_seed(0)
    written = model.generate(**inputs)
    assert written.shape[1] <= policy.config.block_size
    ended = [row for row in written.tolist() if ours.eos in row]
    assert ended and all(set(row[row.index(ours.eos) + 1:]) <= {ours.pad} for row in ended)
    # from the whole softmax: the mean log-probability of 64 first tokens is that of their distribution, within 4 errors
    table = policy(inputs.input_ids[:1])[0, -1].log_softmax(0).detach()
    mean, square = ((table.exp() * table ** k).sum() for k in (1, 2))
    first = table[written[:, inputs.input_ids.shape[1]]]
    assert abs(first.mean() - mean) < 4 * (square - mean ** 2).sqrt() / 8
