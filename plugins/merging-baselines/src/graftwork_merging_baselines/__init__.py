"""Baselines that merging methods are compared with."""
