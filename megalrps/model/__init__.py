"""The model: LLaMA written once for one process and for every layout; imports kernels/, parallel/, checkpoint/."""
