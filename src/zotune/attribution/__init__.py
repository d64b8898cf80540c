"""What a run's journal says about its training examples: each one's share of the change of a validation loss, and other orders of them."""

from zotune.attribution.orders import Reordered, RunSlopes
from zotune.attribution.shares import Shares, StepShare, shares_of

__all__ = ["Reordered", "RunSlopes", "Shares", "StepShare", "shares_of"]
