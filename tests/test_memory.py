"""experiments/memory.py: what it counts is what there is; docs/machines.md says what it computes."""
import importlib
import inspect
import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

import sft
from common import pairs
from common.training import adamw
from experiments import memory
from experiments.memory import MODELS, SAMPLED, SCORED, efficiency, parameters
from model import ROOM, Cache, GPT, GPTConfig, ScalarModel, generate, summed_logprobs

ROOT = Path(__file__).resolve().parents[1]
DOC = (ROOT / "docs" / "machines.md").read_text(encoding="utf-8")
SIZES = GPTConfig(vocab_size=11, block_size=12, n_layer=3, n_head=2, n_embd=8)

# commands that cannot run here, or are run by another test
ELSEWHERE = {
    "torchrun --nproc-per-node 8 dpo.py --beta 0.1": "test_processes.py, with two processes",
    "torchrun --nproc-per-node 8 dpo.py --beta 0.1 --shard": "test_processes.py, with two processes",
    "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 dpo.py --beta 0.1":
        "needs two machines; results/processes has two torchruns of one",
    'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)': "needs SLURM",
    'srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d '
    '--rdzv-endpoint "$first:29500" dpo.py --beta 0.1 --resume': "needs SLURM",
    "python experiments/memory.py": "test_the_tables_are_what_the_functions_give",
    "python experiments/memory.py --measure dpo": "test_a_measured_step_takes_what_is_computed",
}


# ---- counting --------------------------------------------------------------------------------------------------------

def test_parameters_are_those_of_the_networks():
    total = sum(parameters(SIZES).values())
    assert total == sum(p.numel() for p in GPT(SIZES).parameters())
    assert total + SIZES.n_embd + 1 == sum(p.numel() for p in ScalarModel(SIZES).parameters())
    # as transformers counts the published checkpoint
    assert sum(parameters(GPTConfig(50257, 1024, 12, 12, 768)).values()) == 124_439_808
    assert sum(parameters(GPTConfig(50257, 1024, 48, 25, 1600)).values()) == 1_557_611_200


def state_bytes(*optimizers: torch.optim.Optimizer) -> int:
    tensors = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def trained(model: torch.nn.Module, optimizers: list) -> list:
    """After a step with some gradient for every parameter."""
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for optimizer in optimizers:
        optimizer.step()
    return optimizers


def test_optimizer_states_have_the_bytes_that_are_counted():
    policy, value = GPT(SIZES), ScalarModel(SIZES)
    by_adamw = [trained(model, [adamw(model, 1e-3, 0.0, (0.9, 0.95))]) for model in (policy, value)]
    assert state_bytes(*by_adamw[0]) == memory.optimizer_bytes(SIZES, "dpo")
    assert state_bytes(*by_adamw[0], *by_adamw[1]) == memory.optimizer_bytes(SIZES, "ppo")
    assert state_bytes(*trained(policy, sft.optimizers_for(policy, 1e-3, 0.1))) == memory.optimizer_bytes(SIZES, "sft")


def test_rows_at_once_are_those_of_the_code():
    assert SCORED == inspect.signature(summed_logprobs).parameters["batch_size"].default
    assert SAMPLED == inspect.signature(generate).parameters["chunk"].default
    assert f"range(0, len(ids), {SAMPLED})" in inspect.getsource(pairs.sampled_responses)


def test_a_cache_has_the_bytes_that_are_counted():
    """Of 10 rows with long ends: 0.9 of it again, when rows leave; with that, sampling is weights, states and cache."""
    found = memory.memory(SIZES, "dpo", sampled=10, prompt=1, bfloat16=False)
    kv = Cache(SIZES, 10, SIZES.block_size, torch.float32, torch.device("cpu")).kv
    states = 4 * 2 * sum(parameters(SIZES).values()) + found["optimizer"]
    assert found["sampling"] - states == pytest.approx(1.9 * kv.numel() * 4)


@pytest.mark.parametrize("algorithm", memory.ALGORITHMS)
def test_what_is_sharded_is_divided_and_what_is_not_stays(algorithm):
    one, eight, sharded = (memory.memory(SIZES, algorithm, n, shard) for n, shard in ((1, False), (8, False), (8, True)))
    total = 4 * sum(parameters(SIZES).values())
    networks = {"sft": (1, 0), "dpo": (1, 1), "ppo": (2, 2)}[algorithm]  # trained, frozen
    assert one["weights"] == eight["weights"] == one["start"] == sharded["start"] == total * sum(networks)
    assert one["message"] == sharded["message"] == 0 and eight["message"] == eight["gradients"] == total * networks[0]
    assert sharded["gradients"] == one["gradients"] / 8 and sharded["optimizer"] == one["optimizer"] / 8
    whole = total if algorithm == "ppo" else 0  # its reward model
    assert sharded["weights"] == pytest.approx((one["weights"] - whole) / 8 + whole)
    assert sharded["activations"] == one["activations"]


def test_a_measured_step_takes_what_is_computed():
    """Live bytes as torch's allocator reports them, of a real step with two micro-batches."""
    found = memory.measure(memory.Config(measure="dpo", layers=2, heads=2, embd=64, vocab=512, rows=8))
    assert found["ratio"] == pytest.approx(1, abs=0.05)


# ---- time ------------------------------------------------------------------------------------------------------------

def test_one_device_waits_for_nobody_and_more_wait_longer():
    found = [efficiency(774e6, devices, 4096)["efficiency"] for devices in (1, 2, 4, 8, 16, 64, 512)]
    assert found[0] == 1 and found == sorted(found, reverse=True) and len(set(found)) == len(found)
    # time of both is in proportion to the parameters: the size of the model cancels
    assert efficiency(7e9, 64, 4096)["efficiency"] == pytest.approx(efficiency(124e6, 64, 4096)["efficiency"])
    assert efficiency(1e9, 64, 1e9)["efficiency"] == pytest.approx(1, abs=1e-4)


