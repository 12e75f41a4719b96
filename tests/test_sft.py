"""sft.py: documents, the loss and its gradient, and how near a short run comes to the entropy of the grammar's reviews."""
import json
import math
import random

import pytest
import torch
import torch.nn.functional as F

from common import tasks
import sft
from common.files import write_jsonl
from common.training import batches, pad
from conftest import log_of, naive_logprobs, tiny_gpt
from common.pairs import encode_pairs, read_pairs
from data.reviews.grammar import sample_review
from common.tokenizer import Tokenizer, train_bpe
from common.statistics import mean_se
from common.run import load_run
from model import GPT, GPTConfig, summed_logprobs
from sft import Rows, encode_documents, held_out_loss, read_documents


# ---- documents and the held-out loss ---------------------------------------------------------------------------------

def test_a_document_is_bos_text_eos_and_a_cut_one_has_no_eos():
    tokenizer = train_bpe([], 259)  # bytes
    rows = encode_documents(["abc", "abcd", "abcdefgh" * 1000, "", "日本"], tokenizer, block_size=5)
    bos, eos = tokenizer.bos, tokenizer.eos
    assert rows == [[bos, *b"abc", eos], [bos, *b"abcd"], [bos, *b"abcd"], [bos, eos], [bos, *"日本".encode()[:4]]]


def test_long_texts_are_cut_before_encoding_without_a_difference():
    tokenizer = train_bpe(["the cat sat on the mat"] * 5, 300)
    texts = ["the cat sat on the mat " * n for n in (1, 3, 50)]
    whole = [([tokenizer.bos] + tokenizer.encode(text) + [tokenizer.eos])[:12] for text in texts]
    assert encode_documents(texts, tokenizer, 12) == whole


def test_a_text_that_was_cut_has_no_eos_though_its_tokens_fit():
    """GPT-2 has tokens of 64 dashes: the part of a text that is encoded may have fewer tokens than a row has room for."""
    tokenizer = train_bpe(["-" * 64] * 9, 300)
    row, = encode_documents(["-" * 1000], tokenizer, block_size=10)
    assert len(row) < 10 and row[-1] != tokenizer.eos


def test_a_prompt_stands_between_bos_and_text_and_is_given(tmp_path):
    tokenizer, path = train_bpe([], 259), tmp_path / "train.jsonl"  # bytes
    bos, eos = tokenizer.bos, tokenizer.eos
    write_jsonl(path, [{"text": "abc"}, {"prompt": "xy", "text": "abc"}, {"prompt": "xy", "text": "abcdef"},
                       {"prompt": "uvwxy", "text": "abc"}, {"prompt": "", "text": ""}])
    rows, given = read_documents(path, tokenizer, block_size=7)
    assert rows == [[bos, *b"abc", eos], [bos, *b"xyabc", eos], [bos, *b"xyabcd"], [bos, *b"uvwxya"], [bos, eos]]
    assert given == [1, 3, 3, 6, 1]
    with pytest.raises(SystemExit, match=r"train.jsonl, line 4: no room for the text: prompt 6 tokens, block size 6"):
        read_documents(path, tokenizer, block_size=6)
    write_jsonl(path, [{"text": "abc"}, {"prompt": 3, "text": "abc"}])
    with pytest.raises(SystemExit, match=r"train.jsonl, line 2: field 'prompt'"):
        read_documents(path, tokenizer, block_size=6)


def test_held_out_loss_and_bits_per_byte_by_hand():
    """Nats of every token after <bos>, <eos> included; bytes are those of the text (日本 has 6)."""
    tokenizer, model, texts = train_bpe(["aa aa"], 260), tiny_gpt(vocab_size=260, block_size=16), ["aa b", "日本", "aaaa aa."]
    rows = encode_documents(texts, tokenizer, 16)
    found = held_out_loss(model, Rows.of(rows, [1, 1, 1], tokenizer.pad), tokenizer, "float32")
    nats = -sum(naive_logprobs(model, row[:1], row[1:]).sum().item() for row in rows)
    assert found["nats_per_document"] == pytest.approx(nats / 3, rel=1e-5)
    assert found["nats_per_token"] == pytest.approx(nats / sum(len(row) - 1 for row in rows), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / (4 + 6 + 8), rel=1e-5)


# ---- training --------------------------------------------------------------------------------------------------------

@pytest.fixture
def small_run(small_reviews, tmp_path):
    """run(**settings) trains, three steps of 12 documents by default, and returns the rows of the log and the run folder."""
    def run(**settings):
        out = str(tmp_path / f"run{len(list(tmp_path.iterdir()))}")
        folder = sft.train(sft.Config(**{**dict(out=out, n_layer=1, n_head=2, n_embd=16, batch_size=12, steps=3, warmup=1,
                                                lr=1e-2), **settings}))
        return log_of(folder), folder
    return run


