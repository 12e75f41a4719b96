"""`posts`: forum posts and summaries of a grammar of ours, offline; the exact gold reward counts
facts kept and invented."""
from common.tasks import Preset, Task
from data.posts.grammar import gold_reward

TASK = Task(
    labels="bt",
    label_scale=5.0,  # the labels agree with the gold order 76% of the time
    gold_reward=gold_reward,
    presets={
        "cpu": Preset(
            pair_prompts=1600, pair_samples=4,
            bank_prompts=128, bank_samples=64,
            evaluate_every={"sft": 25, "dpo": 25, "ppo": 5, "reinforce": 5, "vargrad": 5,
                            "expert_iteration": 50, "conditioning": 50},
            minutes={"sft": 3.5, "pairs": 1, "bank": 1, "reward_model": 2},
            settings={
                "sft": dict(block_size=224, steps=1000),
                "sft chosen": dict(steps=280, lr=5e-4),  # one pass over the pairs
                "dpo": dict(lr=1e-4),
                "ppo": dict(lr=2e-4, batch_size=128),
                "reinforce": dict(lr=2e-4, batch_size=128),
                "scaling": dict(sizes="1x32,2x64,2x128"),
            }),
    })
