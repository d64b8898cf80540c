"""What a run's journal says about its training examples: each one's share of the change of a validation loss."""

from zotune.attribution.shares import Shares, StepShare, shares_of

__all__ = ["Shares", "StepShare", "shares_of"]
