"""What self-play measures on held-out items after every iteration."""

METRICS = {
    "target_reward": "log pi_t(y|x) - log pi_t-1(y|x) of held-out targets in the last iteration, nats",
    "least_reward": "the lowest mean of that over the iterations, nats",
    "target_kept": "share of held-out targets that the last iteration made no less likely",
    "target_drift": "log pi_T(y|x) - log pi_0(y|x) of held-out targets, nats",
    "target_nll": "held-out targets, nats a token, at the end",
    "nll_rise": "the same less that of the start, nats a token",
    "exact_match": "greedy answers equal to the target, at the end",
    "exact_gain": "the same less that of the start",
    "answer_tokens": "mean length of the greedy answers at the end, tokens",
    "unfinished": "greedy answers that did not end within evaluate.max_new_tokens",
    "distinct": "different pairs of neighbouring words in all greedy answers, as a share of all pairs",
}
"""Name: what it is, with its unit. Those that are means over items can be compared item by item."""
