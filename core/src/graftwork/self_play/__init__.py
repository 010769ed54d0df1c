"""Learn in iterations from what the model itself writes: players, rounds of answers, pairs, references."""
