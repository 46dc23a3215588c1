"""Labelled records in, an adapter and taxonomy heads out."""
