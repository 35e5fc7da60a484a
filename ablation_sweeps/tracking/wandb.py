"""Trackers: W&B, or none. W&B mirrors the files of a sweep, so no failure here makes a job fail.

W&B's own variables apply if no option says otherwise: WANDB_PROJECT, WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_JOB_TYPE,
WANDB_NAME, WANDB_NOTES, WANDB_TAGS, WANDB_DIR, WANDB_MODE and WANDB_DISABLED. WANDB_RUN_ID does not: it names one run.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.results import heat_map, run_folder
from ablation_sweeps.results.display import scored
from ablation_sweeps.results.record import flatten, points, summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    Rows = DataFrame | Sequence[Mapping[str, Any]]
    from ablation_sweeps.results.record import RunRecord, SweepRecord

log = logging.getLogger(__name__)


INIT_SECONDS = 30.0  # W&B's 90 s are too long on a node without internet; after one time-out, the process stays offline
FINISH_SECONDS = 60.0  # per job; W&B's own default is to wait for ever
FINISH_TABLES = 1800.0  # for tables with all statistics, while a user waits
OFFLINE_MODES = ("offline", "dryrun", "disabled")  # values of WANDB_MODE
TAG_LENGTH = 64  # the server refuses longer ones
_offline_because: list[str] = []  # why this process stays offline; the user was told once
_refused: set[str] = set()  # values of WANDB_DIR that cannot be used; the user was told


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class NoTracking:
    """No tracking: logs nothing."""

    def log_run(self, run: RunRecord) -> bool:
        return False


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Wandb:
    """One W&B run per curve, with the fraction as x axis.

    Attributes:
        entity: user or team; None is the default of the key.
        mode: auto is online if there is a key, and otherwise offline. The environment's WANDB_MODE wins.
        tags: added to the model, the method, the site and WANDB_TAGS.
        sync: at the end of a sweep, send everything that W&B does not have yet.
    """

    project: str
    entity: str | None
    mode: Literal["auto", "online", "offline"]
    tags: tuple[str, ...]
    sync: bool

    @property
    def place(self) -> str:
        """Entity and project of the runs."""
        return f"{self.entity or ''}/{self.project}"

    def log_sweep(self, folder: Path) -> None:
        """Send the tables of a sweep if W&B has its curves; with `sync`, everything that it lacks.

        Raises:
            UserError: W&B does not take what `sync` sends.
        """
        from ablation_sweeps.tracking.publish import publish, send_tables  # it imports this module

        if self.sync:
            log.info("%s to W&B", publish(folder))
        elif self.is_online and any(run_folder.published(run, self.place) for run in run_folder.runs(folder)):
            try:
                send_tables(folder)
            except UserError as error:
                log.error("%s", error)

    @property
    def is_online(self) -> bool:
        """True if this process still tries to go online."""
        return (_environments_mode() or self.mode) not in OFFLINE_MODES and not _offline_because

    def log_run(self, run: RunRecord) -> bool:
        """Log the whole curve at once: an offline run that is opened a second time is uploaded twice.

        Returns:
            True if W&B has it now.
        """
        _quiet()
        if _environments_mode() == "disabled":
            return False
        with _agents_run() as its_id:
            run = replace(run, run_id=its_id) if its_id else run
            if self.is_online and self._online(run):
                return True
            # A retried job logs the same curve under the same id: uploading both would show each point twice.
            _forget(run)
            try:
                self._write(run, "offline")
            except Exception as error:
                log.error("W&B: nothing logged for %s (%s); its rows are in rows.parquet", run.name, _line(error))
        return False

    def send(self, run: RunRecord) -> None:
        """Send a run to W&B now. What W&B already has under its id is replaced.

        Raises:
            UserError: there is no key, or W&B does not take it.
        """
        with online():
            self._write(run, "online")
        _forget(run)  # otherwise `wandb sync` would send its points a second time

    def send_tables(self, sweep: SweepRecord) -> None:
        """Send, as `send` does, a run of the type `report`, with the statistics as artifacts."""
        import wandb

        with online(), self._start(
            sweep.folder, "online", id=sweep.run_id, name=sweep.name, group=group_of(sweep.name), job_type="report",
            tags=self.tags, config={"sweep": sweep.name}, finish_seconds=FINISH_TABLES,
        ) as logged:  # fmt: skip
            logged.log({name: wandb.Table(dataframe=table) for name, table in sweep.tables.items()})
            if sweep.heat_maps:
                logged.log({f"units/{name}": _image(figure) for name, figure in sweep.heat_maps.items()})
            for signature, (folder, about) in sweep.statistics.items():
                artifact = wandb.Artifact(
                    f"statistics-{signature}", "statistics", metadata={**about, "signature": signature}
                )
                for file in sorted(folder.glob("*.safetensors")):
                    artifact.add_file(str(file), policy="immutable")  # otherwise it is copied first
                logged.log_artifact(artifact)

    def _online(self, run: RunRecord) -> bool:
        """Log the run online. Returns False if that failed, and the caller must write it offline."""
        import wandb

        try:
            if not wandb.login(prompt=False, verify=False):
                return _go_offline("no API key found", run)
            self._write(run, "online")
        except TimeoutError as error:  # from finish: the curve is complete on disk, and W&B has part of it already
            _go_offline(_line(error), run)
        except Exception as error:
            # Otherwise the id stays in use and the offline run fails ("run ID is in use"). If W&B's service has died,
            # this raises an error, or even exits, but the next `wandb.init` starts a new service anyway.
            with contextlib.suppress(Exception, SystemExit):
                wandb.teardown()
            return _go_offline(_line(error), run)
        return True

    def _write(self, run: RunRecord, mode: Literal["online", "offline"]) -> None:
        tags = tuple(dict.fromkeys((run.model, run.method, run.site, *self.tags)))
        labels = {key: getattr(run, key) for key in ("sweep", "model", "dataset", "site", "method", "seed", "study")}
        with self._start(
            run.folder, mode, id=run.run_id, name=os.environ.get("WANDB_NAME") or run.name, group=group_of(run.sweep),
            job_type=job_type(), tags=tags, config={**flatten(run.config), **labels},
        ) as logged:  # fmt: skip
            # The automatic summary is the last point of a curve: everything ablated, which says little.
            logged.define_metric("fraction", hidden=True, summary="none")
            logged.define_metric("eval/*", step_metric="fraction", summary="none")
            for point in points(run.rows):
                logged.log(point)
            logged.summary.update(summary(run.rows))
            if run.units is not None:
                _log_units(logged, run, run.units)

    @contextlib.contextmanager
    def _start(
        self,
        folder: Path,
        mode: Literal["online", "offline"],
        tags: tuple[str, ...],
        finish_seconds: float = FINISH_SECONDS,
        **about: Any,
    ) -> Iterator[Any]:
        import wandb

        root = _root(folder)
        root.mkdir(parents=True, exist_ok=True)
        tags = tuple(dict.fromkeys((*tags, *_environments_tags())))
        timeouts = {"init_timeout": INIT_SECONDS, "finish_timeout": finish_seconds, "finish_timeout_raises": True}
        # No machine statistics: the run lasts a second, during which the load means nothing.
        settings = wandb.Settings(console="off", silent=True, x_disable_stats=True, **timeouts)
        if AGENTS_SWEEP in os.environ:  # the agent sets all of these; W&B would warn
            del about["id"]
        else:
            about |= {"project": self.project, "entity": self.entity}
        run = wandb.init(
            mode=mode,
            tags=[tag[:TAG_LENGTH] for tag in tags],
            dir=str(root),
            reinit="create_new",  # a run that the caller has open stays open
            settings=settings,
            **about,
        )
        try:
            yield run
        except BaseException:
            run.finish(exit_code=1)  # an error inside the run's own `with` would print a traceback
            raise
        run.finish()


def _log_units(logged: Any, run: RunRecord, units: DataFrame) -> None:
    """Log the effects of units that were ablated alone, as a table and as a heat map."""
    import wandb

    figure = heat_map.draw(units, run.name, scored(units["kind"].iloc[0]))
    logged.log({"units": wandb.Table(dataframe=units), "heat_map": _image(figure)})


def _image(figure: Figure) -> Any:
    """The picture of a figure. W&B itself can only take those of pyplot, which nothing here imports."""
    import wandb
    from PIL import Image

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=200)
    return wandb.Image(Image.open(file))


@contextlib.contextmanager
def online() -> Iterator[None]:
    """Context manager: turn errors into a UserError, and refuse to start without a key."""
    import wandb

    _quiet()
    _leave_the_agents_run()
    if _environments_mode() in OFFLINE_MODES:
        name = "WANDB_MODE" if os.environ.get("WANDB_MODE") else "WANDB_DISABLED"
        raise UserError(f"W&B: {name}={os.environ[name]} forbids sending anything; unset it")
    try:
        if not wandb.login(prompt=False, verify=False):
            raise UserError("W&B: no API key found; type wandb login, or set WANDB_API_KEY")
        yield
    except UserError:
        raise
    except Exception as error:
        with contextlib.suppress(Exception, SystemExit):
            wandb.teardown()
        raise UserError(f"W&B: {_line(error)}") from error


def _quiet() -> None:
    os.environ.pop("WANDB_SERVICE", None)  # inherited from a parent process, whose service may be gone
    os.environ["WANDB_SILENT"] = "true"  # `silent` in the run's settings does not cover the log-in
    # W&B's telemetry uses the network in offline mode, too; on a node without internet it retries and warns for 10 s.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


def _environments_mode() -> str | None:
    """WANDB_MODE, or the mode that the older WANDB_DISABLED means; None if neither is set."""
    disabled = os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on")
    return os.environ.get("WANDB_MODE") or ("disabled" if disabled else None)


def _environments_tags() -> list[str]:
    return [tag.strip() for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag.strip()]


def group_of(sweep: str) -> str:
    """W&B's group for the runs of a sweep."""
    return os.environ.get("WANDB_RUN_GROUP") or sweep


