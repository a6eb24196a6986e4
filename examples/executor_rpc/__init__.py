"""A web backend, an executor, and callbacks."""
