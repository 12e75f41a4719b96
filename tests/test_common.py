"""common/: random streams, batches, padding, learning rates, and the command line made from a dataclass."""
import dataclasses
import inspect
import itertools
import json
import math
import re
import signal
import time
import tokenize
from io import StringIO
from typing import Literal

import pytest
import torch

import classifier
import data.imdb
import conditioning
import dpo
import expert_iteration
import ppo
import reinforce
import reward_model
import sft
import vargrad
from common import settings, tasks
from common.run import Run, compare_settings
from common.settings import command, field_notes, label, parse, require, run_folder, typed
from common.tokenizer import Tokenizer
from common.training import Mean, adamw, autocast, batches, fingerprint, generator, pad, warmup_cosine, warmup_linear
from conftest import tiny_gpt
from model import GPTConfig, ScalarModel

ALGORITHMS = [sft, reward_model, classifier, dpo, expert_iteration, conditioning, vargrad, reinforce, ppo]
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
    resumed = batches(LENGTHS, 10, seed=0, start=45)
    assert torch.equal(found := next(run), next(resumed))
    assert all(torch.equal(next(run), next(resumed)) for _ in range(30))  # and into the next epoch
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


def test_warmup_then_linear_to_0():
    factor = [warmup_linear(step, 100, 10) for step in range(101)]
    assert factor[0] == 0.1 and factor[9] == pytest.approx(0.91) and factor[50] == 0.5 and factor[100] == 0
    assert max(factor) == pytest.approx(0.91)  # where the two lines cross


def test_means_are_over_all_that_was_added():
    """Not means of means: micro-batches of 3 and 1 rows weigh 3 and 1."""
    metrics = Mean()
    metrics.add(loss=torch.tensor([1.0, 2.0, 3.0], requires_grad=True), right=torch.tensor([True, False, True]).float())
    metrics.add(loss=torch.tensor([10.0]))
    assert metrics.values() == {"loss": 4.0, "right": pytest.approx(2 / 3)}


def test_random_streams_are_named_and_separate():
    draw = lambda *name: tuple(torch.rand(4, generator=generator(*name)).tolist())  # noqa: E731
    state = torch.get_rng_state()
    names = [(0,), (1,), (0, 0), (0, 1), (1, 0), (12, 3), (1, 23), (0, 0, 0), (-1,), (2**62,), (0, "held out"), (0, "0")]
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


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="SIGUSR1 plays Ctrl-Break")
def test_sigbreak_is_ctrl_c_where_there_is_one(monkeypatch):
    """It is Windows' Ctrl-Break; here SIGUSR1 plays it."""
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    try:
        settings.stop_like_ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_autocast_is_off_on_a_cpu_unless_asked_for():
    with autocast("bfloat16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with autocast("float32"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    if not torch.cuda.is_available():
        with autocast("auto"):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


# ---- the run folder: what kills, full disks and damaged files do to it is in test_faults.py ----------------------------

@settings.settings
class Settings:
    out: str = ""
    dataset: str = "reviews"
    resume: bool = False
    checkpoint_every: float = 0.0


@pytest.fixture
def tokenizer():
    return Tokenizer({bytes([i]): i for i in range(8)})


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_parts(tmp_path, monkeypatch, tokenizer):
    """100 s up to the last checkpoint of the first part, 30 s up to that of the second, 7 s in the third; what came after a
    checkpoint is lost and done again, and the hours in between count for nothing."""
    now, model = 5000.0, tiny_gpt()
    monkeypatch.setattr(time, "time", lambda: now)
    for step, seconds in enumerate((100, 30), 1):
        run = Run(Settings(str(tmp_path), resume=step > 1), model, [], {}, 3)
        now += seconds
        run.checkpoint(step)
        now += 3600  # killed an hour later, without another checkpoint
    run = Run(Settings(str(tmp_path), resume=True), model, [], {}, 3)
    now += 7
    assert run.step == 2 and run.seconds() == 137
    with run.paused():
        now += 50
    assert run.seconds() == 137
    run.finish(model, tokenizer)
    run = Run(Settings(str(tmp_path)), model, [], {}, 3)  # from the start again
    assert run.seconds() == 0
    run.finish(model, tokenizer)


def test_the_model_that_is_kept_may_be_a_part_of_what_is_trained(tmp_path, tokenizer):
    """A checkpoint holds both networks and numbers, and restores them; model.pt holds the one named, and what describes it."""
    both = torch.nn.ModuleDict({"policy": tiny_gpt(seed=1), "value": tiny_gpt(seed=2)})
    Run(Settings(str(tmp_path)), both, [], {}, 5, {"beta": 0.25}).checkpoint(3)
    again, state = torch.nn.ModuleDict({"policy": tiny_gpt(seed=3), "value": tiny_gpt(seed=4)}), {"beta": 1.0}
    run = Run(Settings(str(tmp_path), resume=True), again, [], {}, 5, state)
    assert run.step == 3 and fingerprint(again.state_dict()) == fingerprint(both.state_dict()) and state == {"beta": 0.25}
    run.finish(again["policy"], tokenizer)
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert (saved["kind"], saved["dataset"], saved["tokenizer"]) == ("GPT", "reviews", tokenizer.fingerprint)
    assert fingerprint(saved["model"]) == fingerprint(both["policy"].state_dict())
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "log.jsonl", "model.pt", "tokenizer.tiktoken"]


