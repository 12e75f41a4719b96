from data.posts.grammar import gold_reward  # the task's exact gold reward, as evaluate.py looks for it

__all__ = ["gold_reward"]