def job_type() -> str:
    """W&B's job type for a curve."""
    return os.environ.get("WANDB_JOB_TYPE") or "ablation"


def _root(folder: Path) -> Path:
    """The folder in which W&B creates its folder `wandb`."""
    chosen = os.environ.get("WANDB_DIR")
    if chosen and (why := _why_not_writable(chosen)) is None:
        return Path(chosen).expanduser()
    if chosen and chosen not in _refused:  # W&B would silently use a temporary folder
        _refused.add(chosen)
        log.warning("W&B: WANDB_DIR=%s: %s; runs go to %s/wandb", chosen, why, folder)
    return folder


def _why_not_writable(folder: str) -> str | None:
    """Why a folder, which is created if it is missing, cannot be written to; None if it can."""
    root = Path(folder).expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return str(error.strerror).lower()
    return None if os.access(root, os.R_OK | os.W_OK) else "cannot be written to"


AGENTS_SWEEP = "WANDB_SWEEP_ID"  # set by `wandb agent`, with the id of the one run that it expects
ONE_RUN = ("WANDB_RUN_ID", "WANDB_RESUME", AGENTS_SWEEP, "WANDB_SWEEP_PARAM_PATH")


@contextlib.contextmanager
def _agents_run() -> Iterator[str | None]:
    """Context manager: gives the id of the run that `wandb agent` expects of this command, if it logs a single curve.

    Later runs of this process are then outside of the agent's sweep.
    """
    its_id = os.environ.get("WANDB_RUN_ID") if AGENTS_SWEEP in os.environ and _logs_one_curve() else None
    if its_id is None:
        _leave_the_agents_run()
        yield None
        return
    import wandb

    try:
        yield its_id
    finally:
        with contextlib.suppress(Exception, SystemExit):
            wandb.teardown()  # W&B reads the environment once per session
        for name in ONE_RUN:
            os.environ.pop(name, None)


def _leave_the_agents_run() -> None:
    """Ignore a WANDB_RUN_ID, with a warning: runs with the same id would become one run with the points of all."""
    if its_id := os.environ.get("WANDB_RUN_ID"):
        why = "a sweep logs many" if AGENTS_SWEEP in os.environ else "each curve has an id of its own"
        log.warning("W&B: WANDB_RUN_ID=%s names one run, and is ignored: %s", its_id, why)
    for name in ONE_RUN:
        os.environ.pop(name, None)


def _logs_one_curve() -> bool:
    """True for a launch without -m."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.RUN


def _forget(run: RunRecord) -> None:
    """Delete W&B's local files of a run."""
    for stale in (_root(run.folder) / "wandb").glob(f"*run-*-{run.run_id}"):
        shutil.rmtree(stale, ignore_errors=True)


def _go_offline(reason: str, run: RunRecord) -> Literal[False]:
    _offline_because.append(reason)
    log.warning("W&B: %s; logging offline. Upload later with: wandb sync %s/wandb/*run-*", reason, _root(run.folder))
    return False


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
