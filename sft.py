"""Supervised fine-tuning: next-token prediction, the policy that every preference method starts from.

    L(theta) = - E_{y ~ documents} [ sum_t log pi_theta(y_t | y_<t) ] / tokens           (Radford et al. 2019)

    python sft.py                          # `reviews`: half a minute on 2 cores; the loss nears the grammar's entropy
    python sft.py --dataset imdb           # about an hour on 2 cores; 1.46 bits per byte
    python sft.py --dataset tldr           # after `--on pretrain`, on all posts there are, from which it starts
    python sft.py --on chosen              # Preferred-FT (Rafailov et al. 2023, section 6): the same loss on the chosen
                                           # responses of the pairs, log pi(chosen | prompt), from the SFT policy

Reads   data/<dataset>/prepared/ (made if it is missing); --on chosen: the pairs of the runs folder, or --pairs FILE
Writes  runs/<dataset>/sft/ : config.json, log.jsonl, model.pt, tokenizer.tiktoken

A document is <bos> tokens <eos>, cut at block_size; a document that is cut has no <eos>. Where a row has a "prompt" beside
its "text" (`posts`), the document is <bos> prompt text <eos>, and the loss counts the text only. Held-out loss is in nats
a document and in bits per byte, which compares across tokenizers.
"""
from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from tqdm import tqdm

from common import tasks
import evaluate
from common import fail
from common.files import read_jsonl, sha256
from common.run import Run, check_folder, finished
from common.settings import defaults, parse, require, require_numbers, runs_folder
from common.training import autocast, batches, device, fingerprint, pad, warmup_cosine
from common.pairs import default_labels, encode_pairs, read_pairs
from common.tokenizer import Tokenizer
from common.gpt2 import GPT2_NAMES, from_pretrained, pretrained_folder
from common.run import load_run
from model import GPT, GPTConfig, response_logprobs, summed_logprobs


@dataclass
class Config:
    dataset: str = "reviews"  # a folder of data/
    preset: str = "cpu"  # defaults for a machine: cpu, or gpu (imdb)
    on: Literal["documents", "chosen", "pretrain"] = "documents"  # chosen = Preferred-FT; pretrain (tldr) = pretrain.jsonl
    init: str = ""  # start from a finished run (tldr: runs/tldr/pretrained), a GPT-2 name (gpt2, gpt2-medium, ...) or a
    # GPT-2 checkpoint folder; its size then wins over --n-layer, --n-head and --n-embd
    pairs: str = ""  # --on chosen: the pairs file, if not the one in the runs folder
    out: str = ""  # run folder, if not runs/<dataset>/sft (or preferred-ft, pretrained)
    n_layer: int = 2  # blocks
    n_head: int = 4  # attention heads
    n_embd: int = 128  # channels
    block_size: int = 80  # tokens of a document, <bos> and <eos> included
    batch_size: int = 32  # documents a step
    micro_batch_size: int = 0  # documents a forward pass, if memory is short; 0 = all at once; same gradient
    steps: int = 500  # optimizer steps
    lr: float = 4e-3  # peak learning rate
    warmup: int = 50  # steps of linear warm-up, then a cosine to a tenth
    weight_decay: float = 0.1  # of the blocks' matrices
    max_grad_norm: float = 1.0  # gradient clipping
    seed: int = 0  # initial weights and order of the documents
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products; auto = bfloat16 on CUDA only
    compile: bool = False  # torch.compile the model
    evaluate_every: int = 0  # --on chosen: steps between evaluations on the test prompts; 0 = only at the end
    checkpoint_every: float = 60.0  # seconds between checkpoints
    resume: bool = False  # go on from the last checkpoint

    PRESETS: ClassVar[dict] = {
        ("reviews", "cpu", "chosen"): dict(steps=300, lr=5e-4),  # one pass over the pairs
        ("imdb", "cpu", "chosen"): dict(steps=700, lr=3e-4),
        ("posts", "cpu", "chosen"): dict(steps=280, lr=5e-4),  # one pass over the pairs
        ("posts", "cpu"): dict(block_size=224, steps=1000),  # 3.5 minutes on one core
        ("tldr", "cpu", "chosen"): dict(steps=170, lr=3e-4),
        ("tldr", "cpu", "pretrain"): dict(n_layer=4, n_head=4, n_embd=256, block_size=320, steps=1900, lr=3e-3, warmup=200),
        ("tldr", "cpu"): dict(block_size=320, steps=140, lr=1e-3, warmup=20),  # 2 passes; one of pretraining takes 40 minutes
        ("imdb", "cpu"): dict(n_layer=4, n_head=4, n_embd=256, block_size=96, batch_size=32, steps=6500, lr=3e-3, warmup=200),
        ("imdb", "gpu"): dict(n_layer=10, n_head=8, n_embd=512, block_size=256, batch_size=256, steps=3000, lr=1.5e-3,
                              warmup=200),
    }

    def __post_init__(self) -> None:
        require_numbers(self, above_0="n_layer n_head n_embd batch_size steps lr warmup max_grad_norm",
                        from_0="micro_batch_size weight_decay seed evaluate_every checkpoint_every")
        require(self.block_size > 2, f"--block-size {self.block_size}: must be > 2")
        require(self.on == "chosen" or not self.pairs, "--pairs: needs --on chosen")
        require(self.on == "chosen" or not self.evaluate_every, "--evaluate-every: needs --on chosen")
        runs = runs_folder(self.dataset, self.preset)
        names = {"documents": "sft", "chosen": "preferred-ft", "pretrain": "pretrained"}
        self.out = self.out or str(runs / names[self.on])
        if self.on == "documents" and (self.dataset, self.preset, "pretrain") in self.PRESETS:  # too few documents
            self.init = self.init or str(runs / names["pretrain"])
        if self.on == "chosen":
            self.init = self.init or str(runs / "sft")
            self.pairs = self.pairs or str(runs / f"pairs-{default_labels(self.dataset)}" / "pairs.jsonl")


def encode_documents(texts: list[str], tokenizer: Tokenizer, block_size: int) -> list[list[int]]:
    """<bos> tokens <eos>, at most block_size ids each; one that had to be cut ends without <eos>."""
    texts = [text[:block_size * 16] for text in texts]  # no need to encode what will be cut (a token has < 16 letters)
    return [([tokenizer.bos] + ids + [tokenizer.eos])[:block_size] for ids in tokenizer.encode_batch(texts)]


def read_documents(path: Path, tokenizer: Tokenizer, block_size: int) -> tuple[list[list[int]], list[int]]:
    """Ids of a file's documents, and how many of them are given: <bos>, and the "prompt" of a row that has one."""
    rows = read_jsonl(path, {"text": str})
    if bad := [row["line"] for row in rows if not isinstance(row.get("prompt", ""), str)]:
        fail(f"{path}, line {bad[0]}: field 'prompt' is no text")
    prompts = [[tokenizer.bos] + ids for ids in tokenizer.encode_batch([row.get("prompt", "") for row in rows])]
    for row, prompt in zip(rows, prompts):
        if len(prompt) >= block_size:
            fail(f"{path}, line {row['line']}: no room for the text: prompt {len(prompt)} tokens, block size {block_size}")
    texts = encode_documents([row["text"] for row in rows], tokenizer, block_size)
    return [(prompt + text[1:])[:block_size] for prompt, text in zip(prompts, texts)], [len(prompt) for prompt in prompts]


