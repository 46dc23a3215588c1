"""Tokens in, vectors out, on any device."""
