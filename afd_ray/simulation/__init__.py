"""Clusters on a virtual clock, from a seed."""
