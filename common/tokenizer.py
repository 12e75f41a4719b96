"""Byte-level BPE: merges learned here on the task's own documents, encoding done by tiktoken.

Small vocabularies (about 1k for `reviews`, 4k for `imdb`) because in a tiny GPT the output head
costs more than all the
layers: at d=128 and 4 layers, GPT-2's 50,257 tokens make a training step four to five times slower
than 4,096.

Every tokenizer has three ids of its own, after the merges: pad, bos (begin) and eos (end). They are
never produced by encoding text, so a text that contains "<|eos|>" cannot end a response. GPT-2's
own vocabulary has one special token, <|endoftext|>, which serves as all three; padding is still
recognised by lengths alone, never by its id.
"""
from __future__ import annotations

import base64
import hashlib
import heapq
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Iterable

import regex  # the engine with \p{L}; comes with tiktoken
import tiktoken

from common import fail
from common.files import atomic_write

# GPT-2's split into words (Radford et al. 2019): merges never cross these pieces
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
SPECIAL = ("pad", "bos", "eos")


class Tokenizer:
    """Text to ids and back.

    Args:
        ranks: bytes of each token -> its id; a lower id was merged earlier.
        special: ids of pad, bos and eos; by default the three ids after the last rank.
    """

    def __init__(self, ranks: dict[bytes, int], special: tuple[int, int, int] | None = None):
        self.ranks = ranks
        self.pad, self.bos, self.eos = special or tuple(len(ranks) + i for i in range(3))
        self.vocab_size = max(len(ranks), self.pad + 1, self.bos + 1, self.eos + 1)
        self._bpe = tiktoken.Encoding("bpe",
                                      pat_str=PATTERN,
                                      mergeable_ranks=ranks,
                                      special_tokens={})

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Prompt and response are encoded separately and joined, so no merge crosses
        between them."""
        return self._bpe.encode_ordinary(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._bpe.encode_ordinary_batch(texts, num_threads=2)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; pad, bos and eos are left out, bytes that are no UTF-8 become U+FFFD."""
        return self._bpe.decode([i for i in ids if i not in (self.pad, self.bos, self.eos)],
                                errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes that an id stands for; none for pad, bos and eos."""
        return b"" if id in (self.pad, self.bos,
                             self.eos) else self._bpe.decode_single_token_bytes(id)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that two tokenizers share only if they encode alike; checkpoints carry
        it."""
        return hashlib.sha256(self._text().encode()).hexdigest()[:16]

    def _text(self) -> str:
        lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in self.ranks.items()]
        return "\n".join(lines + [f"{name} {getattr(self, name)}" for name in SPECIAL]) + "\n"

    def save(self, path: str | Path) -> None:
        """tiktoken's text format (base64 token, rank), then a line each for pad, bos and eos."""
        atomic_write(path, self._text().encode())

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        try:
            rows = [line.split() for line in Path(path).read_text().splitlines()]
            special = tuple(int(rank) for _, rank in rows[-3:])
            assert [name for name, _ in rows[-3:]] == list(SPECIAL)
            return cls({base64.b64decode(token): int(rank) for token, rank in rows[:-3]}, special)
        except FileNotFoundError:
            fail(f"{path}: no such tokenizer file")
        except (ValueError, AssertionError):
            fail(f"{path}: not a tokenizer file (expected lines of 'base64-token rank', then pad, "
                 "bos and eos)")

    @classmethod
    def gpt2(cls, folder: str | Path | None = None) -> "Tokenizer":
        """GPT-2's vocabulary, from the vocab.json of a Hugging Face checkpoint folder, or from
        tiktoken (network)."""
        vocab = Path(folder, "vocab.json") if folder else None
        if vocab is None or not vocab.exists():
            try:
                return cls(tiktoken.get_encoding("gpt2")._mergeable_ranks, (50256, 50256, 50256))
            except Exception as error:  # requests' exceptions, which tiktoken imports lazily
                fail(f"GPT-2's vocabulary could not be fetched ({type(error).__name__}); offline, "
                     "put the checkpoint's vocab.json into its folder and give that folder: "
                     "--init FOLDER")
        to_byte = {letter: byte for byte, letter in enumerate(byte_letters())}
        ids = json.loads(vocab.read_text(encoding="utf-8"))
        end = ids.pop("<|endoftext|>", 50256)
        # a vocabulary of ours that was exported has three special tokens
        special = [ids.pop(f"<|{name}|>", end) for name in SPECIAL]
        return cls({bytes(to_byte[c] for c in token): i for token, i in ids.items()},
                   tuple(special))


def byte_letters() -> list[str]:
    """The letter by which GPT-2's files write each byte: those that print stand for themselves, the
    others for letters from U+0100 on, in order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn merges: join the most frequent adjacent pair, until the vocabulary is full (Sennrich et
    al. 2016).

    Counts are kept per distinct word and updated only where a merge applies, so 4,096 tokens on 20
    MB take seconds. Ties go to the pair with the smaller ids, so the result does not depend on the
    order of a dictionary.

    Args:
        vocab_size: size with the 256 bytes and the three special ids; fewer if the texts run out of
            pairs.
    """
    counts = Counter(word for text in texts for word in regex.findall(PATTERN, text))
    words = [list(word.encode()) for word in counts]  # each word as a list of ids
    weights = list(counts.values())
    tokens = [bytes([b]) for b in range(256)]
    # pair -> count; pair -> indices of the words that hold it
    pairs, where = Counter(), defaultdict(set)
    for i, ids in enumerate(words):
        for pair in zip(ids, ids[1:]):
            pairs[pair] += weights[i]
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    while heap and len(tokens) < vocab_size - len(SPECIAL):
        count, pair = heapq.heappop(heap)
        # an old entry: the count has changed since it was pushed
        if -count != pairs[pair] or not count:
            continue
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        changed = set()
        for i in where.pop(pair):
            old, merged, j = words[i], [], 0
            while j < len(old):
                if tuple(old[j:j + 2]) == pair:
                    merged.append(new)
                    j += 2
                else:
                    merged.append(old[j])
                    j += 1
            for p in zip(old, old[1:]):
                pairs[p] -= weights[i]
                changed.add(p)
            for p in zip(merged, merged[1:]):
                pairs[p] += weights[i]
                where[p].add(i)
                changed.add(p)
            words[i] = merged
        for p in changed:
            if pairs[p] > 0:
                heapq.heappush(heap, (-pairs[p], p))
    return Tokenizer({token: rank for rank, token in enumerate(tokens)})
