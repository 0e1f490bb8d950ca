"""aipo_hpc: iterative preference optimization of language models as a file-based job graph on Slurm."""

__version__ = "0.1.0"
