"""Sends jobs to processes, here or on a cluster, and collects their results."""
