"""Where the bytes of a cache are: one object per kind of storage, with bytes by key.

Chunks, shards, ledger and manifest do not know where they are kept, and nothing else in `store` opens a file.
Adding a kind takes one file and one entry in `registry.KINDS`. May import `core`; never torch.
"""
