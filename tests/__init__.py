"""Tests of bioscan_xla."""
