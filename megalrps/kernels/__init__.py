"""Kernels: one file an operation of the training step, each a function on tensors; imports torch and no other room."""
