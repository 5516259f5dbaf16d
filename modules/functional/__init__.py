"""Pure functions: the mathematics of routing, losses, schedules and counts."""
