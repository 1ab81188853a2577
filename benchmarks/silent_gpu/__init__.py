"""A GPU that computes nothing, to see without one what torch allocates there; see __main__.py."""
