"""common.py: random streams, batches, padding, the learning rate, and the command line made from a dataclass."""
import dataclasses
import inspect
import itertools
import math
import re
import time
import tokenize
from io import StringIO
from typing import ClassVar, Literal

import pytest
import torch

import dpo
from experiments import frontier
import ppo
import reward_model
from experiments import scaling
import sft
from experiments import winrate
from common.run import Run
from common.settings import comments, defaults, parse, preset_of, require
from common.training import adamw, autocast, batches, fingerprint, generator, pad, warmup_cosine
from conftest import tiny_gpt
from model import GPTConfig, ScalarModel

LENGTHS = torch.randint(5, 60, (203,), generator=torch.Generator().manual_seed(0))


def take(n, *args, **settings):
    return list(itertools.islice(batches(*args, **settings), n))


# ---- batches ---------------------------------------------------------------------------------------------------------

def test_every_epoch_sees_every_row_once_up_to_the_remainder():
    """203 rows in batches of 10: 20 batches, 200 different rows; which three wait is drawn anew each epoch."""
    epochs = torch.stack(take(20 * 30, LENGTHS, 10, seed=0)).view(30, 200)
    assert all(len(set(rows.tolist())) == 200 for rows in epochs)
    assert set(epochs.flatten().tolist()) == set(range(203))


def test_order_is_drawn_anew_each_epoch_and_by_the_seed_alone():
    first = take(40, LENGTHS, 10, seed=0)
    torch.manual_seed(99)
    again, other = take(40, LENGTHS, 10, seed=0), take(40, LENGTHS, 10, seed=1)
    same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a, b))  # noqa: E731
    assert same(first, again)
    assert not same(first, other) and not same(first[:20], first[20:])
    assert {frozenset(b.tolist()) for b in first[:20]}.isdisjoint(frozenset(b.tolist()) for b in first[20:])  # other company


def test_a_later_batch_does_not_depend_on_what_came_before():
    """Step 45, in the third epoch, is the same for a run that got there and for one that resumes and skips to it, whatever
    else drew random numbers meanwhile; and it is the third epoch's, not the first's."""
    run = batches(LENGTHS, 10, seed=0)
    for _ in range(45):
        next(run)
        torch.rand(3)
    resumed = batches(LENGTHS, 10, seed=0)
    for _ in range(45):
        next(resumed)
    assert torch.equal(found := next(run), next(resumed))
    assert not torch.equal(found, take(6, LENGTHS, 10, seed=0)[5])


def test_rows_of_similar_length_go_together():
    """Sorting inside a pool leaves a small part of the padding that random batches have."""
    lengths = torch.randint(5, 60, (4096,), generator=torch.Generator().manual_seed(1))
    waste = lambda cut: sum(int((lengths[b].max() - lengths[b]).sum()) for b in cut) / int(lengths.sum())  # noqa: E731
    shuffled = torch.randperm(4096, generator=torch.Generator().manual_seed(2)).split(32)
    assert waste(take(128, lengths, 32, seed=0)) < 0.15 * waste(shuffled)


def test_short_and_long_batches_come_in_random_order():
    """Within a pool the batches are not sorted: length and place are uncorrelated (4 / sqrt(n))."""
    lengths = torch.arange(3200)
    means = torch.stack([lengths[b].double().mean() for b in take(100, lengths, 32, seed=0, pool=1000)])
    assert abs(torch.corrcoef(torch.stack([means, torch.arange(100.0).double()]))[0, 1]) < 0.4


def test_fewer_rows_than_a_batch_make_one_batch_and_none_stop():
    assert all(sorted(b.tolist()) == [0, 1, 2] for b in take(5, torch.tensor([4, 9, 2]), 32, seed=0))
    with pytest.raises(SystemExit, match="no rows to train on"):
        take(1, torch.tensor([]), 32, seed=0)


def test_pad():
    tokens, lengths = pad([[5], [6, 7, 8], torch.tensor([9, 1])], 0)
    assert tokens.tolist() == [[5, 0, 0], [6, 7, 8], [9, 1, 0]] and lengths.tolist() == [1, 3, 2]
    assert tokens.dtype == lengths.dtype == torch.int64


# ---- numbers ---------------------------------------------------------------------------------------------------------

