"""Networks by name, pretrained networks, checkpoints, device and precision, the forward pass, evaluation.

May import `data`, `store` and `core`.
"""
