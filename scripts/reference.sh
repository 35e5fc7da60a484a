#!/usr/bin/env bash
# The runs of results/reference: six curves (five methods, two sources of resampling), tenths, three seeds, each.
# ASSETS is the folder with the weights and data that are not the project's to ship (results/reference/README.md says
# what they are). A run that is finished is not repeated, so this can be stopped and started again.
# Cost on one core: SmolLM2 about half an hour a dataset, DeiT an hour and a half, the embedded models ten minutes together.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
runs=results/reference-runs
which=${1:-all}

study() {  # NAME RANDOM_SOURCE OVERRIDES...
  local name=$1 source=$2; shift 2
  [[ $which == all || " $which " == *" $name "* ]] || return 0
  local common=(results_dir=$runs "sweep=$name" tracking=none seed=0,1,2 "$@")
  "$python" launch.py -m method=zero,mean,median,peak,resample "${common[@]}"
  "$python" launch.py -m method=resample "method.source=$source" "${common[@]}"
  mkdir -p "results/reference/$name"
  cp -r "$runs/$name"/{curves.parquet,summary.csv,figures} "results/reference/$name/"
}

: "${ASSETS:?set ASSETS to the folder with the weights and data, see results/reference/README.md}"
smollm2=(model=smollm2_135m batch_tokens=2048)
deit=(model=deit_tiny "model.path=$ASSETS/deit_tiny_imagenet1k" dataset=image_folder "dataset.path=$ASSETS/imagenet_sample_256px"
  dataset.labels=prefix "dataset.classes=$ASSETS/deit_tiny_imagenet1k/imagenet_synset_words.txt")

paper_small() {
  [[ $which == all || " $which " == *" paper_small "* ]] || return 0
  "$python" launch.py -m experiment=paper_small "results_dir=$runs" tracking=none
  mkdir -p results/reference/paper_small
  cp -r "$runs"/paper_small/{curves.parquet,summary.csv,figures} results/reference/paper_small/
}

study tiny_causal random_characters model=tiny_causal dataset=python_docs eval.tokens=5000
study tiny_masked random_characters model=tiny_masked dataset=python_docs eval.tokens=5000
study tiny_vit random_pixels model=tiny_vit dataset=digits eval.images=null
study smollm2_wikitext2 random_characters "${smollm2[@]}" dataset=wikitext2_files \
  statistics.tokens=8192 eval.tokens=2048 model.max_tokens=256 \
  "dataset.path=$ASSETS/text/wikitext2/test.txt" "dataset.calibration_path=$ASSETS/text/wikitext2/valid.txt"
study smollm2_python_code random_characters "${smollm2[@]}" dataset=python_code model.dtype=bfloat16 \
  statistics.tokens=4096 eval.tokens=1024 model.max_tokens=128
study deit_tiny_imagenet random_pixels "${deit[@]}" statistics.tokens=10000 eval.images=null
paper_small
