"""Former places of classes. Configs written before a move name them, and so do signatures."""

from __future__ import annotations

# Former path -> present path. Results made before are read, resumed and compared because of this table, and a
# signature always holds the former path: a class that moves does not rename its results.
MOVED = {
    "ablation_sweeps.job.Calibration": "ablation_sweeps.experiment.job.Calibration",
    "ablation_sweeps.job.Evaluation": "ablation_sweeps.experiment.job.Evaluation",
    "ablation_sweeps.local.Local": "ablation_sweeps.dispatch.local.Local",
    "ablation_sweeps.selection.Random": "ablation_sweeps.neurons.selection.Random",
    "ablation_sweeps.selection.Schedule": "ablation_sweeps.neurons.selection.Schedule",
    "ablation_sweeps.sites.Site": "ablation_sweeps.neurons.sites.Site",
    "ablation_sweeps.slurm.Slurm": "ablation_sweeps.dispatch.slurm.Slurm",
    "ablation_sweeps.tracking.NoTracking": "ablation_sweeps.tracking.wandb.NoTracking",
    "ablation_sweeps.tracking.Wandb": "ablation_sweeps.tracking.wandb.Wandb",
}
FORMER = {present: former for former, present in MOVED.items()}
