"""Scripts that time other libraries; each runs by itself, in an environment that holds its library only."""
