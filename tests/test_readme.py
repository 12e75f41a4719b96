"""What the README promises: its commands are run somewhere."""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# commands that cannot run here (too long, or a network); the test that runs the same path at a small size
SMALL = {
    "python data/imdb/prepare.py": "test_imdb.py: test_the_whole_imdb_pipeline",
    "python dpo.py --dataset imdb --beta 0.1": "test_imdb.py: test_the_whole_imdb_pipeline",
    "python experiments/frontier.py --quick": "test_frontier.py",
    "python experiments/frontier.py": "test_frontier.py",
    "python experiments/frontier.py --dataset imdb": "test_frontier.py",
    "python experiments/frontier.py --grid why": "test_frontier.py",
    "python experiments/frontier.py --grid ablation": "test_frontier.py",
    "python dpo.py --dataset posts": "test_posts.py: test_the_pipeline_runs_on_posts",
    "python ppo.py --dataset posts": "test_posts.py: test_the_pipeline_runs_on_posts",
    "python experiments/winrate.py --quick": "test_winrate.py",
    "python experiments/winrate.py": "test_winrate.py",
    "python experiments/winrate.py --dataset tldr": "test_winrate.py, test_tldr.py",
    "python experiments/winrate.py --judge FILE.py:function": "test_winrate.py",
    "python experiments/scaling.py": "test_scaling.py",
    "python data/tldr/prepare.py": "test_tldr.py",
    "python experiments/agreement.py": "test_tldr.py",
    "python ppo.py --reward FILE.py:function": "test_ppo.py",
    "python dpo.py --pairs FILE.jsonl": ".ci/run, with the pairs that the first command wrote",
    "python preference_rl.py": "test_preference_rl.py",
    "python dagger.py --task track": "test_dagger.py",
    "python experiments/distill.py": "test_distill.py",
    "python experiments/bench.py": "test_frontier.py, and a step in .ci/run",
    "python sft.py --dataset imdb --init gpt2-large --steps 1000 --lr 5e-5 --out runs/imdb-gpt2/sft": "test_model.py, test_cli.py",
    "python dpo.py --dataset imdb --sft runs/imdb-gpt2/sft --lr 1e-5": "test_imdb.py: test_the_whole_imdb_pipeline",
}


def test_every_command_is_run():
    ran = (ROOT / ".ci" / "run").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.S)
    commands = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]
    assert "python dpo.py --beta 0.1" in commands and "pytest" in commands
    for command in commands:
        assert command in SMALL or command in ran.splitlines() or command.replace("pip install", "pip install -q") in ran, command


def test_the_tests_named_beside_the_known_bugs_exist():
    """tests/README.md: each `name` after "test_FILE:" is a test of that file."""
    named = re.findall(r"(test_\w+): (`[^|;.]*`)", (ROOT / "tests" / "README.md").read_text(encoding="utf-8"))
    assert len(named) > 40
    for module, names in named:
        source = (ROOT / "tests" / f"{module}.py").read_text()
        for name in re.findall(r"`([a-z]\w+)`", names):
            assert f"def test_{name}(" in source, (module, name)


def test_every_root_file_is_in_the_table():
    for path in ROOT.glob("*.py"):
        assert f"[`{path.name}`]" in README, path.name
