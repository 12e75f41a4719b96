"""`imdb`: the DPO paper's sentiment task on real reviews. Gold reward: a classifier trained on the
labelled half."""
from common.tasks import Preset, Task

TASK = Task(
    labels="argmax",  # the better response always wins, as in the paper
    label_scale=5.0,
    real=True,
    presets={
        "cpu": Preset(
            pair_prompts=4000, pair_samples=4,
            bank_prompts=256, bank_samples=64,
            evaluate_every={"sft": 100, "dpo": 100, "ppo": 10, "reinforce": 10, "vargrad": 10,
                            "expert_iteration": 50, "conditioning": 50},
            minutes={"sft": 50, "classifier": 25, "pairs": 4, "bank": 3, "reward_model": 15},
            settings={
                "sft": dict(n_layer=4, n_head=4, n_embd=256, block_size=96, steps=6500, lr=3e-3,
                            warmup=200),
                "sft chosen": dict(steps=700, lr=3e-4),
                "classifier": dict(block_size=160),
                "dpo": dict(lr=3e-5, warmup=50),
                "ppo": dict(lr=1e-4, batch_size=128, steps=60),
                "reinforce": dict(lr=1e-4, batch_size=128, steps=60),
                "frontier": dict(seeds=1),
            }),
        "gpu": Preset(
            pair_prompts=20_000, pair_samples=4,
            bank_prompts=512, bank_samples=256,
            evaluate_every={"sft": 100, "dpo": 100, "ppo": 10, "reinforce": 10, "vargrad": 10,
                            "expert_iteration": 50, "conditioning": 50},
            settings={
                "sft": dict(n_layer=10, n_head=8, n_embd=512, block_size=256, batch_size=256,
                            steps=3000, lr=1.5e-3, warmup=200),
                "reward_model": dict(lr=1e-4),
                "classifier": dict(block_size=256, epochs=4.0, lr=1e-4, warmup=200),
                "dpo": dict(lr=5e-5, warmup=150, batch_size=64),
                "ppo": dict(lr=5e-5, batch_size=512, steps=200),
                "reinforce": dict(lr=5e-5, batch_size=512, steps=200),
            }),
    })
