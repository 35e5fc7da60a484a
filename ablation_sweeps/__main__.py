"""python -m ablation_sweeps"""

import os
import sys

from ablation_sweeps import interrupts

if __name__ == "__main__":
    interrupts.say_in_one_line()

from ablation_sweeps.cli import app
from ablation_sweeps.console import lose_output, plain

try:
    app(prog_name="python -m ablation_sweeps")
except BrokenPipeError:  # `| head`: its reader has seen enough
    lose_output()
    sys.exit(1)
except Exception as error:
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        raise
    sys.exit(f"error: {plain(error)}")
