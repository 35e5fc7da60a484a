"""python -m ablation_sweeps"""

from ablation_sweeps.cli import app

app(prog_name="python -m ablation_sweeps")