def test_loss_and_gradient_are_those_of_the_mean_over_all_tokens(small_run, small_reviews, gradients):
    """Twelve documents of uneven lengths, at once or as 5, 5 and 2: the mean over the tokens of the whole batch, not a mean of
    means. Compared with cross-entropy on targets whose padding is -100."""
    tokenizer = Tokenizer.load(small_reviews / "tokenizer.tiktoken")
    texts = [json.loads(line)["text"] for line in (small_reviews / "train.jsonl").read_text().splitlines()]
    rows = encode_documents(texts, tokenizer, 80)
    batch = next(batches(torch.tensor([len(row) for row in rows]), 12, seed=4))
    tokens, lengths = pad([rows[i] for i in batch.tolist()], tokenizer.pad)
    assert len(set(lengths.tolist())) > 2
    torch.manual_seed(4)
    model = GPT(GPTConfig(tokenizer.vocab_size, 80, 1, 2, 16))
    targets = tokens.where(torch.arange(tokens.shape[1]) < lengths[:, None], -100)[:, 1:]
    loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss.backward()
    logs, models = [], []
    for micro_batch_size in (0, 5):
        gradients.clear()
        log, folder = small_run(seed=4, micro_batch_size=micro_batch_size)
        assert log[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert log[0]["tokens"] == (targets != -100).sum()
        torch.testing.assert_close(gradients[0], [p.grad for p in model.parameters()], rtol=1e-4, atol=1e-6)
        logs.append(log)
        models.append(load_run(folder)[0])
    assert logs[0][-1]["nats_per_token"] == pytest.approx(logs[1][-1]["nats_per_token"], abs=1e-4)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-3, msg=name)  # Muon computes in bfloat16


def test_no_model_beats_the_entropy_and_a_short_run_comes_near(small_run):
    """The grammar says what each review's exact log-probability is. Over fresh reviews, model and truth on the same ones, the
    mean of log P(text) - log p_theta(text) is KL(P || p_theta): it cannot be negative, and 150 steps of one layer bring it
    down from over 300 nats a review to less than 30 (26 when this was written)."""
    log, folder = small_run(n_embd=64, n_head=4, steps=150, batch_size=32, warmup=15, block_size=112)
    model, _ = load_run(folder)
    tokenizer, rng = Tokenizer.load(folder / "tokenizer.tiktoken"), random.Random(99)
    texts, exact = zip(*(sample_review(rng) for _ in range(400)))
    tokens, lengths = pad(rows := encode_documents(texts, tokenizer, 112), tokenizer.pad)
    assert all(row[-1] == tokenizer.eos for row in rows)  # none was cut: log-probabilities of whole texts
    lost = torch.tensor(exact) - summed_logprobs(model, tokens, torch.ones(400, dtype=torch.long), lengths)
    mean, error = mean_se(lost.tolist())
    assert -4 * error < mean < 30
    assert log[0]["loss"] == pytest.approx(math.log(tokenizer.vocab_size), abs=0.1)  # at first every token is as likely


def test_preferred_ft_counts_the_chosen_responses_only(small_run, sft_run, pairs_file):
    """--on chosen: the first loss is -log pi(chosen | prompt) of the SFT policy per response token, <eos> included."""
    policy, _ = load_run(sft_run)
    tokenizer = Tokenizer.load(sft_run / "tokenizer.tiktoken")
    pairs = encode_pairs(read_pairs(pairs_file), tokenizer, policy.config.block_size, pairs_file)[:76]  # 4 of 80 held out
    batch = next(batches(torch.tensor([len(p.prompt + p.chosen) for p in pairs]), 12, seed=0)).tolist()
    nats = -sum(naive_logprobs(policy, pairs[i].prompt, pairs[i].chosen).sum().item() for i in batch)
    count = sum(len(pairs[i].chosen) for i in batch)
    log, *_ = small_run(on="chosen", init=str(sft_run), pairs=str(pairs_file), block_size=112)
    assert (log[0]["tokens"], log[0]["loss"]) == (count, pytest.approx(nats / count, abs=1e-4))


def test_the_loss_counts_the_text_and_not_its_prompt(small_run, small_reviews, tmp_path, monkeypatch):
    """One batch of all rows, half of them with a prompt: -log p(text | prompt) per token of the texts, <eos> included."""
    tokenizer = Tokenizer.load(small_reviews / "tokenizer.tiktoken")
    rows = [{"text": " It was dull."}, {"prompt": "I saw a film.", "text": " It was superb."}] * 3

    def write(folder):
        for name in ("train", "test"):
            write_jsonl(folder / f"{name}.jsonl", rows)
        tokenizer.save(folder / "tokenizer.tiktoken")
        return {}
    tasks.publish(tmp_path / "task", "reviews", write)
    monkeypatch.setattr(tasks, "prepared", lambda dataset: tmp_path / "task")
    torch.manual_seed(4)
    model = GPT(GPTConfig(tokenizer.vocab_size, 80, 1, 2, 16))
    parts = [([tokenizer.bos] + tokenizer.encode(row.get("prompt", "")), tokenizer.encode(row["text"]) + [tokenizer.eos])
             for row in rows]
    nats, count = -sum(naive_logprobs(model, *part).sum().item() for part in parts), sum(len(text) for _, text in parts)
    log, _ = small_run(seed=4, batch_size=6, steps=1)
    assert (log[0]["tokens"], log[0]["loss"]) == (count, pytest.approx(nats / count, abs=1e-4))
