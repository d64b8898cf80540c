"""Inference engines that compute the model: what they offer to training, and each of them."""
