"""How a row of logits is stored: one object per kind, and a table of the kinds.

Only these modules know what is inside a row. Adding a kind takes one file and one entry in `registry.KINDS`.
May import `core`; never torch.
"""
