#!/usr/bin/env bash
# The whole case in small: an SFT adapter, its log-probs once, then DPO with an 8-bit policy in the three ways.
#
#   examples/sft_then_dpo.sh MODEL PAIRS OUT
set -euo pipefail
model=$1 pairs=$2 out=$3
python=${PYTHON:-python}
dpoeng=${DPOENG:-dpoeng}
here=$(dirname "$0")
train=(--max-steps "${STEPS:-8}" --learning-rate 1e-3 --eval-share 0.2 --per-device-train-batch-size 2)

"$python" "$here/sft_adapter.py" "$model" "$pairs" "$out/sft"

# The reference is base + SFT adapter in 8 bits, as the policy will be: margins start at 0.
"$dpoeng" precompute-ref "$pairs" --model "$model" --adapter "$out/sft" --quantization 8bit \
    --max-length 256 --cache "$out/refcache"

# (a) a new adapter on base + frozen SFT adapter; (b) the SFT adapter trained further
"$dpoeng" train --cache "$out/refcache" --output-dir "$out/stack" --adapter-mode stack "${train[@]}"
"$dpoeng" train --cache "$out/refcache" --output-dir "$out/continue" --adapter-mode continue "${train[@]}"
"$dpoeng" merge "$out/stack" --into "$out/stack-merged"

# (c) the SFT adapter merged into the base, in full precision. The merged base in 8 bits is rounded elsewhere than
# base in 8 bits + adapter is, so it is a reference of its own: score it anew.
"$python" - "$model" "$out/sft" "$out/sft-merged" <<'PY'
import sys
from pathlib import Path

from dpoeng.engine.recipes.merge import merge
from dpoeng.engine.models.sources import find_adapter, find_model

merge(find_model(sys.argv[1]), [find_adapter(sys.argv[2])], Path(sys.argv[3]))
PY
"$dpoeng" precompute-ref "$pairs" --model "$out/sft-merged" --quantization 8bit \
    --max-length 256 --cache "$out/refcache-merged"
"$dpoeng" train --cache "$out/refcache-merged" --output-dir "$out/merged" "${train[@]}"
