"""What an answer is worth: verifiable tasks, users' own functions, penalties, and their weighted sum.

Host side, plain Python and numpy: the process that runs a user's function loads this and neither jax nor flax.
"""

from qwen_jax.rewards.sample import Sample
from qwen_jax.rewards.weighing import RewardConfig, Rewards, Scores

__all__ = ["RewardConfig", "Rewards", "Sample", "Scores"]
