"""Indexed datasets, increments and the sample stream; imports numpy and the ground floor, never torch."""
