"""PaRSP: continual learning in sparse regions of neurons, in the null space of earlier tasks' inputs."""
