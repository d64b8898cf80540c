"""Named methods: choices of subspace, direction, estimator and update rule with the defaults of their papers."""
