"""Supervised fine-tuning: next-token prediction, the policy that every preference method starts
from.

    L(theta) = - E_{y ~ documents} [ sum_t log pi_theta(y_t | y_<t) ] / tokens
                                                                     (Radford et al. 2019)

    python sft.py                    # 40 seconds; the loss nears the grammar's entropy
    python sft.py --dataset imdb     # about an hour on 2 cores; 1.46 bits per byte
    python sft.py --dataset FOLDER   # your own texts, see common/own_data.py
    python sft.py --dataset tldr     # starts from `--on pretrain`, on all posts there are
    python sft.py --on chosen        # Preferred-FT (Rafailov et al. 2023, section 6): the same loss
                                     # on the chosen responses of the pairs, from the SFT policy

Reads   data/<dataset>/prepared/ (made if it is missing); --on chosen: the SFT policy and its pairs
        (made, too), or --pairs
Writes  runs/<dataset>/sft/ : config.json, log.jsonl, model.pt, tokenizer.tiktoken

A document is <bos> tokens <eos>, cut at block_size; a document that is cut has no <eos>. Where a
row has a "prompt" beside its "text" (`posts`), the document is <bos> prompt text <eos>, and the
loss counts the text only. Held-out loss is in nats per document and in bits per byte, which
compares across tokenizers.
"""
from __future__ import annotations

import common  # noqa: F401  first, so that Ctrl-C while torch is imported is one line, too

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import evaluate
from common import fail, pipeline, tasks
from common.files import read_jsonl, sha256
from common.gpt2 import GPT2_NAMES, from_pretrained, pretrained_folder
from common.pairs import encode_pairs, read_pairs
from common.processes import add_gradients, mine, share
from common.run import Run, check_folder, check_same_task, load_run
from common.settings import (parse, require, require_numbers, require_processes, run_folder,
                             settings)
from common.sharding import shard
from common.tokenizer import Tokenizer
from common.training import (Device, Dtype, autocast, batches, check_steps, device, fingerprint,
                             pad, set_lr, warmup_cosine, use_device)
from model import GPT, GPTConfig, response_logprobs, summed_logprobs

# on average no text has more: what a block has no room for need not be encoded
LETTERS_PER_TOKEN = 16


@settings
class Config:
    dataset: str = "reviews"  # Task: a folder of data/, or one of your own files.
    preset: str = "cpu"  # Kind of machine that the task's sizes are meant for.

    # ---- what it learns from
    on: Literal["documents", "chosen", "pretrain"] = "documents"  # What it learns from: the
    # task's documents, the pairs' chosen responses (Preferred-FT), or pretrain.jsonl (tldr).
    init: str = ""  # Start from a finished run, a GPT-2 name (gpt2, gpt2-medium, ...) or a folder
    # with a GPT-2 checkpoint; its size then wins over --n-layer, --n-head and --n-embd.
    pairs_seed: int = 0  # Seed of the pairs: which prompts, which responses, which labels.
    pairs: str = ""  # Pairs of --on chosen, if not those that are sampled from the SFT policy.

    # ---- the model
    n_layer: int = 2  # Transformer blocks.
    n_head: int = 4  # Attention heads.
    n_embd: int = 128  # Channels.
    block_size: int = 80  # Tokens of a document, <bos> and <eos> included.

    # ---- optimisation
    batch_size: int = 32  # Documents per step.
    micro_batch_size: int = 0  # Documents per forward pass if memory is short; 0 = all.
    steps: int = 500  # Optimizer steps.
    lr: float = 4e-3  # Peak learning rate.
    warmup: int = 50  # Steps of linear warm-up; then a cosine down to a tenth of the rate.
    weight_decay: float = 0.1  # Weight decay of the blocks' matrices.
    max_grad_norm: float = 1.0  # Norm at which gradients are clipped.
    seed: int = 0  # Seed of the initial weights and of the order of the documents.
    dtype: Dtype = "auto"  # Number format of matrix products; auto = bfloat16 on CUDA.
    device: Device = "auto"  # Where it is computed; auto = CUDA where there is one, else the CPU.
    compile: bool = False  # Use torch.compile on the model.
    shard: bool = False  # Share the weights, too, between the processes of torchrun (FSDP2).

    # ---- the run
    out: str = ""  # Run folder, if not one named by the settings: sft, preferred-ft, pretrained.
    evaluate_every: int = 0  # Steps between evaluations on test prompts (--on chosen); 0 = none.
    checkpoint_every: float = 60.0  # Seconds between checkpoints.
    resume: bool = False  # Go on from the last checkpoint.

    def __post_init__(self) -> None:
        require_processes(self)
        require_numbers(self,
                        above_0="n_layer n_head n_embd batch_size steps lr warmup max_grad_norm",
                        from_0="pairs_seed micro_batch_size weight_decay seed evaluate_every "
                        "checkpoint_every")
        require(2 < self.block_size < 10**9,
                f"--block-size {self.block_size}: must be > 2 and below 10^9")
        require(self.on == "chosen" or not self.pairs, "--pairs: needs --on chosen")
        require(self.on == "chosen" or not self.pairs_seed, "--pairs-seed: needs --on chosen")
        require(not (self.pairs_seed and self.pairs), "--pairs-seed: not with --pairs")
        require(self.on == "chosen" or not self.evaluate_every,
                "--evaluate-every: needs --on chosen")
        names = {"documents": "sft", "chosen": "preferred-ft", "pretrain": "pretrained"}
        self.out = self.out or run_folder(self, names[self.on])


