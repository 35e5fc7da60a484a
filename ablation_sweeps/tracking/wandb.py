"""W&B, or nothing. The files of a sweep are the truth and W&B mirrors them: nothing that fails here costs a job.

W&B's own variables count where no option says otherwise: WANDB_PROJECT, WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_JOB_TYPE,
WANDB_NAME, WANDB_NOTES, WANDB_TAGS, WANDB_DIR, WANDB_MODE and WANDB_DISABLED. WANDB_RUN_ID does not: it names one run.
"""

from __future__ import annotations

import contextlib
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
from ablation_sweeps.results.record import flatten, points, summary

if TYPE_CHECKING:
    from pandas import DataFrame

    Rows = DataFrame | Sequence[Mapping[str, Any]]
    from ablation_sweeps.results.record import RunRecord, SweepRecord

log = logging.getLogger(__name__)


INIT_SECONDS = 30.0  # a node without internet must not wait W&B's 90 s; once only, then the process stays offline
FINISH_SECONDS = 60.0  # of a job; W&B's own default waits for ever
FINISH_TABLES = 1800.0  # with all statistics, somebody waiting for it
OFFLINE_MODES = ("offline", "dryrun", "disabled")  # of WANDB_MODE
TAG_LENGTH = 64  # the server refuses longer ones
_offline_because: list[str] = []  # why this process no longer tries to go online; the user was told once
_refused: set[str] = set()  # values of WANDB_DIR that cannot be used, of which the user was told


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class NoTracking:
    """Logs nothing."""

    def log_run(self, run: RunRecord) -> bool:
        return False


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Wandb:
    """One W&B run a curve, x = fraction.

    Attributes:
        entity: user or team; None is the default one of the key.
        mode: auto is online where there is a key and offline elsewhere. The environment's WANDB_MODE wins.
        tags: added to the model, the method, the site and WANDB_TAGS.
        sync: at the end of a sweep, send all that W&B does not have yet.
    """

    project: str
    entity: str | None
    mode: Literal["auto", "online", "offline"]
    tags: tuple[str, ...]
    sync: bool

    @property
    def place(self) -> str:
        """Where runs go."""
        return f"{self.entity or ''}/{self.project}"

    @property
    def is_online(self) -> bool:
        """Whether this process still tries to be."""
        return (_environments_mode() or self.mode) not in OFFLINE_MODES and not _offline_because

    def log_run(self, run: RunRecord) -> bool:
        """Log the whole curve at once: an offline run that is opened a second time is uploaded twice.

        Returns:
            whether W&B has it now.
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
        """Online, now. What W&B has under this id already is replaced.

        Raises:
            UserError: there is no key, or W&B does not take it.
        """
        with online():
            self._write(run, "online")
        _forget(run)  # or `wandb sync` would send its points a second time

    def send_tables(self, sweep: SweepRecord) -> None:
        """Send, as `send` does, a run of the type `report`, with the statistics as artifacts."""
        import wandb

        with online(), self._start(
            sweep.folder, "online", id=sweep.run_id, name=sweep.name, group=group_of(sweep.name), job_type="report",
            tags=self.tags, config={"sweep": sweep.name}, finish_seconds=FINISH_TABLES,
        ) as logged:  # fmt: skip
            logged.log({name: wandb.Table(dataframe=table) for name, table in sweep.tables.items()})
            for signature, (folder, about) in sweep.statistics.items():
                artifact = wandb.Artifact(
                    f"statistics-{signature}", "statistics", metadata={**about, "signature": signature}
                )
                for file in sorted(folder.glob("*.safetensors")):
                    artifact.add_file(str(file), policy="immutable")  # or it is copied first
                logged.log_artifact(artifact)

    def _online(self, run: RunRecord) -> bool:
        """Whether the curve is now W&B's business; where not, the caller writes it offline."""
        import wandb

        try:
            if not wandb.login(prompt=False, verify=False):
                return _go_offline("no API key found", run)
            self._write(run, "online")
        except TimeoutError as error:  # of finish: the curve is complete on disk, and W&B has part of it already
            _go_offline(_line(error), run)
        except Exception as error:
            # Or the id stays taken and the offline run fails ("run ID is in use"). Where W&B's service has died this
            # raises, or exits (!), and the next `wandb.init` starts a new service all the same.
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
        # No statistics of the machine: the run lasts a second, and its load during it means nothing.
        settings = wandb.Settings(console="off", silent=True, x_disable_stats=True, **timeouts)
        if AGENTS_SWEEP in os.environ:  # which says all of it; W&B would warn
            del about["id"]
        else:
            about |= {"project": self.project, "entity": self.entity}
        run = wandb.init(
            mode=mode,
            tags=[tag[:TAG_LENGTH] for tag in tags],
            dir=str(root),
            reinit="create_new",  # a run that the caller has open stays his
            settings=settings,
            **about,
        )
        try:
            yield run
        except BaseException:
            run.finish(exit_code=1)  # leaving a run's own `with` by an error prints a traceback
            raise
        run.finish()


