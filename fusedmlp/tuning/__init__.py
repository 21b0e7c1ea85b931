"""Measure on this machine where the kernels are faster, and keep the results in a table (``tune``)."""
