#!/bin/bash
# Everything that needs a CUDA GPU, in one go: build, the op and model tests, compute-sanitizer on small clouds, CUDA
# graphs and streams, timings.
#
#     benchmarks/gpu_check.sh OUT          (in an environment with torch for CUDA, numpy, pytest, hypothesis, cmake, ninja)
#
# Every step runs even if one before it fails; the exit code is the number of steps that failed.
set -uo pipefail
out=${1:?usage: benchmarks/gpu_check.sh OUT}
cd "$(dirname "$0")/.."
mkdir -p "$out"
failed=0
step() {
  local name=$1
  shift
  echo "== $name"
  "$@" 2>&1 | tee "$out/$name.log" || failed=$((failed + 1))
}

step build python -m pip install --no-build-isolation --no-deps -e .
step doctor python -m reid3d doctor
step tests python -m pytest tests/ops tests/models tests/test_benchmarks.py --device cuda
# Without the cache every tensor is an allocation of its own: else memcheck takes what lies beyond one for another's.
for tool in memcheck racecheck synccheck initcheck; do
  step "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 python benchmarks/gpu_small.py
done
step streams python benchmarks/gpu_streams.py
python -c 'import torch_cluster' 2>/dev/null && step pyg python benchmarks/pyg_check.py cuda
step bench python -m reid3d bench kernels --device cuda --json "$out/kernels-cuda.json"
echo "$failed steps failed"
exit "$failed"
