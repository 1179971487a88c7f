"""Scripts that run other libraries, each in its own environment; they import nothing of this project."""
