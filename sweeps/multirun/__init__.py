"""Running many settings: Hydra's multirun in processes, on Slurm or Ray, resumed after kills."""
