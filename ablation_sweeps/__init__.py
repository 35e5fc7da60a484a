"""Which value should stand in for an ablated neuron of a transformer?

The command `ablation-sweeps` runs sweeps; the names below do the same from Python. A job is one curve: the metrics of a
model on a dataset while one method ablates more and more of its neurons. It takes the same options as the command, and
writes the same files:

>>> from ablation_sweeps import compose_job, read_curves, run_job
>>> small = ["fraction=half", "eval.tokens=300", "statistics.tokens=300", "tracking=none", "results_dir=my_results"]
>>> for method in ("zero", "mean"):
...     folder = run_job(compose_job(f"method={method}", *small))
>>> curves = read_curves("my_results/default")
>>> curves[curves.metric == "loss"].pivot(index="fraction", columns="method", values="value").shape
(2, 2)

The parts of a job can be used alone. `reading` records the neurons' activations in a forward pass, and `ablated`
replaces them with values of your own:

>>> import torch
>>> from ablation_sweeps import ablated, find_projections, reading
>>> job = compose_job("site=mlp_pre_out", "eval.tokens=300", "batch_tokens=200")
>>> model = job.model.load()
>>> texts = job.dataset.examples("evaluation")
>>> batch, *_ = model.encode(texts, "evaluation", job.budget("evaluation"), job.batch_tokens, job.seed)
>>> projections = find_projections(model, job.site, job.model.site_paths)  # one per layer
>>> with torch.no_grad(), reading(projections, len(batch.labels)) as activations:
...     clean = model.logits(batch)  # [example, position, token]
>>> means = [layer[batch.keep].mean(0) for layer in activations]  # [neuron]
>>> every_second = [torch.arange(len(mean)) % 2 == 0 for mean in means]  # True: ablated
>>> with torch.no_grad(), ablated(projections, every_second, means, len(batch.labels)):
...     damaged = model.logits(batch)
>>> (damaged - clean).abs().max().item() > 0.1
True

Names:
    compose_job: builds and checks a job from options; nothing is loaded yet.
    Job: one curve, with its parts `model`, `dataset`, `method`, `site`, ... and the `folder` of its results.
    run_job: runs a job, unless it has finished before; returns its folder.
    read_curves: reads the rows of all finished runs below some folders as a DataFrame.
    read_units: reads the effects of units that were ablated alone (fraction=each), with corrected p-values.
    summarise: turns these into one row per study, method and metric, with the area under the curve.
    find_projections: finds the modules whose inputs are the neurons.
    reading, ablated: context managers that record, or replace, the neurons' activations in forward passes.
    Scored: base of a selection rule of your own that gives each unit a score.
    Method, Fitting, Replacement, Constant: the interface of a method of your own, its inputs and its results.
    UserError: an error that its one-line message explains.
    __version__: version of this package.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ablation_sweeps.base.errors import UserError
    from ablation_sweeps.experiment.compose import compose_job
    from ablation_sweeps.experiment.job import Job
    from ablation_sweeps.experiment.run import run_job
    from ablation_sweeps.methods.method import Constant, Fitting, Method, Replacement
    from ablation_sweeps.neurons.hooks import ablated, reading
    from ablation_sweeps.neurons.sites import find as find_projections
    from ablation_sweeps.results.curves import read_curves, summarise
    from ablation_sweeps.results.units import read_units
    from ablation_sweeps.selections.scored import Scored

    __version__: str

__all__ = [
    "Constant",
    "Fitting",
    "Job",
    "Method",
    "Replacement",
    "Scored",
    "UserError",
    "__version__",
    "ablated",
    "compose_job",
    "find_projections",
    "read_curves",
    "read_units",
    "reading",
    "run_job",
    "summarise",
]

_PLACES = {
    "Constant": "ablation_sweeps.methods.method:Constant",
    "Fitting": "ablation_sweeps.methods.method:Fitting",
    "Job": "ablation_sweeps.experiment.job:Job",
    "Method": "ablation_sweeps.methods.method:Method",
    "Replacement": "ablation_sweeps.methods.method:Replacement",
    "Scored": "ablation_sweeps.selections.scored:Scored",
    "UserError": "ablation_sweeps.base.errors:UserError",
    "ablated": "ablation_sweeps.neurons.hooks:ablated",
    "compose_job": "ablation_sweeps.experiment.compose:compose_job",
    "find_projections": "ablation_sweeps.neurons.sites:find",
    "read_curves": "ablation_sweeps.results.curves:read_curves",
    "read_units": "ablation_sweeps.results.units:read_units",
    "reading": "ablation_sweeps.neurons.hooks:reading",
    "run_job": "ablation_sweeps.experiment.run:run_job",
    "summarise": "ablation_sweeps.results.curves:summarise",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: a command that needs few of them starts sooner."""
    if name == "__version__":
        from importlib.metadata import version

        return version("ablation-sweeps")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return resolve_name(_PLACES[name])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
