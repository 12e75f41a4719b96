"""GPT-2 checkpoints in Hugging Face's format: in and out."""
from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path

from common import ROOT, fail
from common.files import atomic_write, check_writable, read_json, write_json
from common.tasks import download
from common.tokenizer import SPECIAL, Tokenizer, byte_letters
from model import GPT, GPTConfig

HUB = "https://huggingface.co/openai-community/{name}/resolve/main/{file}"
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
# GPT-2 stores these (in, out), nn.Linear (out, in)
_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def from_pretrained(name: str) -> GPT:
    """GPT-2 weights from a Hugging Face checkpoint: a folder with config.json and
    model.safetensors, or a GPT-2 name.

    Raises SystemExit if it cannot be fetched, is of another architecture, or lacks a weight.
    """
    from safetensors.torch import load_file
    folder = pretrained_folder(name)
    if not (folder / "config.json").exists() or not (folder / "model.safetensors").exists():
        fail(f"{folder}: expected the files config.json and model.safetensors of a GPT-2 "
             "checkpoint")
    config = read_json(folder / "config.json")
    kind, activation = config.get("model_type"), config.get("activation_function", "gelu_new")
    if (kind, activation) != ("gpt2", "gelu_new"):
        fail(f"{folder}/config.json: model_type is {kind!r} with activation {activation!r}, "
             "expected 'gpt2' with 'gelu_new'")
    model = GPT(
        GPTConfig(config["vocab_size"], config["n_positions"], config["n_layer"], config["n_head"],
                  config["n_embd"]))
    try:
        stored = load_file(folder / "model.safetensors")
    except Exception as error:  # safetensors has an exception class of its own
        fail(f"{folder}/model.safetensors: cannot be read ({error})")
    stored = {key.removeprefix("transformer."): value for key, value in stored.items()}
    wanted = model.state_dict()
    if missing := sorted(set(wanted) - set(stored)):
        fail(f"{folder}/model.safetensors: no weight {missing[0]!r} ({len(missing)} missing)")
    model.load_state_dict(
        {key: stored[key].t() if key.endswith(_CONV1D) else stored[key]
         for key in wanted})
    return model.float()


def pretrained_folder(name: str) -> Path:
    """The folder of a GPT-2 checkpoint; a GPT-2 name is downloaded once, to data/gpt2/NAME."""
    if Path(name).is_dir():
        return Path(name)
    if name not in GPT2_NAMES:
        fail(f"--init {name}: no such folder, and not one of {', '.join(GPT2_NAMES)}")
    folder = ROOT / "data" / "gpt2" / name
    for file in ("config.json", "vocab.json", "merges.txt", "model.safetensors"):
        if not (folder / file).exists():
            download(HUB.format(name=name, file=file), folder / file,
                     f"put {file} of the checkpoint into a folder and give that: --init FOLDER")
    return folder


def save_pretrained(model: GPT, folder: str | Path) -> None:
    """Write config.json and model.safetensors as
    transformers.GPT2LMHeadModel.from_pretrained(folder) reads them."""
    from safetensors.torch import save
    folder, config = Path(folder), asdict(model.config)
    state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    state = {
        "transformer." + key: (value.t() if key.endswith(_CONV1D) else value).contiguous()
        for key, value in state.items()
    }
    atomic_write(folder / "model.safetensors", save(state, metadata={"format": "pt"}))
    config["n_positions"] = config.pop("block_size")
    write_json(
        folder / "config.json", {
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"],
            **config, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0
        })


# ---- a policy with its tokenizer -----------------------------------------------------------------

def export(model: GPT, tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a new folder that transformers' AutoModelForCausalLM and AutoTokenizer load, and
    from_pretrained and Tokenizer.gpt2 of ours.

    tokenizer(text) has <bos> in front there, as every prompt has here; add_special_tokens=False
    leaves it out. As here, no text is encoded as a special token, and generate() samples from the
    whole softmax.

    Raises SystemExit if the folder is there and not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        fail(f"{folder}: is there and not empty; give another folder")
    check_writable(folder)
    temporary = folder.absolute()
    temporary = temporary.with_name(f".{temporary.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        save_pretrained(model, temporary)
        special = {f"{name}_token_id": getattr(tokenizer, name) for name in SPECIAL}
        path = temporary / "config.json"
        write_json(path, {**read_json(path), **special, "dtype": "float32"})
        write_json(
            temporary / "generation_config.json", {
                **special, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
                "max_length": model.config.block_size
            })
        save_tokenizer(tokenizer, model.config.block_size, temporary)
        os.replace(temporary, folder)  # an empty folder gives way
    except OSError as error:
        fail(f"{folder}: cannot be written ({error.strerror})")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_tokenizer(tokenizer: Tokenizer, block_size: int, folder: Path) -> None:
    """vocab.json and merges.txt as GPT-2 has them; tokenizer.json, which says the same and what
    else transformers must know, and tokenizer_config.json."""
    letters = byte_letters()

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    # GPT-2 has one special token for all three
    names = {name: f"<|{name}|>" for name in SPECIAL}
    if tokenizer.pad == tokenizer.eos:
        names = dict.fromkeys(SPECIAL, "<|endoftext|>")
    special = {names[name]: getattr(tokenizer, name) for name in SPECIAL}
    vocab = {written(token): id for token, id in tokenizer.ranks.items()} | special
    pairs = [[written(a), written(b)] for a, b in merges(tokenizer.ranks)]
    bos = names["bos"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)

    write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    atomic_write(folder / "merges.txt", ("\n".join(lines) + "\n").encode())
    write_json(
        folder / "tokenizer.json", {
            "version": "1.0",
            "added_tokens": [{"id": id, "content": token, **flags, "special": True}
                             for token, id in special.items()],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False,
                              "trim_offsets": True, "use_regex": True},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": bos, "type_id": 0}},
                           {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"SpecialToken": {"id": bos, "type_id": 0}},
                         {"Sequence": {"id": "A", "type_id": 0}},
                         {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {bos: {"id": bos, "ids": [special[bos]], "tokens": [bos]}}
            },
            "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                        "use_regex": True},
            "model": {"type": "BPE", "vocab": vocab, "merges": pairs}
        })
    write_json(
        folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size,
            **{f"{name}_token": token for name, token in names.items()},
            "clean_up_tokenization_spaces": False, "split_special_tokens": True
        })


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two tokens that each longer token was merged from, in the order of the merges.

    They are what BPE leaves of the token's bytes with the merges before its own. No other two
    tokens ever make it: inside its bytes, the merges come in this order in any text.
    """
    found = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = split(token, ranks, rank)
            if len(parts) != 2:
                fail(f"the token {token!r} of this tokenizer is no merge of two others")
            found.append(tuple(parts))
    return found


def split(text: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """BPE with the merges of a rank below this: the pair of the lowest rank is joined, the first of
    equals, until none is left."""
    parts = [bytes([byte]) for byte in text]
    while len(parts) > 1:
        pairs = [ranks.get(a + b, below) for a, b in zip(parts, parts[1:])]
        if min(pairs) >= below:
            break
        i = pairs.index(min(pairs))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts
