"""Finds, records, selects and replaces the neurons of a model."""
