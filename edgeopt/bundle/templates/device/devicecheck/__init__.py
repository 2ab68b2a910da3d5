"""Checks this bundle's model on a phone or board. Python 3.8 and its standard library only; documented in the README.

Exit codes: 0 all is well, 1 an output or a gate failed, 2 wrong use or a damaged bundle, 3 a device, a tool or a
program is missing or was lost, 4 the model can't be run there.
"""
