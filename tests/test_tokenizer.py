"""data/tokenizer.py: byte-level BPE against the algorithm done the slow way, special ids, files, GPT-2's vocabulary."""
import json
import os
import shutil
from pathlib import Path

import pytest
import regex

from common.tokenizer import PATTERN, Tokenizer, train_bpe

CORPUS = ["the cat sat on the mat, the rat sat on the cat", "banana bandana ananas aaaaaaa aaaa", "hugs hug pug pun bun hugs",
          "It wasn't 1984; it's 2024! naïve café ☕☕ 日本語 日本", "  two  spaces\n\nand lines\t\tand tabs  "]


def naive_bpe(texts, merges):
    """Token bytes, in order: every step counts all adjacent pairs from scratch; ties go to the smaller ids."""
    words = [list(word.encode()) for text in texts for word in regex.findall(PATTERN, text)]
    tokens = [bytes([b]) for b in range(256)]
    for _ in range(merges):
        counts = {}
        for word in words:
            for pair in zip(word, word[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        tokens.append(tokens[best[0]] + tokens[best[1]])
        for i, word in enumerate(words):
            merged = []
            while word:
                pair = tuple(word[:2]) == best
                merged.append(len(tokens) - 1 if pair else word[0])
                word = word[2 if pair else 1:]
            words[i] = merged
    return tokens, words


@pytest.mark.parametrize("merges", [1, 10, 40, 10_000])
def test_merges_are_those_of_the_slow_algorithm(merges):
    tokenizer = train_bpe(CORPUS, 256 + merges + 3)
    tokens, words = naive_bpe(CORPUS, merges)
    assert sorted(tokenizer.ranks, key=tokenizer.ranks.get) == tokens
    assert tokenizer.vocab_size == len(tokens) + 3
    assert [i for text in CORPUS for i in tokenizer.encode(text)] == [i for word in words for i in word]


TEXTS = ["", " ", "plain words.", "naïve café", "日本語のテキスト", "👩‍👩‍👧 family", "\x00\x01\x7f", "﷽ e\u0301",
         "mixed \n\t  white \r\n space ", "a" * 300, "\U0010fffd", "<|endoftext|>", "it's I'LL we've"]


def test_any_text_comes_back():
    tokenizer = train_bpe(CORPUS, 300)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_no_text_encodes_to_a_special_id():
    tokenizer = train_bpe(CORPUS + ["pad bos eos <|eos|> <|endoftext|> </s>"] * 20, 400)
    special = {tokenizer.pad, tokenizer.bos, tokenizer.eos}
    assert special == {tokenizer.vocab_size - 3, tokenizer.vocab_size - 2, tokenizer.vocab_size - 1}
    for text in ["pad", "bos", "eos", "<pad>", "<|eos|>", "<|endoftext|>", "</s>", *TEXTS]:
        assert not special & set(tokenizer.encode(text))


def test_special_ids_have_no_text_and_half_a_character_is_marked():
    tokenizer = train_bpe(CORPUS, 256 + 3)
    assert tokenizer.decode([tokenizer.bos, *tokenizer.encode("hi"), tokenizer.eos, tokenizer.pad, tokenizer.pad]) == "hi"
    assert tokenizer.token_bytes(tokenizer.eos) == b""
    assert tokenizer.decode("日".encode()[:2]) == "\ufffd"


def test_a_saved_tokenizer_is_the_same_one(tmp_path):
    tokenizer = train_bpe(CORPUS, 300)
    tokenizer.save(tmp_path / "t.tiktoken")
    loaded = Tokenizer.load(tmp_path / "t.tiktoken")
    assert (loaded.ranks, loaded.pad, loaded.bos, loaded.eos) == (tokenizer.ranks, tokenizer.pad, tokenizer.bos, tokenizer.eos)
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.vocab_size == 300
    loaded.save(tmp_path / "again.tiktoken")
    assert (tmp_path / "again.tiktoken").read_bytes() == (tmp_path / "t.tiktoken").read_bytes()


def test_fingerprint_tells_tokenizers_apart():
    """By a merge, by the order of merges, by a special id."""
    tokenizer = train_bpe(CORPUS, 300)
    other_merge = {**{t: r for t, r in tokenizer.ranks.items() if r != 296}, b"qz": 296}
    swapped = {t: {295: 296, 296: 295}.get(r, r) for t, r in tokenizer.ranks.items()}
    others = [Tokenizer(other_merge), Tokenizer(dict(sorted(swapped.items(), key=lambda item: item[1]))),
              Tokenizer(tokenizer.ranks, (297, 299, 298)), train_bpe(CORPUS, 299)]
    assert len({tokenizer.fingerprint, *(other.fingerprint for other in others)}) == 5
    assert train_bpe(CORPUS, 300).fingerprint == tokenizer.fingerprint


def test_learning_does_not_depend_on_the_order_of_documents():
    assert train_bpe(CORPUS[::-1], 330).fingerprint == train_bpe(CORPUS, 330).fingerprint


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"\xff\xfe" + b, lambda b: b"",
                                    lambda b: b + b"x y z\n"])
def test_a_damaged_file_stops_with_its_name(tmp_path, damage):
    path = tmp_path / "t.tiktoken"
    train_bpe(CORPUS, 300).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SystemExit, match="t.tiktoken: not a tokenizer file"):
        Tokenizer.load(path)
    with pytest.raises(SystemExit, match="none.tiktoken: no such tokenizer file"):
        Tokenizer.load(tmp_path / "none.tiktoken")


# ---- GPT-2's vocabulary ----------------------------------------------------------------------------------------------

def test_gpt2_files_write_bytes_as_printable_characters(tmp_path):
    """A small vocab.json in GPT-2's spelling: Ġ (U+0120) is the space, Ċ (U+010A) the newline, printable ASCII itself."""
    units = [chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))] + [chr(256 + i) for i in range(68)]
    vocab = {unit: i for i, unit in enumerate(units)} | {"Ġa": 256, "Ċ!": 257, "<|endoftext|>": 258}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    tokenizer = Tokenizer.gpt2(tmp_path)
    assert (tokenizer.token_bytes(256), tokenizer.token_bytes(257)) == (b" a", b"\n!")
    assert tokenizer.pad == tokenizer.bos == tokenizer.eos == 258 and tokenizer.vocab_size == 259
    assert tokenizer.encode("a a") == [vocab["a"], 256]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gpt2s_own_vocabulary(tmp_path):
    """The ids that GPT-2 is known to give."""
    if not (folder := os.environ.get("PREFERENCE_DATA")):
        pytest.skip("PREFERENCE_DATA is not set: GPT-2's vocabulary file is not here")
    shutil.copy(Path(folder, "gpt2_bpe", "encoder.json"), tmp_path / "vocab.json")
    tokenizer = Tokenizer.gpt2(tmp_path)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode("Hello, y'all! How are you 😁 ?") == [15496, 11, 331, 6, 439, 0, 1374, 389, 345, 30325, 223, 5633]
    assert tokenizer.encode("<|endoftext|>") != [50256] and tokenizer.eos == 50256
    assert tokenizer.vocab_size == 50257
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
