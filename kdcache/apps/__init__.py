"""What the commands do: dumping, training, sweep, bench, predict, export, report, doctor.

May import every package but `cli`.
"""
