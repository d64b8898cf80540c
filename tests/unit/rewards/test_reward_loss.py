"""The loss of rewarded completions, alone and in an optimizer's steps."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from zotune import ZerothOrder, methods
from zotune.forward.generation import Sampling
from zotune.optim.journal import read
from zotune.optim.replay import replay
from zotune.rewards.functions import Rewards
from zotune.rewards.objective import RewardLoss
