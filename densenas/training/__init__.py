"""The training engine: a loop that repeats exactly, survives a kill at any step and runs on many processes.

It trains whatever it is given, and knows nothing of alpha and beta.
"""
