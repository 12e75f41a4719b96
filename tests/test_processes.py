"""Two processes and one: the same gradients, the same texts, the same run, to rounding; and what happens when one dies."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import clone
from common import processes
from common.processes import add_gradients, mine
from common.run import load_checkpoint
from common.settings import parse
from conftest import skip_without_loopback, tiny_gpt
from experiments import bench
from test_faults import last_step, wait_for

# 20 steps of each script. Batches of 6 and 12 rows: 2 and 3 processes can share them equally
POLICY = "--sft {work}/runs/sft --batch-size 6"
STAGES = {
    "sft": [*clone.TINY, *"--batch-size 6 --steps 20 --lr 5e-4 --block-size 56".split()],
    "reward_model": f"{POLICY} --pairs {{work}}/pairs.jsonl --epochs 5 --warmup 5".split(),
    "dpo": f"{POLICY} --pairs {{work}}/pairs.jsonl --epochs 5 --bank-samples 8".split(),
    "reinforce": f"{POLICY} --reward {{work}}/own.py:letters --bank-samples 8 --samples 3 --steps 20 --warmup 3 "
                 "--lr 1e-4".split(),
    "vargrad": f"{POLICY} --reward {{work}}/own.py:letters --bank-samples 8 --samples 2 --replay 1 --steps 20 --warmup 3 "
               "--lr 1e-4".split(),
    "ppo": f"{POLICY} --reward {{work}}/own.py:letters --bank-samples 8 --steps 20 --minibatches 1 --warmup 3 "
           "--lr 1e-4 --value-lr 1e-4 --target-kl 0.5 --horizon 20".split()}
OWN = """
def letters(prompts, responses):
    with open({calls!r}, "a") as file:
        file.write("called\\n")
    return [sum(map(response.count, "aeiou")) / 10 - len(response) / 100 for response in responses]
"""
ONE_THREAD = {**clone.environment(), "OMP_NUM_THREADS": "1"}
# runs scripts, one after another, in the processes that torchrun starts; or in FORKS copies of itself, which spares each of
# them the import of torch and of its compiler
DRIVER = """
import json, os, sys
from pathlib import Path
import torch._dynamo
copies = []
for rank in range(1, int(os.environ.get("FORKS", 1))):
    copies.append(os.fork())
    if copies[-1] == 0:
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
        copies = []
        break
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import clone, ppo, reinforce, vargrad
from common import processes
root, work, stages = Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
processes.join()
texts, generate = [], ppo.generate
ppo.generate = reinforce.generate = vargrad.generate = lambda *given, **named: texts.append(generate(*given, **named)) or texts[-1]
for stage, argv in stages.items():
    texts.clear()
    stopped = clone.run_here(root, work, stage, *argv)
    if stopped != 0:
        sys.exit(stopped)
    if processes.RANK == 0:
        file = work / f"texts-{stage}-{processes.WORLD}.json"
        file.write_text(json.dumps([samples.response_ids() for samples in texts]))
sys.exit(any([os.waitpid(copy, 0)[1] for copy in copies]))
"""


@pytest.fixture(scope="module")
def work(root, tmp_path_factory) -> Path:
    """A folder with an SFT policy, pairs, a reward, and a run of each script by one process, in one/."""
    skip_without_loopback()
    work = tmp_path_factory.mktemp("work")
    clone.write_pairs(work / "pairs.jsonl")
    (work / "own.py").write_text(OWN.format(calls=str(work / "calls.txt")))
    assert clone.run_here(root, work, "sft", *clone.TINY, "--block-size", "56", "--out", "runs/sft") == 0
    launch(root, work, 1, commands(work, "one"))
    return work


def commands(work: Path, out: str, *more: str, only: str = "") -> dict[str, list[str]]:
    return {stage: [*(word.format(work=work) for word in argv), "--out", f"{out}/{stage}", *more]
            for stage, argv in STAGES.items() if only in ("", stage)}


def torchrun(world: int, *command: str, cwd: Path) -> subprocess.Popen:
    """`torchrun --nproc-per-node world`, or python for one, with one thread each, in a group of processes of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    return subprocess.Popen([sys.executable, *launcher, *map(str, command)], cwd=cwd, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**clone.environment(), "OMP_NUM_THREADS": "1"})