@contextlib.contextmanager
def online() -> Iterator[None]:
    """Make errors inside a UserError, and refuse to start without a key."""
    import wandb

    _quiet()
    _leave_the_agents_run()
    if _environments_mode() in OFFLINE_MODES:
        name = "WANDB_MODE" if os.environ.get("WANDB_MODE") else "WANDB_DISABLED"
        raise UserError(f"W&B: {name}={os.environ[name]} forbids to send anything; unset it")
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
    os.environ["WANDB_SILENT"] = "true"  # `silent` of the run's settings leaves the chatter of the log-in
    # W&B's telemetry calls home in offline mode too, and on a node without internet it retries and warns for 10 s.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


def _environments_mode() -> str | None:
    """WANDB_MODE, or what the older WANDB_DISABLED says; None where neither is set."""
    disabled = os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on")
    return os.environ.get("WANDB_MODE") or ("disabled" if disabled else None)


def _environments_tags() -> list[str]:
    return [tag.strip() for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag.strip()]


def group_of(sweep: str) -> str:
    """W&B's group of the runs of a sweep."""
    return os.environ.get("WANDB_RUN_GROUP") or sweep


def job_type() -> str:
    """W&B's job type of a curve."""
    return os.environ.get("WANDB_JOB_TYPE") or "ablation"


def _root(folder: Path) -> Path:
    """The folder in which W&B makes its own, `wandb`."""
    chosen = os.environ.get("WANDB_DIR")
    if chosen and (why := _why_not_writable(chosen)) is None:
        return Path(chosen).expanduser()
    if chosen and chosen not in _refused:  # W&B would take the folder for temporary files, and say nothing
        _refused.add(chosen)
        log.warning("W&B: WANDB_DIR=%s: %s; runs go to %s/wandb", chosen, why, folder)
    return folder


def _why_not_writable(folder: str) -> str | None:
    """The reason that a folder, which is made if there is none, cannot be written to; None if it can."""
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
    """Gives the id of the run that `wandb agent` expects of this command, if it logs one curve; then later runs of this
    process are outside of the agent's sweep."""
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
            wandb.teardown()  # W&B reads the environment once a session
        for name in ONE_RUN:
            os.environ.pop(name, None)


def _leave_the_agents_run() -> None:
    """One id for many runs would make one of them: whose points are those of all, one after the other."""
    if its_id := os.environ.get("WANDB_RUN_ID"):
        why = "a sweep logs many" if AGENTS_SWEEP in os.environ else "each curve has an id of its own"
        log.warning("W&B: WANDB_RUN_ID=%s names one run, and is ignored: %s", its_id, why)
    for name in ONE_RUN:
        os.environ.pop(name, None)


def _logs_one_curve() -> bool:
    """Whether this is a launch without -m."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.RUN


def _forget(run: RunRecord) -> None:
    """Remove what was written for it here."""
    for stale in (_root(run.folder) / "wandb").glob(f"*run-*-{run.run_id}"):
        shutil.rmtree(stale, ignore_errors=True)


def _go_offline(reason: str, run: RunRecord) -> Literal[False]:
    _offline_because.append(reason)
    log.warning("W&B: %s; logging offline. Upload later with: wandb sync %s/wandb/*run-*", reason, _root(run.folder))
    return False


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
