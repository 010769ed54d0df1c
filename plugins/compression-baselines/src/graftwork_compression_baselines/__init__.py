"""Baselines that compression methods are compared with: RTN, GPTQ, SmoothQuant, AWQ, Hadamard rotations, SVD, LQER.

Importing this package lets transformers' ``from_pretrained`` load what they have written, rotations and factors
included.
"""

import graftwork.transform.loading  # noqa: F401
