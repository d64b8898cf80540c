"""Rewards: training by what a function says of generated texts, through which no gradient passes."""

from zotune.forward.generation import Sampling
from zotune.rewards.calls import Failure, RewardFunction
from zotune.rewards.functions import Rewards, Scores
from zotune.rewards.loading import load
from zotune.rewards.objective import RewardLoss
from zotune.tasks.prompts import RewardCollator

__all__ = ["Failure", "RewardCollator", "RewardFunction", "RewardLoss", "Rewards", "Sampling", "Scores", "load"]
