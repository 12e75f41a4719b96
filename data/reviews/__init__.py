"""`reviews`: film reviews of a grammar of ours, offline; the exact gold reward is the sentiment of
a text."""
from common.tasks import Preset, Task
from data.reviews.grammar import gold_reward

TASK = Task(
    labels="bt",
    # the labels agree with the gold order 78% of the time, about as often as human annotators do
    label_scale=5.0,
    gold_reward=gold_reward,
    presets={
        "cpu": Preset(
            pair_prompts=1600, pair_samples=4,
            bank_prompts=128, bank_samples=256,
            evaluate_every={"sft": 25, "dpo": 25, "ppo": 5, "reinforce": 5, "vargrad": 5,
                            "expert_iteration": 50, "conditioning": 50},
            minutes={"sft": 0.7, "pairs": 0.3, "bank": 0.4, "reward_model": 1.2},
            settings={
                # three passes: one leaves it below a model of word pairs (results/reviews)
                "reward_model": dict(lr=1e-3, epochs=3.0),
                "sft chosen": dict(steps=300, lr=5e-4),  # one pass over the pairs
            }),
    })
