"""Editing: facts and sentences written into the output projections of a model, as changes that can be taken back."""
