"""The order of things in a step and in a plan: options, train state, the iteration loop, metrics."""