def test_a_cell_that_was_computed_by_hand():
    """774M on 64 devices, 4,096 tokens each. 19.0218e12 operations at 395.6e12 a second: 48.08 ms. 3.096e9 bytes: two
    times 7/8 of them at 450e9 a second, 12.04 ms; two times 7/8 of an eighth at 50e9, 13.545 ms."""
    found = efficiency(774e6, 64, 4096)
    assert found["step"] == pytest.approx(48.083e-3, rel=1e-4)
    assert found["reduce"] == pytest.approx(12.04e-3 + 13.545e-3, rel=1e-4)
    assert found["efficiency"] == pytest.approx(48.083 / 73.668, rel=1e-4)


# ---- the page --------------------------------------------------------------------------------------------------------

def table_after(heading: str) -> list[list[str]]:
    """The cells of the first table below a line that begins so."""
    lines = DOC[DOC.index(f"\n{heading}"):].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    end = next(i for i in range(start, len(lines) + 1) if i == len(lines) or not lines[i].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2:end]]


def test_the_tables_are_what_the_functions_give(capsys):
    memory.main(memory.Config())
    for printed in capsys.readouterr().out.strip().split("\n\n"):
        assert printed in DOC


def test_cells_of_the_table_are_bytes_of_the_function():
    """Not only as it is printed: training of DPO on one device, and with --shard on eight."""
    for name, algorithm, *cells in table_after("### Memory"):
        for column, devices, shard, phase in ((6, 1, False, "training"), (7, 8, True, "training"), (9, 8, True, "scoring")):
            number, unit = cells[column].split()
            found = memory.memory(MODELS[name], algorithm, devices, shard)[phase]
            assert float(number) * {"MB": 1e6, "GB": 1e9}[unit] == pytest.approx(found, rel=5.1e-3)


def test_the_measured_table_is_of_the_committed_rows():
    rows = [json.loads(line) for line in (ROOT / "results" / "memory" / "measured.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    expected = []
    for row in rows[:8]:  # float32; the other half is bfloat16
        other = next(one for one in rows[8:] if {**one, **dict.fromkeys(("dtype", "computed", "measured", "ratio"))}
                     == {**row, **dict.fromkeys(("dtype", "computed", "measured", "ratio"))})
        cells = [row["measure"], f"{row['parameters'] / 1e6:.1f}M"]
        for one in (row, other):
            cells += [memory.digits(one["computed"]), memory.digits(one["measured"]), f"{one['ratio']:.3f}"]
            assert one["ratio"] == round(one["computed"] / one["measured"], 3)
        expected.append(cells)
    assert table_after("### Computed and measured") == expected


def test_committed_rows_are_of_the_formula_that_is_there():
    for line in (ROOT / "results" / "memory" / "measured.jsonl").read_text().splitlines():
        row = json.loads(line)
        sizes = GPTConfig(row["vocab"], row["prompt"] + row["comp"], row["layers"], row["heads"], row["embd"])
        training = row["measure"] in memory.ALGORITHMS
        found = memory.memory(sizes, row["measure"] if training else "sft", rows=row["rows"], prompt=row["prompt"],
                              scored=row["rows"], sampled=row["rows"], bfloat16=row["dtype"] == "bfloat16")
        computed = found["training"] if training else found[row["measure"]] - found["optimizer"]
        assert round(computed) == row["computed"]


def doc_commands() -> list[str]:
    """Of the sh blocks, a line that ends in a backslash with the next one."""
    blocks = re.findall(r"```sh\n(.*?)```", DOC, flags=re.S)
    lines = [line for block in blocks for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def test_every_command_is_run_somewhere_or_says_why_not():
    assert set(doc_commands()) == set(ELSEWHERE)


def test_the_flags_of_the_torchrun_commands_exist():
    """Those of torchrun, by its own parser; those of the script, by its settings."""
    checked = 0
    for command in doc_commands():
        words = shlex.split(command)
        if "torchrun" not in words:
            continue
        found = get_args_parser().parse_args(words[words.index("torchrun") + 1:])
        fields = importlib.import_module(found.training_script.removesuffix(".py")).Config.__dataclass_fields__
        for word in found.training_script_args:
            if word.startswith("--"):
                assert word[2:].replace("-", "_") in fields, word
                checked += 1
    assert checked >= 5


def test_two_processes_end_where_one_does():
    """The numbers of the page are those of the committed rows."""
    rows = [json.loads(line) for line in (ROOT / "results" / "processes" / "results.jsonl").read_text().splitlines()]
    for row in rows:
        assert f"{row['nats_per_token']:.5f}" in DOC
    assert abs(rows[0]["nats_per_token"] - rows[1]["nats_per_token"]) < 1e-4


def test_the_table_of_two_processes_is_that_of_the_rows():
    folder = ROOT / "results" / "processes"
    best = {}
    for line in (folder / "scaling.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["other_cpu"] < 0.1  # nothing else was running
        key = row["bench"], row["processes"]
        best[key] = min(best.get(key, math.inf), row["ms_median"])
    for name in ("sft", "reward_model", "dpo", "generate", "ppo"):
        one, two = best[name, 1], best[name, 2]
        assert f"| {name} | {one:.0f} | {two:.0f} | {one / two:.2f} |" in (folder / "README.md").read_text()


def test_numbers_in_the_text_are_those_of_the_functions():
    """The room for logits and cache; all of PPO's networks."""
    assert f"would take more than {ROOM / 1e9:.1f} GB" in DOC
    assert f"(PPO 7B-like: {memory.digits(memory.memory(MODELS['7B-like'], 'ppo')['start'])})" in DOC
