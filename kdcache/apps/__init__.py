"""What the commands do: pipeline, sweep, bench, predict, export, report, doctor.

May import every package but `cli`.
"""
