"""The Zarr cache as seen from numpy: manifest, layout, encodings, ledger, writing, reading, sampling, verification, repair.

May import `core`; never torch. Nothing here knows datasets, networks or commands.
"""
