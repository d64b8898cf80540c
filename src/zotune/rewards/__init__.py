"""Rewards: training by what a function says of generated texts, through which no gradient passes."""
