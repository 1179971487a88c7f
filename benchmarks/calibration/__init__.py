"""Calibration of simulators: every method of the library, and other libraries, on the same problems."""
