"""Every metric at three fractions, against plain hooks on the plain model: no batching, no streaming, float64 sums."""

import math

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from examples import random_masks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ablation_sweeps.datasets.digits import Digits
from ablation_sweeps.experiment.run import run_job
from ablation_sweeps.neurons.hooks import Projection
from ablation_sweeps.neurons.schedule import Point

FRACTIONS = (0.25, 0.5, 1.0)
METHODS = ("zero", "mean", "peak")


def rows_of(job_of, tmp_path, *overrides):
    fixed = ["tracking=none", f"results_dir={tmp_path}", f"fraction.values={list(FRACTIONS)}", "seed=3"]
    job = job_of(*fixed, *overrides)
    table = pd.read_parquet(run_job(job) / "rows.parquet")
    return job, table.set_index(["fraction", "metric"])


def replacement(name, x):
    """`x`: all calibration activations of a layer at once, [tokens, neurons]."""
    if name == "zero":
        return np.zeros(x.shape[1], np.float32)
    if name == "mean":
        return x.astype(np.float64).mean(0).astype(np.float32)
    low, high = x.min(0), x.max(0)
    bins = np.minimum(((x - low) * np.float32(100) / (high - low)).astype(np.int64), 99)
    fullest = np.array([np.bincount(column, minlength=100).argmax() for column in bins.T])
    return (low + (fullest + 0.5) * (high.astype(np.float64) - low) / 100).astype(np.float32)


def projections_of(modules):
    return [Projection(str(order), module, module.in_features, order=order) for order, module in enumerate(modules)]


def activations(modules, forward, inputs):
    seen = [[] for _ in modules]
    handles = [m.register_forward_pre_hook(lambda _, a, i=i: seen[i].append(a[0].flatten(0, -2).numpy()))
               for i, m in enumerate(modules)]  # fmt: skip
    for one in inputs:
        forward(one)
    [h.remove() for h in handles]
    return [np.concatenate(layer) for layer in seen]


def logits_with(modules, masks_, values, forward, one):
    write = lambda m, v: lambda _, a: (torch.where(m, torch.from_numpy(v), a[0]),)  # noqa: E731
    handles = [
        module.register_forward_pre_hook(write(m, v)) for module, m, v in zip(modules, masks_, values, strict=True)
    ]
    logits = forward(one)
    [h.remove() for h in handles]
    return logits.double().numpy()


def plain_metrics(pairs, skipped, k):
    """`pairs`: for each document (clean logits, logits, labels). Returns value and standard error of each metric."""
    tokens = []
    for document, (clean, logits, labels) in enumerate(pairs):
        log_p = (
            clean
            - np.log(np.exp(clean - clean.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - clean.max(-1, keepdims=True)
        )
        log_q = (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )
        for p, q, label in zip(log_p, log_q, labels, strict=True):
            order = np.argsort(-q, kind="stable")
            tokens.append(
                (document, label, -q[label], order[0] == label, label in order[:k], (np.exp(p) * (p - q)).sum())
            )
    table = pd.DataFrame(tokens, columns=["document", "label", "loss", "top1", f"top{k}", "kl"]).astype(
        {"top1": float, f"top{k}": float}
    )
    out = {}
    for suffix, part in (("", table), ("_skip50", table[~table["label"].isin(skipped)])):
        for metric in ("loss", "top1", f"top{k}", *(["kl"] if not suffix else [])):
            mean = part[metric].mean()
            by_document = (part[metric] - mean).groupby(part["document"]).sum()
            d = len(by_document)
            out[metric + suffix] = (mean, math.sqrt((by_document**2).sum() * d / (d - 1)) / len(part))
    out["perplexity"] = (math.exp(out["loss"][0]), math.exp(out["loss"][0]) * out["loss"][1])
    return out


def compare(rows, pairs_at, skipped, k, only=()):
    for fraction in FRACTIONS:
        expected = plain_metrics(pairs_at(fraction), skipped, k)
        for metric, (value, stderr) in expected.items():
            if only and metric not in only:
                continue
            row = rows.loc[(fraction, metric)]
            assert row["value"] == pytest.approx(value, rel=2e-4, abs=2e-5), (fraction, metric)
            assert row["stderr"] == pytest.approx(stderr, rel=5e-3, abs=2e-5), (fraction, metric)
    assert set(rows.loc[FRACTIONS[0]].index) == set(only or expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_causal_model(method, job_of, assets, tmp_path):
    folder = assets / "stories260K_llama"
    job, rows = rows_of(
        job_of, tmp_path, "model=causal_lm", f"model.path={folder}", "model.max_tokens=120", "dataset=text_files",
        f"dataset.path={assets / 'text/inaugural'}", f"method={method}", "eval.tokens=1800", "statistics.tokens=1500",
    )  # fmt: skip
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    modules = [layer.self_attn.o_proj for layer in model.model.layers]

    def ids(split, budget):  # whole documents cut to 120 tokens, until the budget is met exactly
        out = []
        for document in job.dataset.examples(split):
            left = budget - sum(map(len, out))
            if left < 2:
                break
            out.append(tokenizer(document.text)["input_ids"][: min(120, left)])
        return [torch.tensor([row]) for row in out]

    with torch.inference_mode():
        forward = lambda row: model(input_ids=row).logits[0]  # noqa: E731
        calibration, evaluation = ids("calibration", 1500), ids("evaluation", 1800)
        assert sum(row.numel() for row in evaluation) == 1800
        values = [replacement(method, x) for x in activations(modules, forward, calibration)]
        counts = np.bincount(torch.cat(calibration, 1)[0].numpy(), minlength=512).astype(float)
        counts[tokenizer.all_special_ids] = -1
        skipped = sorted(range(512), key=lambda t: (-counts[t], t))[:50]
        masks = random_masks(projections_of(modules), FRACTIONS, seed=3)

        def pairs_at(fraction):
            for row in evaluation:
                logits = logits_with(modules, masks[Point(fraction)], values, forward, row)
                yield forward(row).double().numpy()[:-1], logits[:-1], row[0, 1:].tolist()

        compare(rows, pairs_at, skipped, k=10)


@pytest.mark.parametrize("method", METHODS)
def test_an_image_classifier(method, repo, job_of, tmp_path):
    _, rows = rows_of(
        job_of,
        tmp_path,
        "model=tiny_vit",
        "dataset=digits",
        f"method={method}",
        "eval.images=60",
        "statistics.tokens=850",
    )
    folder = repo / "ablation_sweeps/assets/tiny_vit"
    model = timm.create_model(f"local-dir:{folder}", pretrained=False).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model), is_training=False)
    modules = [block.attn.proj for block in model.blocks]
    pictures = list(Digits("digits").examples("evaluation"))[:60]
    with torch.inference_mode():
        forward = lambda pixels: model(pixels)  # noqa: E731
        pixels = [transform(p.read())[None] for p in Digits("digits").examples("calibration")]
        n_tokens = activations(modules[:1], forward, pixels[:1])[0].shape[0]
        values = [replacement(method, x) for x in activations(modules, forward, pixels[: -(-850 // n_tokens)])]
        masks = random_masks(projections_of(modules), FRACTIONS, seed=3)

        def pairs_at(fraction):
            for p in pictures:
                one = transform(p.read())[None]
                logits = logits_with(modules, masks[Point(fraction)], values, forward, one)
                yield forward(one).double().numpy(), logits, [p.label]

        compare(rows, pairs_at, [], k=5, only=("loss", "top1", "top5", "kl", "perplexity"))
