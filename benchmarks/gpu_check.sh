#!/usr/bin/env bash
# Everything a machine with a GPU is asked for, in one command and under nine minutes on an H200 with
# 16 cores; no network:
#
#   benchmarks/gpu_check.sh [OUTPUT_FOLDER]
#
#   1. build the extension in place for this GPU (LMINF_CARRIED=1: take the one that is there);
#   2. pytest -m cuda: every op test on the backend "cuda", and the PTX wrappers on the device;
#   3. compute-sanitizer (memcheck, racecheck) over small shapes, where it is installed;
#   4. the speed tables beside their peers, with the GPU named, in benchmarks/results.
# What the steps say stands in build/gpu_check; with OUTPUT_FOLDER that and the results are copied
# there as they come. Every step runs even if one before it failed, as long as there is time; the
# exit status says whether all passed.
set -uo pipefail
cd "$(dirname "$0")/.."
output=${1:-}
python=${PYTHON:-python3}
failed=()
deadline=520  # seconds
logs=build/gpu_check
mkdir -p "$logs" ${output:+"$output"}
touch "$logs/begin"
nvidia-smi 2>&1 | tee "$logs/nvidia_smi.log"

step() {
  local name=$1 limit=$2
  shift 2
  echo "=== $name"
  local begin=$SECONDS
  local left=$((deadline - SECONDS))
  if [ "$left" -lt 5 ]; then
    failed+=("$name (no time left)")
    echo "=== $name: skipped, no time left"
    return
  fi
  # What it says goes to a file of its own, and what it wrote is handed over at once.
  timeout -k 5 "$((limit < left ? limit : left))" "$@" 2>&1 | tee "$logs/${name//[^a-z0-9]/_}.log"
  local status=${PIPESTATUS[0]}
  [ "$status" -eq 0 ] || failed+=("$name (exit status $status)")
  echo "=== $name: $((SECONDS - begin)) s"
  if [ -n "$output" ]; then
    cp "$logs"/*.log "$output"
    find benchmarks/results -maxdepth 1 -newer "$logs/begin" -type f -exec cp {} "$output" \;
  fi
}

"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
  echo "gpu_check: torch sees no CUDA device" >&2
  exit 2
}
capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
architecture=${capability/./}

if [ -z "${LMINF_CARRIED:-}" ]; then
  step build 200 env TORCH_CUDA_ARCH_LIST="$capability" LMINF_FORCE_CUDA_BUILD=1 \
    "$python" setup.py -q build_ext --inplace
fi

if command -v nvcc > /dev/null; then
  ptx_test() {  # name, architecture
    nvcc -std=c++17 --expt-relaxed-constexpr -gencode="arch=compute_$2,code=sm_$2" \
      "csrc/tests/$1.cu" -o "build/$1" && "build/$1"
  }
  export -f ptx_test
  mkdir -p build
  step "PTX wrappers" 60 bash -c "ptx_test ptx_sm80_test $architecture"
  if [ "$architecture" = 90 ]; then
    step "PTX wrappers of sm_90a" 120 bash -c "ptx_test ptx_sm90_test 90a"
  fi
fi

step pytest 240 "$python" -m pytest -q -p no:cacheprovider -m cuda python_tests

sanitized='
import sys
sys.path.insert(0, "python_tests")
import torch
from cases import call, options, qkv
for dtype in (torch.bfloat16, torch.float32):
    q, k, v = qkv(150, 200, heads_q=4, heads_kv=2, dtype=dtype)
    call("cuda", "lambda_attn", q, k, v, 20, 40, max_distance=60, **options("all", 4, 64))
    ring, few = (torch.randn(1, 2, n, 64).to(dtype) for n in (300, 20))
    call("cuda", "lambda_decode", q[:, :, :1], k[:, :, :1], v[:, :, :1], ring, ring.clone(), few,
         few.clone(), torch.tensor([1000]), 300, max_distance=350, **options("rope", 4, 64))
'
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck; do
    step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -c "$sanitized"
  done
else
  echo "=== compute-sanitizer is not installed: skipped"
fi

for window in 1024 4096; do
  step "prefill, window $window" 90 "$python" -m benchmarks.attention --device cuda \
    --dtypes bfloat16 --peers flex sdpa-causal mm --heads 32 --kv-heads 8 --length 32768 \
    --head-dim 128 --window "$window"
done
step decode 60 "$python" -m benchmarks.decode --device cuda --batches 1 4 16 64
step rope 30 "$python" -m benchmarks.rope --device cuda

if [ ${#failed[@]} -gt 0 ]; then
  printf 'gpu_check: failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
echo "gpu_check: all passed in $SECONDS s"
