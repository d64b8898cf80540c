"""Rewards: training by what a function says of generated texts, through which no gradient passes."""

from zotune.rewards.calls import Failure, RewardFunction
from zotune.rewards.functions import Rewards, Scores
from zotune.rewards.loading import load

__all__ = ["Failure", "RewardFunction", "Rewards", "Scores", "load"]
