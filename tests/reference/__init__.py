"""Obvious implementations that the real ones are compared with."""