# ---- the command line ------------------------------------------------------------------------------------------------

@settings.settings
class Config:
    dataset: str = "reviews"  # Which data.
    preset: str = "cpu"  # Which machine.
    on: Literal["a", "b"] = "a"  # Which loss.

    # ---- how it learns
    lr: float = 1e-3  # Learning rate, 5% of
    # what others use.
    n_steps: int = 10  # How long.
    loud: bool = False  # Talk a lot.
    sft: str = ""  # Where from.
    out: str = ""  # Where to.
    resume: bool = False  # Go on with it.

    def __post_init__(self):
        require(self.lr > 0, f"--lr {self.lr}: must be > 0")


@pytest.fixture
def presets(monkeypatch):
    """The task imdb has settings for this file's Config: of both kinds of machine, and of --on b."""
    own = {"cpu": {"test_common": dict(lr=2e-3)},
           "gpu": {"test_common": dict(lr=3e-3, n_steps=99), "test_common b": dict(n_steps=7)}}
    presets = {name: dataclasses.replace(data.imdb.TASK.presets["cpu"], settings=own[name]) for name in own}
    task = dataclasses.replace(data.imdb.TASK, presets=presets)
    monkeypatch.setattr(data.imdb, "TASK", task)


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
    (["--preset", "gpu"], r"--preset gpu: data/reviews has no such preset \(known: cpu\)"),
    (["--dataset", "imdb", "--preset", "tpu"], r"--preset tpu: data/imdb has no such preset \(known: cpu, gpu\)")])
def test_wrong_flags_stop_with_one_line(argv, message, presets):
    with pytest.raises(SystemExit, match=message) as stop:
        parsed(*argv)
    assert "\n" not in str(stop.value) and str(stop.value).startswith("error: ")


def test_presets_change_defaults_and_settings_change_presets(presets):
    """The order is: dataclass, the task's preset, that of --on, what was given; in Python as on the command line."""
    seen = lambda *argv: (parsed(*argv).lr, parsed(*argv).n_steps)  # noqa: E731
    assert seen() == (1e-3, 10)
    assert seen("--dataset", "imdb") == (2e-3, 10)
    assert seen("--dataset", "imdb", "--preset", "gpu") == (3e-3, 99)
    assert seen("--dataset=imdb", "--preset=gpu", "--on=b") == (3e-3, 7)
    assert seen("--dataset", "imdb", "--preset", "gpu", "--on", "b", "--n-steps", "3", "--lr", "1") == (1.0, 3)
    assert Config("imdb") == parsed("--dataset", "imdb") and Config("imdb").lr == 2e-3
    for argv, given in ((["--on", "b"], {"on": "b"}), (["--lr", "1"], {"lr": 1.0}), (["--lr", "1e-3"], {"lr": 1e-3})):
        assert parsed("--dataset", "imdb", "--preset", "gpu", *argv) == Config(dataset="imdb", preset="gpu", **given)
    assert Config(dataset="imdb", lr=1e-3).lr == 1e-3  # given, though it is the class's own default


