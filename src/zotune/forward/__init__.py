"""The model at θ + offset, evaluated without writing to any weight."""