def launch(root: Path, work: Path, world: int, stages: dict[str, list[str]]) -> None:
    """Run the stages in so many processes, with the variables that torchrun would give them. torchrun itself is run below."""
    (work / "driver.py").write_text(DRIVER)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # one that is free
    torchruns = {"WORLD_SIZE": world, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {**clone.environment(), "OMP_NUM_THREADS": "1", "FORKS": str(world), **{k: str(v) for k, v in torchruns.items()}}
    done = subprocess.run([sys.executable, work / "driver.py", clone.ROOT, root, work, json.dumps(stages)], cwd=work, text=True,
                          capture_output=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model.pt", weights_only=True)["model"]


def assert_same_run(one: Path, other: Path, stage: str, steps: int = 20) -> None:
    """Every number of the first steps to 1e-5 of its size or of 1; of all 20, also the weights to 1e-4.

    Left out are parameters whose gradient is exactly 0 in theory, and rounding noise in practice, of which Adam makes steps
    of the size of the learning rate: the bias of the keys; of a reward model, where only differences count, those that add a
    constant to every score. What the model computes does not depend on them.
    """
    # a difference of nearly equal numbers, a count of what is above a threshold, and, of DPO before the first step, signs of 0
    unstable = {"seconds", "ratio_std", "clip_fraction", "accuracy"}
    for a, b in zip(rows(one), rows(other), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - unstable if a["step"] < steps else ():
            if isinstance(a[name], float):
                relative = 1e-4 if name == "grad_norm" else 1e-5
                # REINFORCE's loss is a mean of some hundreds, of either sign
                absolute = 1e-4 if (stage, name) == ("reinforce", "loss") else 1e-5
                assert a[name] == pytest.approx(b[name], rel=relative, abs=absolute), (a["step"], name)
    if steps < 20:
        return
    first, second = weights(one), weights(other)
    for name, tensor in first.items():
        apart = (tensor - second[name]).abs()
        if name.endswith("c_attn.bias"):
            width = len(apart) // 3
            apart = torch.cat([apart[:width], apart[2 * width:]])
        if stage == "reward_model" and name in ("head.bias", "gpt.ln_f.bias", "mean"):
            continue
        assert apart.max() < 1e-4, (name, apart.max())


@pytest.mark.parametrize("world, more", [(3, ()), (2, ("--shard",))], ids=["3", "2 sharded"])
def test_several_processes_make_the_run_of_one(world, more, root, work):
    """sft, reward_model, dpo, reinforce, vargrad and ppo; the user's reward is asked once, by one process.

    PPO, VarGrad and REINFORCE sample the same texts, up to rounding: where a uniform number comes within 1e-6 or so of the border
    between two tokens, another number of rows in a matrix product may tip it, once in thousands of tokens. From there on
    the runs are two runs, and are not compared."""
    out = f"{world}{''.join(more)}"
    (work / "calls.txt").unlink()
    # with --shard the two that have the most to share
    stages = {stage: command for stage, command in commands(work, out, *more).items() if not more or stage in ("dpo", "ppo")}
    launch(root, work, world, stages)
    for stage in stages:
        same = 20
        if stage in ("reinforce", "vargrad", "ppo"):
            one, other = (json.loads((work / f"texts-{stage}-{n}.json").read_text()) for n in (1, world))
            assert len(one) == len(other) == 21  # those that scores are counted from, and 20 rollouts
            same = next((i - 1 for i in range(21) if one[i] != other[i]), 20)
            assert same >= 5
        assert_same_run(work / "one" / stage, work / out / stage, stage, same)
    asked = len((work / "calls.txt").read_text().splitlines())
    # tried once, then for 21 batches, and for what is reported: the responses of the bank and of the trained policy
    assert asked == (1 + 21 + 2) * len({"reinforce", "vargrad", "ppo"} & stages.keys())


def test_kill_all_and_resume(root, work, tmp_path):
    """Bit by bit with as many processes, to rounding with another number of them. With --shard, which has to put its weights
    and the optimizer's state together for a checkpoint, and to take them apart again."""
    command = commands(work, str(tmp_path / "killed"), "--shard", only="dpo")["dpo"]
    folder = tmp_path / "killed/dpo"
    process = torchrun(2, root / "dpo.py", *command, "--checkpoint-every", "0", cwd=work)
    wait_for(lambda: last_step(folder) >= 2 and (folder / "checkpoint.pt").exists(), process)
    for number in processes_of(tmp_path / "killed"):
        os.kill(number, signal.SIGKILL)
    process.communicate()
    shutil.copytree(tmp_path / "killed", tmp_path / "one")
    assert 2 <= load_checkpoint(folder / "checkpoint.pt")["step"] < 20

    launch(root, work, 2, {"dpo": [*command, "--resume"]})
    first, second = weights(folder), weights(work / "2--shard/dpo")
    assert all(torch.equal(first[name], second[name]) for name in second)
    alone = [word.replace("/killed", "/one") for word in command if word != "--shard"]
    assert clone.run_here(root, work, "dpo", *alone, "--resume") == 0
    assert_same_run(work / "one/dpo", tmp_path / "one/dpo", "dpo")


def processes_of(folder: Path) -> list[int]:
    """Numbers of the processes whose command line has this folder in it: torchrun, and what it has started."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [int(line.parent.name)] * (str(folder).encode() in line.read_bytes())
        except OSError:
            pass  # it has just ended
    return found


def test_one_that_dies_ends_the_others(root, work):
    """With its message, and soon: the others wait for its gradient."""
    command = commands(work, "dies", only="dpo")["dpo"]
    program = (work / "driver_dies.py")
    program.write_text(DRIVER.replace("processes.join()", (
        "processes.join()\nimport dpo\nfrom common import fail\nloss, calls = dpo.dpo_loss, []\n"
        "def dies(*given):\n    calls.append(0)\n    if processes.RANK == 1 and len(calls) == 4:\n"
        "        fail('the card has fallen off the bus')\n    return loss(*given)\ndpo.dpo_loss = dies")))
    began = time.monotonic()
    process = torchrun(2, program, clone.ROOT, root, work, json.dumps({"dpo": command}), cwd=work)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and time.monotonic() - began < 60
    assert "process 1: error: the card has fallen off the bus" in errors and not (work / "dies/dpo/model.pt").exists()


def test_what_all_die_of_is_said_once(root, work):
    """Such as a folder that holds another run."""
    command = commands(work, "one", "--batch-size", "5", only="dpo")["dpo"]
    process = torchrun(2, root / "dpo.py", *command, cwd=work)
    _, errors = process.communicate(timeout=60)
    said, = re.findall(r"^.*error: .*$", errors, flags=re.M)
    assert process.returncode == 1 and said.startswith("error: one/dpo was made with other settings: batch_size was 6, now 5")


SMALL_STEP = "--only dpo --layers 1 --heads 2 --embd 8 --vocab 50 --batch 4 --prompt 3 --comp 5 --steps 2".split()


def test_the_scaling_of_a_step_can_be_measured(monkeypatch, capsys):
    """A line of one process, and then torchrun on the same command with the threads shared out; .ci/run does that."""
    calls = []
    monkeypatch.setattr(bench, "matmul_peak", lambda dtype: 1e9)
    monkeypatch.setattr(bench.subprocess, "call", lambda command: calls.append(command) or 0)
    before = torch.get_num_threads()
    with pytest.raises(SystemExit, match="0"):
        bench.main(parse(bench.Config, "", [*SMALL_STEP, "--processes", "2", "--threads", "2"]))
    torch.set_num_threads(before)
    again = calls[0][calls[0].index(str(clone.ROOT / "experiments/bench.py")) + 1:]
    assert "--nproc-per-node 2" in " ".join(calls[0]) and again[again.index("--threads") + 1] == "1"
    line, = map(json.loads, capsys.readouterr().out.splitlines())
    assert (line["processes"], line["threads"]) == (1, 2)


def test_shard_alone_is_refused(root, tmp_path):
    assert clone.run_here(root, tmp_path, "dpo", "--shard") == (
        "error: --shard: needs several processes: torchrun --nproc-per-node 2 ...")


@pytest.mark.parametrize("world", [2, 3, 5])
def test_shares_are_all_rows_once_and_their_gradients_add_up(world, monkeypatch):
    """The definition, without a second process: every row is somebody's, and the sum of the shares' gradients is that of all."""
    rows, model = torch.arange(7), tiny_gpt()
    shares = []
    for rank in range(world):
        monkeypatch.setattr(processes, "RANK", rank)
        monkeypatch.setattr(processes, "WORLD", world)
        shares.append(mine(rows))
    assert torch.cat(shares).sort().values.tolist() == rows.tolist()
    monkeypatch.setattr(processes, "WORLD", 8)
    with pytest.raises(SystemExit, match="^error: 7 rows cannot be shared by 8 processes$"):
        mine(rows)
    monkeypatch.setattr(processes, "WORLD", 6)
    mine(rows)
    monkeypatch.setattr(processes, "sharded", True)
    with pytest.raises(SystemExit, match="^error: 7 rows cannot be shared by 6 processes equally, as --shard needs$"):
        mine(rows)
    monkeypatch.undo()

    tokens = torch.randint(3, 11, (7, 6), generator=torch.Generator().manual_seed(0))

    def gradient(of: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        (model(tokens[of]).logsumexp(-1).sum() / 7).backward()
        add_gradients(model)
        return [p.grad.clone() for p in model.parameters()]
    added = [sum(parts) for parts in zip(*(gradient(share) for share in shares))]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(added, gradient(rows), strict=True))
