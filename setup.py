"""Puts conf/ into the wheel, inside the package; pyproject.toml holds everything else."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConf(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # an editable install reads conf/ where it is
            conf = Path(self.build_lib, "ablation_sweeps", "conf")
            shutil.rmtree(conf, ignore_errors=True)  # an earlier build may have left yamls that are gone
            shutil.copytree("conf", conf)


setup(cmdclass={"build_py": BuildWithConf})
