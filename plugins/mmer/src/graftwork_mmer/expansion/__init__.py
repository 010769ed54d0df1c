"""Two toy modalities, an expert of each, and questions that need both: the benchmark ``mmer:expansion``."""
