"""Former import paths of classes, which earlier configs and all signatures contain."""

from __future__ import annotations

# Former path -> present path. With it, earlier results are read, resumed and compared. A signature always holds the
# former path, so moving a class does not rename its results.
MOVED = {
    "ablation_sweeps.job.Calibration": "ablation_sweeps.experiment.job.Calibration",
    "ablation_sweeps.job.Evaluation": "ablation_sweeps.experiment.job.Evaluation",
    "ablation_sweeps.local.Local": "ablation_sweeps.dispatch.local.Local",
    "ablation_sweeps.selection.Random": "ablation_sweeps.selections.random.Random",
    "ablation_sweeps.neurons.selection.Random": "ablation_sweeps.selections.random.Random",
    "ablation_sweeps.selection.Schedule": "ablation_sweeps.neurons.schedule.Fractions",
    "ablation_sweeps.neurons.selection.Schedule": "ablation_sweeps.neurons.schedule.Fractions",
    "ablation_sweeps.sites.Site": "ablation_sweeps.neurons.sites.Site",
    "ablation_sweeps.slurm.Slurm": "ablation_sweeps.dispatch.slurm.Slurm",
    "ablation_sweeps.tracking.NoTracking": "ablation_sweeps.tracking.wandb.NoTracking",
    "ablation_sweeps.tracking.Wandb": "ablation_sweeps.tracking.wandb.Wandb",
}
FORMER = {present: former for former, present in reversed(MOVED.items())}  # of several former paths, the first
