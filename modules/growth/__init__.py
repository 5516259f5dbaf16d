"""Growth: pure functions from the parameters of one architecture to those of a larger one."""
