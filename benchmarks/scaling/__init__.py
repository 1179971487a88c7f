"""Strong and weak scaling over devices, measured and predicted."""
