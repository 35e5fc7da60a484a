"""Breaks the code on purpose, one line at a time, and looks whether the tests notice.

    python tests/faults/deliberate_breaks.py                 # every break
    python tests/faults/deliberate_breaks.py 0-9 17          # these numbers
    python tests/faults/deliberate_breaks.py --list

Works on a temporary copy of the files that git knows. All tests that are named below must pass there; then the test of
each break must fail with it. Ends with status 1 where a break is not caught, where its text no longer stands in the
file, and where a test is missing or fails anyway.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = (
    "torch", "pandas", "scipy.stats", "scipy.special", "matplotlib.pyplot", "hydra", "pydantic", "typer", "yaml",
    "pyarrow.parquet", "safetensors.torch", "datasets", "pytest", "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
)  # fmt: skip
HANGS = 600.0  # seconds after which tests are taken to hang, which counts as noticed by nobody


@dataclass(frozen=True)
class Break:
    """Attributes:
    file: below ablation_sweeps/.
    old: text that stands in the file once.
    test: that must fail: its name for pytest, below tests/.
    """

    name: str
    file: str
    old: str
    new: str
    test: str


BREAKS = (
    Break("the neurons outside of the mask are replaced", "neurons/hooks.py",
          "torch.where(mask, value, rows)", "torch.where(~mask, value, rows)",
          "unit/test_evaluation.py::test_every_metric_is_that_of_a_loop_over_tokens"),
    Break("a fraction is rounded down", "neurons/schedule.py",
          "order[: round(fraction", "order[: int(fraction",
          "unit/test_selection.py::test_exactly_the_fraction_is_ablated_in_each_layer"),
    Break("every seed ablates the same neurons", "selections/random.py",
          'f"{selecting.seed}/{projection.order}"', 'f"0/{projection.order}"',
          "unit/test_selection.py::test_seeds_and_layers_differ"),
    Break("a head is every fourth neuron instead of a block", "neurons/units.py",
          "torch.arange(projection.width) // (projection.width // n_units)", "torch.arange(projection.width) % n_units",
          "unit/test_families.py::test_ablating_a_head_is_zeroing_its_output_inside_the_attention[llama-None]"),
    Break("values are written outside of the scope", "neurons/hooks.py",
          "mask = mask & positions", "mask = mask | positions",
          "unit/test_scope.py::test_a_value_is_written_in_scope_and_nowhere_else"),
    Break("exact effects with the wrong sign", "selections/effects.py",
          "loss(model, batch) - clean", "clean - loss(model, batch)",
          "unit/test_scores.py::test_exact_is_brute_force"),
    Break("integrated gradients at the ends of the steps", "selections/attribution.py",
          "(step + 0.5) / self.steps", "step / self.steps",
          "unit/test_scores.py::test_integrated_gradients_add_up_to_the_effect_of_ablating_everything"),
    Break("median: rank off by one", "neurons/collect.py",
          "dict.fromkeys([(n - 1) // 2, n // 2])", "dict.fromkeys([(n - 1) // 2 + 1, n // 2 + 1])",
          "unit/test_methods.py::test_median_is_that_of_numpy"),
    Break("mean: half of it", "methods/mean.py",
          "moments.mean.float()", "moments.mean.float() / 2",
          "unit/test_methods.py::test_mean_is_that_of_float64"),
    Break("resample within one document takes the example itself", "methods/resample.py",
          "row - 1) % size", "row) % size",
          "unit/test_methods.py::test_another_example_is_of_another_document_where_there_is_one"),
    Break("resample takes another part of the same document", "methods/resample.py",
          "_donors(batch.documents or batch.index)", "_donors(batch.index)",
          "unit/test_methods.py::test_another_example_is_of_another_document_where_there_is_one"),
    Break("peak: edge of the bin instead of its centre", "methods/peak.py",
          "(first.double() + 0.5)", "first.double()",
          "unit/test_methods.py::test_peak_is_that_of_a_brute_force_histogram[histogram]"),
    Break("padding enters the statistics", "neurons/collect.py",
          "None if keep is None or keep.all() else", "None if True else",
          "unit/test_activations.py::test_padding_never_enters[llama-attn_pre_out]"),
    Break("padding is scored", "data/text.py",
          "labels = torch.full(shape, NOT_SCORED)\n        keep",
          "labels = torch.zeros(shape, dtype=torch.long)\n        keep",
          "unit/test_text.py::test_padding_is_at_the_right_and_enters_nothing[llama]"),
    Break("KL divergence the wrong way round", "experiment/score.py",
          "kl = clean.negentropy - (clean.p * log_q).sum(-1)",
          "kl = (log_q.exp() * (log_q - clean.p.log())).sum(-1)",
          "unit/test_evaluation.py::test_every_metric_is_that_of_a_loop_over_tokens"),
    Break("top-k counts one rank more", "experiment/score.py",
          "(rank < top_k).float()", "(rank <= top_k).float()",
          "unit/test_evaluation.py::test_every_metric_is_that_of_a_loop_over_tokens"),
    Break("standard error takes tokens as independent", "results/metrics.py",
          "math.sqrt((residuals**2).sum() * d / (d - 1)) / n if", "math.sqrt(value / n) if",
          "unit/test_evaluation.py::test_stderr_is_the_formula"),
    Break("area is not normalised to the clean value", "results/metrics.py",
          "heights = safe_divide(values, clean) if metric_named(metric).is_relative else values", "heights = values",
          "unit/test_comparison.py::test_the_area_is_the_mean_height"),
    Break("area is not divided by the span of the fractions", "results/metrics.py",
          " / (fractions[-1] - fractions[0])", "",
          "unit/test_comparison.py::test_the_area_is_the_mean_height"),
    Break("p-values without Holm's correction", "results/comparison.py",
          "    return adjusted\n\n\ndef levels_of", "    return list(p)\n\n\ndef levels_of",
          "unit/test_comparison.py::test_holm"),
    Break("interval at another level", "results/comparison.py",
          "stdtrit(freedom, (1 + level) / 2)", "stdtrit(freedom, level)",
          "unit/test_comparison.py::test_an_interval_at_another_level_is_that_of_scipy"),
    Break("seeds are left out of the interval", "results/comparison.py",
          "variance = of_documents + of_seeds", "variance = of_documents",
          "unit/test_comparison.py::test_where_seeds_alone_differ_the_interval_is_that_of_their_means"),
    Break("chance level from the evaluation data", "experiment/chance.py",
          "unigram(calibration, n_classes", "unigram(batches, n_classes",
          "unit/test_loading.py::test_the_end_of_a_text_is_guessed_where_it_is_scored"),
    Break("signature without the seed", "experiment/job.py",
          '"fractions": self.fraction.content, "seed": self.seed}', '"fractions": self.fraction.content}',
          "unit/test_signatures.py::test_a_signature_is_what_it_was"),
    Break("signature without the model's files", "experiment/job.py",
          '{"class": class_of(self.model), **content(self.model)}', '{"class": class_of(self.model)}',
          "unit/test_store.py::test_a_folder_counts_by_its_content_not_by_its_place"),
    Break("progress of another run is taken", "results/progress.py",
          "if hashing.sha256_at(file.with_name(place), content).startswith(sha256):", "if True:",
          "unit/test_store.py::test_progress_of_another_batch_or_run_is_not_taken"),
    Break("a damaged file of a finished run is taken", "results/run_folder.py",
          "if name in sums and hashing.sha256_of(folder / name) != sums[name]:",
          "if name in sums and not (folder / name).exists():",
          "unit/test_report.py::test_a_report_is_made_without_a_damaged_run_and_names_the_file"
          "[environment.json-a version]"),
    Break("no lock", "base/files.py",
          "        lock.acquire(timeout=SAY_SECONDS)\n    except Timeout:\n", "        pass\n    except Timeout:\n",
          "integration/test_many_at_once.py"),
    Break("copies of an evaluation document are evaluated", "data/intake.py",
          "elif content in self.contents:", "elif False:",
          "integration/test_copies.py::test_each_content_is_in_one_split_once[text_files]"),
    Break("calibration documents are evaluated", "data/intake.py",
          "elif content in self.calibrated:", "elif False:",
          "integration/test_copies.py::test_each_content_is_in_one_split_once[text_files]"),
    Break("the adapter is ignored", "models/adapters.py",
          "return adapted.merge_and_unload(safe_merge=True)", "return adapted.unload()",
          "unit/test_loading.py::test_an_adapter_is_merged_and_part_of_the_identity"),
    Break("a site path that matches nothing is passed over", "neurons/sites.py",
          "        if not names:\n", "        if not names and False:\n",
          "unit/test_sites.py::test_each_given_path_matches_something"),
    Break("images whose classes are in another order are taken", "experiment/chance.py",
          "if name != own and name in known:", "if False:",
          "unit/test_loading.py::test_classes_in_another_order_than_the_models_are_refused"),
    Break("a failure of W&B fails the job", "tracking/wandb.py",
          "            except Exception as error:\n                log.error(\"W&B: nothing logged",
          "            except KeyError as error:\n                log.error(\"W&B: nothing logged",
          "integration/test_tracking.py::test_where_nothing_can_be_logged_that_is_said_and_the_job_goes_on"),
    Break("retry runs what is finished", "dispatch/launcher.py",
          "[run for run in run_folder.runs(sweep) if not run_folder.finished(run)]", "run_folder.runs(sweep)",
          "integration/test_local_launcher.py::test_retry_does_what_failed_and_nothing_else[in_order]"),
    Break("the local launcher gives all packs the same GPU", "dispatch/local.py",
          '"CUDA_VISIBLE_DEVICES": slot', '"CUDA_VISIBLE_DEVICES": self.gpus[0] if self.gpus else ""',
          "unit/test_dispatch.py::test_each_pack_sees_its_own_gpu"),
    Break("a pack that dies takes the others with it", "dispatch/supervisor.py",
          "return others + alone", "return alone",
          "unit/test_dispatch.py::test_the_culprit_is_tried_alone_and_the_rest_goes_on"),
    Break("SLURM: what squeue does not show is over", "dispatch/supervisor.py",
          "return place.is_over and before", "return place.is_over",
          "unit/test_dispatch.py::test_a_pack_that_is_put_into_the_queue_again_is_left_alone"),
    Break("-m method=[a,b] keeps the last one", "experiment/arguments.py",
          'return f"{before}={_sweep(_flat(items), given)}"', 'return f"{before}={typed(_flat(items)[-1])}"',
          "conf/test_as_typed.py::test_a_list_is_never_its_last_entry[method]"),
    Break("two methods in one colour", "results/display.py",
          '{"color": COLOURS[i]', '{"color": COLOURS[0]',
          "unit/test_report.py::test_a_method_looks_the_same_in_all_figures_and_never_like_another"),
    Break("the page's chart has other colours than its table", "report/page.py",
          'method_styles(study.methods)[method]["color"]', 'method_styles([method])[method]["color"]',
          "unit/test_page.py::test_a_method_has_one_colour_in_the_chart_and_in_the_table"),
    Break("every seed masks the same tokens", "data/text.py",
          "default_rng([seed, int", "default_rng([0, int",
          "unit/test_text.py::test_masks_are_those_of_the_seed_whatever_the_other_documents"),
    Break("target_stderr stops too early", "experiment/evaluate.py",
          "<= target_stderr}", "<= 2 * target_stderr}",
          "unit/test_precision.py::test_each_point_has_the_first_documents_and_is_as_precise_as_was_asked"),
    Break("code in subfolders has no fingerprint", "base/environment.py",
          'folder.rglob("*.py")', 'folder.glob("*.py")',
          "unit/test_fingerprints.py::test_a_method_of_ones_own_beside_ours_does_not_change_our_code"),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("numbers", nargs="*", help="breaks to try, such as 3 or 10-19 (default: all)")
    parser.add_argument("--list", action="store_true", help="only list the breaks")
    given = parser.parse_args()
    chosen = {number: BREAKS[number] for number in _numbers(parser, given.numbers)}
    if given.list:
        for number, each in chosen.items():
            print(f"{number:2} {each.name}: {each.file}")
        return 0
    folder = Path(tempfile.mkdtemp(prefix="breaks-"))
    try:
        return try_all(chosen, folder)
    finally:
        shutil.rmtree(folder)


def _numbers(parser: argparse.ArgumentParser, given: list[str]) -> list[int]:
    numbers: list[int] = []
    for text in given or [f"0-{len(BREAKS) - 1}"]:
        first, _, last = text.partition("-")
        if not first.isdigit() or not (last or first).isdigit() or int(last or first) >= len(BREAKS):
            parser.error(f"{text}: is no number of a break; they go from 0 to {len(BREAKS) - 1}")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def try_all(chosen: dict[int, Break], folder: Path) -> int:
    copy, log = folder / "copy", folder / "log"
    for name in subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0"):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    prepare(copy)
    code, said = run_tests(sorted({each.test for each in chosen.values()}), log)
    if code != 0:
        print(f"without any break, pytest ends with {code}\n{said[-3000:]}")
        return 1
    n_caught = 0
    for number, each in chosen.items():
        began = time.monotonic()
        verdict = outcome(each, copy, log)
        n_caught += verdict.startswith("caught")
        print(f"{number:2} {each.name}: {verdict} ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"{n_caught} of {len(chosen)} breaks caught")
    return int(n_caught < len(chosen))


def prepare(copy: Path) -> None:
    """Imports the libraries once: the tests run in forks of this process, which begin in the copy."""
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE="1")
    sys.dont_write_bytecode = True
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    for name in IMPORTED:
        importlib.import_module(name)


def outcome(each: Break, copy: Path, log: Path) -> str:
    """Begins with `caught` where the test fails with this break."""
    file = copy / "ablation_sweeps" / each.file
    whole = file.read_text()
    if (count := whole.count(each.old)) != 1:
        return f"DOES NOT APPLY: its text stands {count} times in {each.file}"
    file.write_text(whole.replace(each.old, each.new))
    try:
        code, said = run_tests([each.test], log)
    finally:
        file.write_text(whole)
    failed = re.findall(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", said, re.MULTILINE)
    if code == 1 and failed:
        return f"caught by {failed[0]}"
    return f"NOT CAUGHT: pytest {each.test} ends with {code}\n{said[-2000:]}"


def run_tests(tests: list[str], log: Path) -> tuple[int | None, str]:
    """pytest's status, None if it hangs, and what it printed."""
    import pytest

    options = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts="]
    if not (pid := os.fork()):
        os.setpgid(0, 0)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = pytest.main([*options, *(f"tests/{test}" for test in tests)])
        sys.stdout.flush()
        os._exit(int(code))
    until = time.monotonic() + HANGS
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) and time.monotonic() < until:
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # processes that a failed test left behind, too
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return (None if code == -signal.SIGKILL else code), log.read_text(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
