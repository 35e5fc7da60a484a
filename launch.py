"""Runs one job, or with -m a sweep: python launch.py -m method=zero,mean,resample,peak"""

import sys

from ablation_sweeps.base import interrupts

if __name__ == "__main__":
    interrupts.say_in_one_line()
    try:
        import hydra  # noqa: F401
    except ImportError:
        remedy = "make setup installs all, and source .venv/bin/activate makes it python"
        sys.exit(f"error: this Python lacks hydra; {remedy}")
    from ablation_sweeps.cli.launch import launch

    launch()
