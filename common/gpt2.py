"""GPT-2 checkpoints in Hugging Face's format: in and out."""
from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from common import ROOT, fail
from common.files import atomic_write, read_json, write_json
from common.tasks import download
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