def optimizers_for(model: GPT, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for embeddings, biases and LayerNorms.

    From random weights the held-out loss falls as far in half as many steps as with AdamW alone.
    """
    matrices = [p for name, p in model.named_parameters() if "h." in name and p.dim() == 2]
    rest = [p for name, p in model.named_parameters() if not ("h." in name and p.dim() == 2)]
    return [torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, weight_decay=0.0, betas=(0.9, 0.95), fused=True)]


def held_out(model: GPT, tokens: torch.Tensor, prompt_lengths: torch.Tensor, lengths: torch.Tensor, tokenizer: Tokenizer,
             dtype: str) -> dict[str, float]:
    """Loss on held-out rows: nats a token, nats a document, and bits per byte (the <eos> costs bits and has no bytes)."""
    nats = -summed_logprobs(model, tokens, prompt_lengths, lengths, dtype).double().sum().item()
    count = int((lengths - prompt_lengths).sum())
    size = sum(len(tokenizer.token_bytes(i)) for row, start, end in
               zip(tokens.tolist(), prompt_lengths.tolist(), lengths.tolist()) for i in row[start:end])
    return {"nats_per_token": nats / count, "nats_per_document": nats / len(tokens), "bits_per_byte": nats / size / math.log(2)}


def train(config: Config) -> Path:
    """Train, and return the run folder."""
    # ---- 1) data: rows of ids; the loss counts positions from prompt_lengths on --------------------------------------
    check_folder(config)
    pair_rows = read_pairs(config.pairs) if config.on == "chosen" else []
    folder = tasks.ensure(config.dataset)
    if config.on == "pretrain" and not (folder / "pretrain.jsonl").exists():
        fail(f"--on pretrain: {folder} has no pretrain.jsonl")
    if config.on == "documents" and (config.dataset, config.preset, "pretrain") in config.PRESETS:
        before = defaults(Config, config.dataset, config.preset, on="pretrain", dtype=config.dtype, resume=True)
        if config.init == before.out and not (Path(before.out) / "model.pt").exists():
            train(before)
    if config.init and (Path(config.init) / "log.jsonl").exists():  # a run of ours
        model, meta = load_run(config.init)
        tokenizer = Tokenizer.load(Path(config.init) / "tokenizer.tiktoken")
        evaluate.check_same_task(config.init, meta, {"tokenizer": tokenizer.fingerprint})
    elif config.init:
        if config.init not in GPT2_NAMES and not Path(config.init).is_dir():
            fail(f"--init {config.init}: no finished run, no folder, and not one of {', '.join(GPT2_NAMES)}")
        model, tokenizer = from_pretrained(config.init), Tokenizer.gpt2(pretrained_folder(config.init))
    else:
        tokenizer = Tokenizer.load(folder / "tokenizer.tiktoken")
        torch.manual_seed(config.seed)
        model = GPT(GPTConfig(tokenizer.vocab_size, config.block_size, config.n_layer, config.n_head, config.n_embd))
    model = model.to(device()).train()
    block_size = min(config.block_size, model.config.block_size)
    if config.on != "chosen":
        held = folder / ("valid.jsonl" if (folder / "valid.jsonl").exists() else "test.jsonl")
        documents = folder / ("train.jsonl" if config.on == "documents" else "pretrain.jsonl")
        (rows, prompts), (held_rows, held_prompts) = (read_documents(path, tokenizer, block_size)
                                                      for path in (documents, held))
    else:
        encoded = encode_pairs(pair_rows, tokenizer, block_size, config.pairs)
        if len(encoded) < 2:
            fail(f"{config.pairs}: one pair, expected at least two, as one in 20 is held out")
        rows, prompts = [row.prompt + row.chosen for row in encoded], [len(row.prompt) for row in encoded]
        held_rows, held_prompts = rows[-len(rows) // 20:], prompts[-len(rows) // 20:]
        rows, prompts = rows[:-len(held_rows)], prompts[:-len(held_rows)]
    tokens, lengths = pad(rows, tokenizer.pad)
    prompt_lengths = torch.tensor(prompts)
    held_tokens, held_lengths = pad(held_rows[:1000], tokenizer.pad)
    held_prompt_lengths = torch.tensor(held_prompts[:1000])

    if config.evaluate_every:  # the reference is the policy that Preferred-FT starts from
        if not (Path(config.init) / "model.pt").exists():
            fail(f"--evaluate-every: needs the run folder of an SFT policy as --init, not {config.init}")
        base, ref = Path(config.init).parent, copy.deepcopy(model).eval()
        gold = evaluate.gold_reward(config.dataset, base)
        bank = evaluate.ensure_bank(base, config.dataset, config.preset, ref, tokenizer, fingerprint(ref.state_dict()), gold)

    # ---- 2) optimizer and run folder ---------------------------------------------------------------------------------
    optimizers = optimizers_for(model, config.lr, config.weight_decay)
    built_from = {"tokenizer": tokenizer.fingerprint, "rows": len(rows)}
    built_from |= {"init": fingerprint(model.state_dict())} if config.init else {}
    built_from |= {"pairs": sha256(config.pairs)} if config.on == "chosen" else {}
    run = Run(config, model, optimizers, built_from)
    forward = torch.compile(response_logprobs) if config.compile else response_logprobs
    order = batches(lengths, config.batch_size, config.seed)
    for _ in range(run.step):
        next(order)

    # ---- 3) train ----------------------------------------------------------------------------------------------------
    size = sum(p.numel() for p in model.parameters()) / 1e6
    bar = tqdm(range(run.step, config.steps), f"SFT {size:.1f}M on {config.dataset}", config.steps, initial=run.step)
    for step in bar:
        if config.evaluate_every and step % config.evaluate_every == 0:
            evaluate.along(run, step, model, ref, tokenizer, bank, gold)
        lr = config.lr * warmup_cosine(step, config.steps, config.warmup)
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = lr
        batch = next(order)
        count = int((lengths[batch] - prompt_lengths[batch]).sum())  # of the whole batch, so micro-batches add up to it
        loss = 0.0
        for rows in batch.split(config.micro_batch_size or len(batch)):
            with autocast(config.dtype):
                logprobs = forward(model, *(x[rows].to(device()) for x in (tokens, prompt_lengths, lengths)))
            part = -logprobs.sum() / count
            part.backward()
            loss += part.item()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).item()
        run.check_finite(step, batch, loss=loss, grad_norm=grad_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        row = {"step": step, "loss": loss, "grad_norm": grad_norm, "lr": lr, "tokens": count}
        if step and step % 500 == 0:
            row |= held_out(model, held_tokens, held_prompt_lengths, held_lengths, tokenizer, config.dtype)
        if step % 10 == 0:
            run.log(**row)
            bar.set_postfix_str(f"loss {loss:.3f} nats/token")
        run.checkpoint(step + 1)

    # ---- 4) held-out loss, and the model -----------------------------------------------------------------------------
    result = held_out(model.eval(), held_tokens, held_prompt_lengths, held_lengths, tokenizer, config.dtype)
    if config.evaluate_every:
        evaluate.along(run, config.steps, model, ref, tokenizer, bank, gold)
    run.log(step=config.steps, seconds=run.seconds(), **result)
    tokenizer.save(run.folder / "tokenizer.tiktoken")
    run.finish(kind="GPT", architecture=asdict(model.config), dataset=config.dataset, tokenizer=tokenizer.fingerprint)
    print(f"held-out loss: {result['nats_per_token']:.3f} nats a token, {result['nats_per_document']:.1f} nats a document, "
          f"{result['bits_per_byte']:.3f} bits per byte  ->  {run.folder}")
    return run.folder


def ensure(sft: str, dataset: str, preset: str, dtype: str = "auto") -> Path:
    """The SFT run that the later stages start from: the folder given, or the default one, trained if it is missing."""
    if sft:
        return Path(sft)
    config = defaults(Config, dataset, preset, dtype=dtype, resume=True)
    return Path(config.out) if finished(config) else train(config)


if __name__ == "__main__":
    train(parse(Config, __doc__))
