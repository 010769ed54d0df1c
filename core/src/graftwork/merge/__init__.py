"""Merging models: what a method sees and returns, the experts on disk, and the pass that makes one model of them."""
