"""What measures speed and memory: `make bench`.

Everything is a ratio of things that took turns in one run, because machines are shared and differ.
"""
