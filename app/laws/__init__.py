"""Scaling laws with printed constants, and what they say about a budget."""
