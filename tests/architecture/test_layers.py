"""Imports point downwards, and the core knows no model by its name."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
NAMES = re.compile(
    r"(?<![A-Za-z])((?i:llama|llava|opt|gpt|gptj|mistral|mixtral|qwen|gemma|phi|pythia|neox|falcon|bloom|mpt|smollm|olmo|cohere|"
    r"granite|stablelm|starcoder|bigcode|bert|albert|roberta|electra|deberta|distilbert|modernbert|t5|vit|deit|beit|swin|"
    r"dinov|siglip|eva|naflexvit)|CLIP)(?![a-z])(?![A-Z]+\b)"  # OPTConfig, but neither options nor OPTIONS
)


def test_imports_point_downwards_only():
    command = Path(sys.executable).with_name("lint-imports")
    if not command.exists() and not shutil.which("lint-imports"):
        pytest.skip("import-linter is not installed: uv sync --group check")
    program = str(command) if command.exists() else "lint-imports"
    done = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def names_in_code(source: str) -> list[str]:
    """Identifiers and strings that name a family of models; comments and docstrings may."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    words = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            words.append(node.value)
        words += [value for field in ("id", "attr", "name", "arg", "module")
                  if isinstance(value := getattr(node, field, None), str)]  # fmt: skip
    return [word for word in words if NAMES.search(word.replace("_", " "))]


@pytest.mark.parametrize("file", sorted((ROOT / "ablation_sweeps").rglob("*.py")), ids=lambda file: file.name)
def test_no_model_is_known_by_its_name(file):
    assert names_in_code(file.read_text()) == []


def test_a_name_would_be_found():
    assert names_in_code("if config.model_type == 'llama': pass") == ["llama"]
    assert names_in_code("from transformers import GPT2Model, LlamaForCausalLM") == ["GPT2Model", "LlamaForCausalLM"]
    assert names_in_code("option = adopt(alphabet, OPTIONS)") == []
    assert names_in_code("x = model.vit.encoder") == ["vit"]
    assert names_in_code('def f():\n    """Like BERT."""  # and OPT') == []


@pytest.mark.parametrize("family", FAMILIES)
def test_the_name_of_every_family_of_the_table_would_be_found(family):
    assert names_in_code(f"isinstance(model, {FAMILIES[family].name})") == [FAMILIES[family].name]
