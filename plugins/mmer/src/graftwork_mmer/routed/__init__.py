"""One model with the weights of many experts: every token is computed with those of its route."""
