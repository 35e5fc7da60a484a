"""The command `ablation-sweeps`, also `python -m ablation_sweeps`: it launches jobs and sweeps, and its subcommands
inspect, retry, report and export them."""

import os
import sys

from ablation_sweeps.base import interrupts


def main() -> None:
    """Run a subcommand if the first argument is a plain word, which no option of Hydra is; otherwise launch."""
    interrupts.say_in_one_line()
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    if first.isalpha() or first == "--version":
        _subcommand()
        return
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as under `python -m`: a yaml may name a class in a file beside it
    from ablation_sweeps.cli.launch import launch

    launch()


def _subcommand() -> None:
    from ablation_sweeps.base.terminal import lose_output, plain, typed_command
    from ablation_sweeps.cli.commands import app

    try:
        app(prog_name=typed_command())
    except BrokenPipeError:  # `| head`: its reader has seen enough
        lose_output()
        sys.exit(1)
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.exit(f"error: {plain(error)}")


if __name__ == "__main__":
    main()