def test_a_task_says_how_its_pairs_are_labelled():
    assert [dpo.Config(dataset=name).labels for name in ("reviews", "posts", "imdb", "tldr")] == ["bt", "bt", "argmax", "argmax"]


TASKS = sorted(path.parent.name for path in (settings.ROOT / "data").glob("*/prepare.py"))


@pytest.mark.parametrize("dataset", TASKS)
def test_every_setting_of_a_task_is_a_field_of_its_script(dataset):
    """A misspelt setting would be ignored in silence; and a script that a task names must be there."""
    scripts = {module.__name__: module.Config for module in ALGORITHMS}
    for name, preset in tasks.load(dataset).presets.items():
        for script, values in preset.settings.items():
            stem, _, on = script.partition(" ")
            if stem in scripts:
                config = scripts[stem](dataset=dataset, preset=name, **({"on": on} if on else {}))
                assert {key: getattr(config, key) for key in values} == values
            else:
                assert (settings.ROOT / "experiments" / f"{stem}.py").exists()


def comments_by_tokenizer(cls):
    """Field name -> all comments from its line to the next field's, read with Python's own tokenizer; headings left out."""
    fields, found, name = {field.name for field in dataclasses.fields(cls)}, {}, None
    for token in tokenize.generate_tokens(StringIO(inspect.getsource(cls)).readline):
        if token.type == tokenize.NAME and re.match(rf"\s+{token.string}: ", token.line) and token.string in fields:
            name = token.string
        elif token.type == tokenize.NAME and re.match(r"\s+def\b", token.line):
            name = None
        elif token.type == tokenize.COMMENT and name and not token.string.startswith("# ----"):
            found[name] = (found.get(name, "") + " " + token.string.lstrip("# ")).strip()
    return found


