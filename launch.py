"""Runs one job, or with -m a sweep: python launch.py -m method=zero,mean,resample,peak"""

import sys

from ablation_sweeps.base import interrupts

if __name__ == "__main__":
    interrupts.say_in_one_line()
    try:
        import hydra  # noqa: F401
    except ImportError:
        remedy = "type make setup, which installs it into .venv, and then source .venv/bin/activate"
        sys.exit(f"error: this Python lacks hydra; {remedy}")
    from ablation_sweeps.cli.launch import launch

    launch()
