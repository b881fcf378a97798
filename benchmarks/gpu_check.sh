#!/bin/bash
# Everything that needs a CUDA GPU, in one go: build, the op and model tests, compute-sanitizer on small clouds, CUDA
# graphs and streams, timings.
#
#     benchmarks/gpu_check.sh OUT [STEP...]  (in an environment with torch for CUDA, numpy, pytest, hypothesis, cmake,
#                                             ninja, setuptools and wheel)
#
# STEPs, such as "build tests memcheck", leave out the others, where there is little time. Every step runs even if one
# before it fails; the exit code is the number of steps that failed.
set -uo pipefail
out=${1:?usage: benchmarks/gpu_check.sh OUT [STEP...]}
wanted=" ${*:2} "
cd "$(dirname "$0")/.."
mkdir -p "$out"
failed=0
step() {
  local name=$1
  shift
  [[ $wanted == "  " || $wanted == *" $name "* ]] || return 0
  echo "== $name"
  "$@" 2>&1 | tee "$out/$name.log" || failed=$((failed + 1))
}

step build python3 -m pip install --no-build-isolation --no-deps -e .
step doctor python3 -m reid3d doctor
# Without what needs no GPU and takes minutes: the other CPU kernels, and the programs in C++.
step tests python3 -m pytest tests/ops tests/models tests/test_benchmarks.py --device cuda \
  -k "not every_set_of_kernels and not sanitizers"
# Without the cache every tensor is an allocation of its own: else memcheck takes what lies beyond one for another's.
for tool in memcheck racecheck synccheck initcheck; do
  step "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 python3 benchmarks/gpu_small.py
done
step streams python3 benchmarks/gpu_streams.py
python3 -c 'import torch_cluster' 2>/dev/null && step pyg python3 benchmarks/pyg_check.py cuda
step fitter python3 -m reid3d.preprocess.train_fitter --out "$out/fitter" --steps 500 --processes 1 --device cuda \
  --workers 8 --held-out 512
step train python3 -m reid3d bench train --device cuda --json "$out/train-cuda.json"
step bench python3 -m reid3d bench kernels --device cuda --json "$out/kernels-cuda.json"
echo "$failed steps failed"
exit "$failed"