@pytest.mark.parametrize("cls", [Config, *(module.Config for module in ALGORITHMS)])
def test_help_shows_every_field_with_its_reason_and_default(cls, capsys, monkeypatch):
    """In groups, under the headings that the source has; and each reason is a sentence that stands alone."""
    monkeypatch.setenv("COLUMNS", "500")  # no line is broken
    with pytest.raises(SystemExit) as stop:
        parse(cls, "what it does", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "what it does" in text
    reasons = comments_by_tokenizer(cls)
    assert {name: reason for name, (_, reason) in field_notes(cls).items()} == reasons
    for heading in {heading for heading, _ in field_notes(cls).values() if heading}:
        assert f"{heading}: --" in text
    for field in dataclasses.fields(cls):
        default = {**{f.name: f.default for f in dataclasses.fields(cls)}, **settings.task_defaults(cls, {})}[field.name]
        reason, flag = reasons[field.name], rf"--{field.name.replace('_', '-')} (\S+ )?"
        assert reason[0].isupper() and reason.endswith(".") and len(reason) > 7, field.name
        assert re.search(rf"{flag}{re.escape(reason)} \[{re.escape('none' if default == '' else str(default))}\]", text), field.name
    with pytest.raises(SystemExit):
        parse(cls, "", ["--dataset", "imdb", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, value in settings.task_defaults(cls, {"dataset": "imdb"}).items():  # the default shown will be used
        assert f"{reasons[name]} [{value}]" in text


# ---- what a run is called --------------------------------------------------------------------------------------------

def test_a_folder_is_named_by_every_setting_that_is_no_default():
    """So that a second experiment is never an error; what only moves rounding names nothing, and a preset is a default."""
    assert dpo.Config().out == "runs/reviews/dpo-beta0.1-seed0"
    assert dpo.Config(lr=1e-4, epochs=2.0).out == "runs/reviews/dpo-beta0.1-seed0-epochs2-lr0.0001"
    assert dpo.Config(prompts=9, labels="argmax").out == "runs/reviews/dpo-beta0.1-seed0-labels-argmax-prompts9"
    assert dpo.Config(loss="unlikelihood").out == "runs/reviews/unlikelihood-alpha0.5-seed0"
    assert dpo.Config(pairs="my/pairs.jsonl").out == "runs/reviews/dpo-beta0.1-seed0-pairs-my-pairs"
    assert dpo.Config(dtype="bfloat16", checkpoint_every=1.0, evaluate_every=5, resume=True).out == dpo.Config().out
    assert dpo.Config(dataset="imdb").out == "runs/imdb/dpo-beta0.1-seed0"
    assert dpo.Config(dataset="imdb", preset="gpu").out == "runs/imdb-gpu/dpo-beta0.1-seed0"
    assert dpo.Config(dataset="imdb", lr=2e-4).out == "runs/imdb/dpo-beta0.1-seed0-lr0.0002"
    assert ppo.Config(reward="gold", target_kl=1.0).out == "runs/reviews/ppo-gt-targetkl1-seed0"
    assert ppo.Config(reward="a/f.py:g").out == "runs/reviews/ppo-beta0.1-seed0-reward-a-f.py-g"
    assert reinforce.Config(baseline="none").out == "runs/reviews/reinforce-beta0.1-seed0-baseline-none"
    assert reward_model.Config().out == "runs/reviews/reward-model"
    assert reward_model.Config(seed=1, pairs="p.jsonl").out == "runs/reviews/reward-model-pairs-p-seed1"
    assert sft.Config(n_layer=4).out == "runs/reviews/sft-nlayer4" and sft.Config(on="chosen").out == "runs/reviews/preferred-ft"
    assert classifier.Config().out == "runs/imdb/gold"


def test_two_settings_are_two_folders():
    found = [dpo.Config(**one).out for one in (
        {}, {"beta": 0.2}, {"seed": 1}, {"lr": 1e-3}, {"batch_size": 8}, {"warmup": 3}, {"max_grad_norm": 2.0}, {"epochs": 0.5},
        {"label_smoothing": 0.1}, {"labels": "argmax"}, {"prompts": 5}, {"pairs": "a.jsonl"}, {"pairs": "b.jsonl"},
        {"bank_samples": 8}, {"loss": "unlikelihood"}, {"loss": "unlikelihood", "alpha": 0.1}, {"sft": "x/sft"}, {"sft": "x/y"})]
    assert len(set(found)) == len(found)
    assert dpo.Config(pairs="x/" * 300 + "a.jsonl").out.count("/") == 2 and len(dpo.Config(pairs="x" * 999).out) < 240


def test_what_is_made_of_a_policy_lies_beside_it_or_in_it():
    """Two policies side by side must not share a bank: one that is not called sft has its own folder for what it makes."""
    assert dpo.Config(sft="runs/imdb-gpt2/sft").out == "runs/imdb-gpt2/dpo-beta0.1-seed0"
    assert dpo.Config(sft="runs/reviews/sft-nlayer4").out == "runs/reviews/sft-nlayer4/dpo-beta0.1-seed0"


def test_the_command_is_what_a_user_would_type():
    assert command(dpo.Config(beta=0.5, resume=True, out="x")) == ["dpo.py", "--beta", "0.5", "--out", "x", "--resume"]
    assert typed(dpo.Config(dataset="imdb", beta=0.5, resume=True)) == "python dpo.py --dataset imdb --beta 0.5"
    assert typed(sft.Config(resume=True)) == "python sft.py"
    for config in (dpo.Config(dataset="tldr", lr=1.0), sft.Config(on="chosen", dataset="posts", n_layer=3), ppo.Config(clip=1.0)):
        words = command(config)
        module = {"dpo.py": dpo, "sft.py": sft, "ppo.py": ppo}[words[0]]
        assert parse(module.Config, "", words[1:]) == config
    assert label("label_smoothing", 0.2) == "labelsmoothing0.2" and label("quick", True) == "quick"
    assert run_folder(Config(dataset="imdb", lr=1.0), "x") == "runs/imdb/x-lr1"


def test_a_run_is_found_by_its_policy_wherever_that_lay(tmp_path):
    """python classifier.py has --sft "", a script that lacks a classifier names the folder: one policy, one run. Another
    policy is another run."""
    config = classifier.Config(dataset="imdb", out=str(tmp_path))
    made_from = {"policy": "0123", "documents": "abcd"}
    (tmp_path / "config.json").write_text(json.dumps({**dataclasses.asdict(config), "built_from": made_from}))
    named = dataclasses.replace(config, sft="runs/imdb/sft")
    compare_settings(tmp_path, named, made_from, "")
    with pytest.raises(SystemExit, match="policy was '0123', now '4567'"):
        compare_settings(tmp_path, named, made_from | {"policy": "4567"}, "")
