"""The hooks of PaRSP."""


class Parsp:
    """Train a sparse core of neurons per task, in directions to which earlier tasks are blind."""
