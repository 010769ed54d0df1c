"""``trainer transform``: change a model's weights layer by layer, and write a checkpoint that others load."""
