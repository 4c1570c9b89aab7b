"""Stage one: the teacher runs once and its logits go to the store.

Never imports `distill.student`: a student needs no teacher, and no code of one.
"""
