"""Numbers and plots of logits and runs: calibration, temperature, figures. numpy and matplotlib.

May import `store` and `core`; never torch.
"""