def test_warmup_then_half_a_cosine():
    """Linear from 1/warmup to 1; the middle of the cosine is half way between 1 and the floor; the floor at the end."""
    factor = [warmup_cosine(step, 110, 10) for step in range(111)]
    assert factor[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factor[10] == 1 and factor[60] == pytest.approx(0.55) and factor[110] == pytest.approx(0.1)
    assert factor[35] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert all(a > b for a, b in zip(factor[10:], factor[11:])) and factor[109] < 0.101
    assert warmup_cosine(0, 5, 10) == 0.1  # a run that is shorter than its warm-up


def test_random_streams_are_named_and_separate():
    draw = lambda *name: tuple(torch.rand(4, generator=generator(*name)).tolist())  # noqa: E731
    state = torch.get_rng_state()
    names = [(0,), (1,), (0, 0), (0, 1), (1, 0), (12, 3), (1, 23), (0, 0, 0), (-1,), (2**62,)]
    assert len({draw(*name) for name in names}) == len(names)
    assert draw(12, 3) == draw(12, 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_fingerprint_sees_every_weight():
    """Of GPTs and of scalar models, whose mean and std have no dimension."""
    for make in (tiny_gpt, lambda: ScalarModel(GPTConfig(11, 8, 1, 2, 8))):
        torch.manual_seed(0)
        model = make()
        prints = {fingerprint(model.state_dict())}
        assert fingerprint({k: v.clone() for k, v in reversed(model.state_dict().items())}) in prints
        for tensor in model.state_dict().values():
            tensor.view(-1)[-1] += 1e-3
            prints.add(fingerprint(model.state_dict()))
        assert len(prints) == 1 + len(model.state_dict())


def test_adamw_decays_matrices_only():
    """With a gradient of zero a step multiplies by 1 - lr * weight_decay what decays, and leaves the rest as it is."""
    model = tiny_gpt()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    adamw(model, lr=0.1, weight_decay=0.5, betas=(0.9, 0.95)).step()
    for name, p in model.named_parameters():
        decays = name == "wte.weight" or (name.startswith("h.") and name.endswith("weight") and ".ln_" not in name)
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if decays else 1.0), rtol=0, atol=1e-7)