# ---- documents -----------------------------------------------------------------------------------

@dataclass
class Rows:
    """Token rows; the loss counts the positions from prompt_lengths on."""
    tokens: torch.Tensor  # (N, T)
    prompt_lengths: torch.Tensor  # (N,) <bos> at least
    lengths: torch.Tensor  # (N,)

    @classmethod
    def of(cls, rows: list[list[int]], prompt_lengths: list[int], pad_id: int) -> Rows:
        tokens, lengths = pad(rows, pad_id)
        return cls(tokens, torch.tensor(prompt_lengths), lengths)


def encode_documents(texts: list[str], tokenizer: Tokenizer, block_size: int) -> list[list[int]]:
    """<bos> tokens <eos>, at most block_size ids each; one that had to be cut ends without
    <eos>."""
    limit = block_size * LETTERS_PER_TOKEN
    rows = []
    for text, ids in zip(texts, tokenizer.encode_batch([text[:limit] for text in texts])):
        end = [tokenizer.eos] if len(text) <= limit else []
        rows.append(([tokenizer.bos] + ids + end)[:block_size])
    return rows


def read_documents(path: Path, tokenizer: Tokenizer,
                   block_size: int) -> tuple[list[list[int]], list[int]]:
    """Ids of a file's documents, and how many of them are given: <bos>, and the "prompt" of a row
    that has one."""
    rows = read_jsonl(path, {"text": str})
    for row in rows:
        if not isinstance(row.get("prompt", ""), str):
            fail(f"{path}, line {row['line']}: field 'prompt' is no text")
    prompts = [[tokenizer.bos] + ids
               for ids in tokenizer.encode_batch([row.get("prompt", "") for row in rows])]
    for row, prompt in zip(rows, prompts):
        if len(prompt) >= block_size:
            fail(f"{path}, line {row['line']}: no room for the text: prompt {len(prompt)} tokens, "
                 f"block size {block_size}")
    texts = encode_documents([row["text"] for row in rows], tokenizer, block_size)
    documents = [(prompt + text[1:])[:block_size] for prompt, text in zip(prompts, texts)]
    return documents, [len(prompt) for prompt in prompts]


def document_rows(config: Config, tokenizer: Tokenizer, block_size: int) -> tuple[Rows, Rows]:
    """The documents to train on, and up to 1,000 that are held out."""
    folder = tasks.prepared(config.dataset)
    if config.on == "pretrain" and not (folder / "pretrain.jsonl").exists():
        fail(f"--on pretrain: {folder} has no pretrain.jsonl")
    documents = read_documents(folder / training_file(config), tokenizer, block_size)
    held_file = folder / ("valid.jsonl" if (folder / "valid.jsonl").exists() else "test.jsonl")
    held, held_prompts = read_documents(held_file, tokenizer, block_size)
    return Rows.of(*documents, tokenizer.pad), Rows.of(held[:1000], held_prompts[:1000],
                                                       tokenizer.pad)


def training_file(config: Config) -> str:
    return "pretrain.jsonl" if config.on == "pretrain" else "train.jsonl"


