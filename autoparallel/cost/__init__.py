"""The price of one piece of work on given hardware, and the measuring of hardware.

Here belong seconds and bytes of one op, one collective or one optimizer update, hardware as data
with its links, and the calibration that measures a machine. Nothing here knows of a whole plan: the
costs of neighbouring choices belong in `strategy`, the memory, time and communication of a finished
plan in `analysis`.
"""
