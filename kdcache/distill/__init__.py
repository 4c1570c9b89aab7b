"""Losses, objectives and the training loop; `teacher` dumps logits, `student` trains from them.

May import `models`, `data`, `store` and `core`. `teacher` and `student` never import each other.
"""
