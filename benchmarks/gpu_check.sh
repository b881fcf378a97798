#!/bin/bash
# Everything that needs a CUDA GPU, in one go: build, the op and model tests, compute-sanitizer on small clouds, timings.
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

small='
import torch
from reid3d import ops
assert "cuda" in ops.backend(), ops.backend()
for n in (1, 33, 257):
    xyz = torch.rand(2, n, 3, device="cuda", requires_grad=True)
    near = ops.knn(xyz, xyz, min(n, 20))
    near.dist2.sum().backward()
    ops.farthest_point_sample(xyz.detach(), n)
    idx = ops.ball_query(xyz.detach(), xyz.detach(), 0.2, 16)
    ops.group_max(torch.rand(2, n, 32, device="cuda", requires_grad=True), idx).sum().backward()
xyz = torch.rand(2, 300, 3, device="cuda")
for k in (32, 33, 128, 129, 257):  # one list of neighbours in registers, four, and the one in memory
    for cloud in (xyz, xyz.double()):
        ops.knn(cloud, cloud, k)
torch.cuda.synchronize()
'
step build python -m pip install --no-build-isolation --no-deps -e .
step doctor python -m reid3d doctor
step tests python -m pytest tests/ops tests/models --device cuda
for tool in memcheck racecheck synccheck initcheck; do
  step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 python -c "$small"
done
step bench python benchmarks/ops.py --device cuda --json "$out/ops-cuda.json"
echo "$failed steps failed"
exit "$failed"