def test_autocast_is_off_on_a_cpu_unless_asked_for():
    with autocast("bfloat16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with autocast("float32"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    if not torch.cuda.is_available():
        with autocast("auto"):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


# ---- the run folder: what kills, full disks and damaged files do to it is in test_faults.py ----------------------------

@dataclasses.dataclass
class Settings:
    out: str
    resume: bool = False
    checkpoint_every: float = 0.0


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_parts(tmp_path, monkeypatch):
    """100 s up to the last checkpoint of the first part, 30 s up to that of the second, 7 s in the third; what came after a
    checkpoint is lost and done again, and the hours in between count for nothing."""
    now, model = 5000.0, tiny_gpt()
    monkeypatch.setattr(time, "time", lambda: now)
    for step, seconds in enumerate((100, 30), 1):
        run = Run(Settings(str(tmp_path), resume=step > 1), model, [], {})
        now += seconds
        run.checkpoint(step)
        now += 3600  # killed an hour later, without another checkpoint
    run = Run(Settings(str(tmp_path), resume=True), model, [], {})
    now += 7
    assert run.step == 2 and run.seconds() == 137
    run.finish()
    run = Run(Settings(str(tmp_path)), model, [], {})  # from the start again
    assert run.seconds() == 0
    run.finish()


def test_the_model_that_is_kept_may_be_a_part_of_what_is_trained(tmp_path):
    """A checkpoint holds both networks and restores both; model.pt holds the one named, and what describes it."""
    both = torch.nn.ModuleDict({"policy": tiny_gpt(seed=1), "value": tiny_gpt(seed=2)})
    Run(Settings(str(tmp_path)), both, [], {}).checkpoint(3)
    again = torch.nn.ModuleDict({"policy": tiny_gpt(seed=3), "value": tiny_gpt(seed=4)})
    run = Run(Settings(str(tmp_path), resume=True), again, [], {})
    assert run.step == 3 and fingerprint(again.state_dict()) == fingerprint(both.state_dict())
    run.finish(again["policy"], kind="GPT")
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert saved["kind"] == "GPT" and fingerprint(saved["model"]) == fingerprint(both["policy"].state_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "log.jsonl", "model.pt"]


# ---- the command line ------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Config:
    dataset: str = "reviews"  # which data
    preset: str = "cpu"  # which machine
    on: Literal["a", "b"] = "a"  # which loss
    lr: float = 1e-3  # learning rate, 5% of
    # what others use
    n_steps: int = 10  # how long
    loud: bool = False  # talk
    out: str = ""  # where to

    PRESETS: ClassVar[dict] = {("imdb", "cpu"): dict(lr=2e-3), ("imdb", "gpu"): dict(lr=3e-3, n_steps=99),
                               ("imdb", "gpu", "b"): dict(n_steps=7)}

    def __post_init__(self):
        require(self.lr > 0, f"--lr {self.lr}: must be > 0")


def parsed(*argv):
    return parse(Config, "about", list(argv))


def test_flags_are_typed():
    config = parsed("--lr", "3e-2", "--n-steps", "5", "--loud", "--out", "5", "--on", "b")
    assert (config.lr, config.n_steps, config.loud, config.out, config.on) == (0.03, 5, True, "5", "b")
    assert parsed() == Config()


@pytest.mark.parametrize("argv, message", [
    (["--lr", "fast"], "--lr: invalid float value: 'fast'"), (["--n-steps", "2.5"], "--n-steps: invalid int value"),
    (["--on", "c"], "--on: invalid choice: 'c'"), (["--lrr", "1"], "unrecognized arguments: --lrr"),
    (["--n-step", "1"], "unrecognized arguments: --n-step"), (["--lr", "-1"], "--lr -1.0: must be > 0"),
    (["--preset", "gpu"], "there is no such preset for --dataset reviews \\(known: imdb cpu, imdb gpu\\)"),
    (["--dataset", "imdb", "--preset", "tpu"], "--preset tpu: there is no such preset for --dataset imdb")])
def test_wrong_flags_stop_with_one_line(argv, message):
    with pytest.raises(SystemExit, match=message) as stop:
        parsed(*argv)
    assert "\n" not in str(stop.value) and str(stop.value).startswith("error: ")


def test_presets_change_defaults_and_flags_change_presets():
    """The order is: dataclass, (dataset, preset), (dataset, preset, on), the command line."""
    seen = lambda *argv: (parsed(*argv).lr, parsed(*argv).n_steps)  # noqa: E731
    assert seen() == (1e-3, 10)
    assert seen("--dataset", "imdb") == (2e-3, 10)
    assert seen("--dataset", "imdb", "--preset", "gpu") == (3e-3, 99)
    assert seen("--dataset=imdb", "--preset=gpu", "--on=b") == (3e-3, 7)
    assert seen("--dataset", "imdb", "--preset", "gpu", "--on", "b", "--n-steps", "3", "--lr", "1") == (1.0, 3)
    for argv, settings in ((["--on", "b"], {"on": "b"}), (["--lr", "1"], {"lr": 1.0})):
        assert parsed("--dataset", "imdb", "--preset", "gpu", *argv) == defaults(Config, "imdb", "gpu", **settings)


@pytest.mark.parametrize("module", [sft, reward_model, dpo, ppo, frontier, scaling, winrate])
def test_every_preset_is_a_valid_config(module):
    fields = {field.name for field in dataclasses.fields(module.Config)}
    for (dataset, preset, *on), values in module.Config.PRESETS.items():
        assert set(values) <= fields
        config = parse(module.Config, "", ["--dataset", dataset, "--preset", preset, *(["--on", *on] if on else [])])
        assert {name: getattr(config, name) for name in values} == values
        assert preset_of(module.Config, dataset, preset, *on).items() >= values.items()


def comments_by_tokenizer(cls):
    """Field name -> all comments from its line to the next field's, read with Python's own tokenizer."""
    fields, found, name = {field.name for field in dataclasses.fields(cls)}, {}, None
    for token in tokenize.generate_tokens(StringIO(inspect.getsource(cls)).readline):
        if token.type == tokenize.NAME and re.match(rf"\s+{token.string}: ", token.line) and token.string in fields:
            name = token.string
        elif token.type == tokenize.NAME and re.match(r"\s+(PRESETS|def)\b", token.line):
            name = None
        elif token.type == tokenize.COMMENT and name:
            found[name] = (found.get(name, "") + " " + token.string.lstrip("# ")).strip()
    return found


@pytest.mark.parametrize("cls", [Config, sft.Config, reward_model.Config, dpo.Config, ppo.Config, frontier.Config])
def test_help_shows_every_field_with_its_reason_and_default(cls, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")  # no line is broken
    with pytest.raises(SystemExit) as stop:
        parse(cls, "what it does", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "what it does" in text
    reasons = comments_by_tokenizer(cls)
    assert {name: text for name, text in comments(cls).items() if name != "PRESETS"} == reasons
    for field in dataclasses.fields(cls):
        default = "none" if field.default == "" else field.default
        assert len(reasons[field.name]) > 3
        flag = rf"--{field.name.replace('_', '-')} (\S+ )?"
        assert re.search(rf"{flag}{re.escape(reasons[field.name])} \[{re.escape(str(default))}\]", text), field.name
    with pytest.raises(SystemExit):
        parse(cls, "", ["--dataset", "imdb", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, value in cls.PRESETS["imdb", "cpu"].items():  # the default shown is the one that will be used
        assert f"{reasons[name]} [{value}]" in text
