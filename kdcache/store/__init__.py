"""The Zarr cache as seen from numpy: manifest, layout, ledger, writing, reading, sampling, verification and repair.

May import `core`; never torch. Nothing here knows datasets, networks or commands.
"""
