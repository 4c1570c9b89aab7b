"""Datasets by name, samples by index, views with exact replay, preprocessing, tokenization and the loader.

May import `store` and `core`.
"""
