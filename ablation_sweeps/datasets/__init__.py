"""Kinds of datasets, one file each."""