def chosen_rows(path: str, pair_rows: list[dict], tokenizer: Tokenizer,
                block_size: int) -> tuple[Rows, Rows]:
    """Prompts with their chosen responses, and the last twentieth of them, held out."""
    pairs = encode_pairs(pair_rows, tokenizer, block_size, path)
    if len(pairs) < 2:
        fail(f"{path}: one pair, expected at least two, as one in 20 is held out")
    rows = [pair.prompt + pair.chosen for pair in pairs]
    prompts = [len(pair.prompt) for pair in pairs]
    held = -(-len(rows) // 20)
    return (Rows.of(rows[:-held], prompts[:-held], tokenizer.pad),
            Rows.of(rows[-held:][:1000], prompts[-held:][:1000], tokenizer.pad))


# ---- the model and its optimizers ----------------------------------------------------------------

def initial_weights(config: Config) -> str:
    """What the model starts from: --init; for Preferred-FT the SFT policy; the pretrained model of
    a task that has one."""
    if config.init or config.on == "pretrain":
        return config.init
    if config.on == "chosen":
        return str(pipeline.sft_policy("", config.dataset, config.preset, config.dtype))
    return str(pipeline.pretrained(config.dataset, config.preset, config.dtype) or "")


def initial_model(config: Config, init: str) -> tuple[GPT, Tokenizer]:
    """A model of random weights, a finished run's or GPT-2's, and the tokenizer that goes with
    it."""
    if not init:
        tokenizer = Tokenizer.load(tasks.prepared(config.dataset) / "tokenizer.tiktoken")
        torch.manual_seed(config.seed)
        sizes = GPTConfig(tokenizer.vocab_size, config.block_size, config.n_layer, config.n_head,
                          config.n_embd)
        return GPT(sizes), tokenizer
    folder = Path(init)
    # a run of ours
    if any((folder / name).exists() for name in ("model.pt", "checkpoint.pt", "log.jsonl")):
        model, meta = load_run(folder)
        tokenizer = Tokenizer.load(folder / "tokenizer.tiktoken")
        check_same_task(folder, meta, {"tokenizer": tokenizer.fingerprint})
        return model, tokenizer
    if init not in GPT2_NAMES and not folder.is_dir():
        fail(f"--init {init}: no finished run, no folder, and not one of {', '.join(GPT2_NAMES)}")
    return from_pretrained(init), Tokenizer.gpt2(pretrained_folder(init))


def optimizers_for(model: GPT, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for embeddings, biases and
    LayerNorms.

    From random weights the held-out loss falls as far in half as many steps as with AdamW alone.
    """
    named = list(model.named_parameters())
    matrices = [p for name, p in named if "h." in name and p.dim() == 2]
    rest = [p for name, p in named if not ("h." in name and p.dim() == 2)]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay,
                         adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, weight_decay=0.0, betas=(0.9, 0.95), fused=True)
    ]


def held_out_loss(model: GPT, rows: Rows, tokenizer: Tokenizer, dtype: str) -> dict[str, float]:
    """Loss on held-out rows: nats per token, nats per document, and bits per byte (the <eos> costs
    bits and has no bytes)."""
    logprobs = summed_logprobs(model, rows.tokens, rows.prompt_lengths, rows.lengths, dtype)
    nats = -logprobs.double().sum().item()
    size = 0  # bytes
    for row, start, end in zip(rows.tokens.tolist(), rows.prompt_lengths.tolist(),
                               rows.lengths.tolist()):
        size += sum(len(tokenizer.token_bytes(token)) for token in row[start:end])
    tokens = int((rows.lengths - rows.prompt_lengths).sum())
    return {"nats_per_token": nats / tokens, "nats_per_document": nats / len(rows.tokens),
            "bits_per_byte": nats / size / math.log(2)}


def train(config: Config) -> Path:
    """Train, and return the run folder."""
    # ---- 1) data and model -----------------------------------------------------------------------
    use_device(config.device)
    check_folder(config)
    pipeline.check_own_files(config)
    # of Preferred-FT: what it learns from, and what it is measured with
    pairs_file, start = pipeline.own_pairs_file(config) if config.on == "chosen" else "", None
    pair_rows = read_pairs(pairs_file) if pairs_file else []
    init = initial_weights(config)
    if config.on == "chosen" and (config.evaluate_every or not pairs_file):
        start = preferred_ft_start(config, init)
        if not pairs_file:
            labels = tasks.load(config.dataset).labels
            pairs_file = str(pipeline.sampled_pairs(start, labels, seed=config.pairs_seed))
        pair_rows = pair_rows or read_pairs(pairs_file)

    model, tokenizer = initial_model(config, init)
    model = model.to(device()).train()
    if config.shard:
        shard(model)
    block_size = min(config.block_size, model.config.block_size)
    if config.on == "chosen":
        rows, held = chosen_rows(pairs_file, pair_rows, tokenizer, block_size)
    else:
        rows, held = document_rows(config, tokenizer, block_size)

    # ---- 2) optimizers and run folder ------------------------------------------------------------
    optimizers = optimizers_for(model, config.lr, config.weight_decay)
    check_steps(config.steps, config.warmup)
    run = Run(config, model, optimizers, built_from(config, pairs_file), config.steps)
    batch_iterator = batches(rows.lengths, config.batch_size, config.seed, start=run.step)
    forward = torch.compile(response_logprobs) if config.compile else response_logprobs

    # ---- 3) train --------------------------------------------------------------------------------
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    name = f"SFT {millions:.1f}M on {config.dataset}"
    bar = tqdm(range(run.step, config.steps), name, config.steps, initial=run.step)
    for step in bar:
        if config.evaluate_every and step % config.evaluate_every == 0:
            evaluate.log_evaluation(run, step, model, start)
        lr = config.lr * warmup_cosine(step, config.steps, config.warmup)
        set_lr(optimizers, lr)

        batch = next(batch_iterator)  # (B,) numbers of documents
        tokens_of_batch = int((rows.lengths[batch] - rows.prompt_lengths[batch]).sum())
        loss = torch.zeros(1, dtype=torch.float64)
        for part in mine(batch).split(config.micro_batch_size or len(batch)):
            with autocast(config.dtype):
                logprobs = forward(model, rows.tokens[part].to(device()),
                                   rows.prompt_lengths[part].to(device()),
                                   rows.lengths[part].to(device()))  # (b, T)
            # divided by the whole batch's tokens: micro-batches add up to the mean over these
            part_of_loss = -logprobs.sum() / tokens_of_batch
            part_of_loss.backward()
            loss += part_of_loss.item()

        add_gradients(model)  # of several processes, each with its share of the rows
        share(loss)
        loss = loss.item()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).item()
        run.check_finite(step, batch, loss=loss, grad_norm=grad_norm)  # stop before a NaN spreads
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        if step % 10 == 0:
            row = dict(step=step, loss=loss, grad_norm=grad_norm, lr=lr, tokens=tokens_of_batch)
            if step and step % 500 == 0:
                row |= held_out_loss(model, held, tokenizer, config.dtype)
            run.log(**row)
            bar.set_postfix_str(f"loss {loss:.3f} nats/token")
        run.checkpoint(step + 1)

    # ---- 4) held-out loss, and the model ---------------------------------------------------------
    result = held_out_loss(model.eval(), held, tokenizer, config.dtype)
    if config.evaluate_every:
        evaluate.log_evaluation(run, config.steps, model, start)
    run.log(step=config.steps, seconds=run.seconds(), **result)
    run.finish(model, tokenizer)
    if tasks.is_own(config.dataset):
        evaluate.show_samples(model, tokenizer, tasks.prompts(config.dataset, "test"))
    print(f"held-out loss: {result['nats_per_token']:.3f} nats per token, "
          f"{result['nats_per_document']:.1f} nats per document, {result['bits_per_byte']:.3f} "
          f"bits per byte  ->  {run.folder}")
    return run.folder


def preferred_ft_start(config: Config, init: str) -> pipeline.Start:
    """The policy that Preferred-FT starts from, with the gold reward that labels its pairs and
    measures what it becomes."""
    if not (Path(init) / "model.pt").exists():
        fail(f"--init {init}: --on chosen needs the run folder of an SFT policy, or --pairs "
             "without --evaluate-every")
    start = pipeline.load(Path(init), config.dataset, config.preset, config.dtype)
    if not tasks.is_own(config.dataset):
        start.gold = pipeline.gold_reward(start)
    if config.evaluate_every:
        start.bank = pipeline.sample_bank(start)
    return start


def built_from(config: Config, pairs_file: str = "") -> dict[str, str]:
    """What a run is made from: with other documents, pairs or initial weights under the same names
    it is another run."""
    made_from = {}
    if pairs_file:
        made_from["pairs"] = sha256(pairs_file)
    elif config.on != "chosen":
        folder = tasks.prepared(config.dataset)
        made_from["documents"] = tasks.data_id(folder, training_file(config), "tokenizer.tiktoken")
    if init := initial_weights(config):
        made_from["init"] = fingerprint(initial_model(config, init)[0].state_dict())
    return made_from


if __name__ == "__main__":
    train(parse(Config, __doc__))
