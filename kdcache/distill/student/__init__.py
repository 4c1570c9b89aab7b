"""Stage two: soft targets stream from the cache into student training.

Never imports `distill.teacher`.
"""
