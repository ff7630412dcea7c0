"""Runs: where results are kept, one process at a time, and with what they were made."""
