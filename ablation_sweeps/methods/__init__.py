"""Replacement values, one file each."""
