"""Measurement of the perturbation size ε and the learning rate η from losses."""
