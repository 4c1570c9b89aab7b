"""Foundations that every package uses: errors, configuration, random keys, atomic files, locks, progress, run folders.

Imports no other package of kdcache, and never torch.
"""
