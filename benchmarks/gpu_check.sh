#!/usr/bin/env bash
# Everything a machine with a GPU is asked for, in parts of at most nine minutes each (an H200 with
# 16 cores); no network:
#
#   benchmarks/gpu_check.sh tests|speed|models [OUTPUT_FOLDER]
#
#   tests   build the extension in place for this GPU (LMINF_CARRIED=1: take the one that is there);
#           what hardware alone can settle: the PTX wrappers on the device, a prefill that is its
#           thread's first CUDA work, views whose strides are not nested; then pytest -m cuda, and
#           compute-sanitizer (memcheck, racecheck) over small shapes, where it is installed
#   speed   prefill beside its peers, decode, rope: tables with the GPU named, in benchmarks/results
#   models  whole models on the GPU: the shipped one reads, writes and recalls
#
# `speed` and `models` take the extension that `tests` has built, or build it. What the steps say
# stands in build/gpu_check; with OUTPUT_FOLDER that and the results are copied there as they come.
# Every step runs even if one before it failed, as long as there is time; the exit status says
# whether all passed.
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:-}
case $part in
  tests | speed | models) ;;
  *)
    echo "gpu_check: the part is '$part', but must be tests, speed or models" >&2
    exit 2
    ;;
esac
output=${2:-}
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

build() {
  step build 200 env TORCH_CUDA_ARCH_LIST="$capability" LMINF_FORCE_CUDA_BUILD=1 \
    "$python" setup.py -q build_ext --inplace
}

# The extension as it is, unless it has no kernels for this GPU.
build_if_missing() {
  "$python" -c "$small_shapes" > /dev/null 2>&1 || build
}

small_shapes='
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

# No rope: nothing is launched before the tensor maps are made, on a thread that has no context.
fresh_thread='
import sys, threading
sys.path.insert(0, "python_tests")
import torch
from cases import check_lambda_attn, qkv
tensors = [x.cuda() for x in qkv(40, 50, dtype=torch.bfloat16)]
torch.ops.lminf.lambda_attn(*tensors, 0, 20)  # the facts of the device are known now
results = []
run = lambda: results.append(torch.ops.lminf.lambda_attn(*tensors, 0, 20)[0].cpu())
thread = threading.Thread(target=run)
thread.start()
thread.join()
check_lambda_attn("cuda", *qkv(40, 50, dtype=torch.bfloat16), n_global=0, window=20)
assert len(results) == 1 and results[0].isfinite().all()
'

# [B, S, H, D] memory seen as [B, H, S, D]: a head stride below that of a row.
transposed_views='
import sys
sys.path.insert(0, "python_tests")
import torch
from cases import options, qkv, run_reference
for head_dim in (64, 128, 256):
    q, k, v = qkv(300, 310, batch=2, heads_q=4, heads_kv=2, head_dim=head_dim, dtype=torch.bfloat16)
    views = [x.transpose(1, 2).contiguous().cuda().transpose(1, 2) for x in (q, k, v)]
    for option in ("none", "rope"):
        score = options(option, 4, head_dim)
        on_gpu = {name: x.cuda() for name, x in score.items()}
        out, _ = torch.ops.lminf.lambda_attn(*views, 20, 140, max_distance=160, **on_gpu)
        common = dict(n_global=20, window=140, max_distance=160, **score)
        truth, _ = run_reference(q, k, v, True, **common)
        eager, _ = run_reference(q, k, v, False, **common)
        error, bound = (out.cpu() - truth).abs().max(), 2 * (eager - truth).abs().max()
        assert error <= bound, f"head dim {head_dim}, {option}: off by {error:.3g}, over {bound:.3g}"
'

run_tests() {
  [ -n "${LMINF_CARRIED:-}" ] || build
  if command -v nvcc > /dev/null; then
    ptx_test() {  # name, architecture
      nvcc -std=c++17 --expt-relaxed-constexpr -gencode="arch=compute_$2,code=sm_$2" \
        "csrc/tests/$1.cu" -o "build/$1" && "build/$1"
    }
    export -f ptx_test
    if [ "$architecture" = 90 ]; then
      step "PTX wrappers of sm_90a" 120 bash -c "ptx_test ptx_sm90_test 90a"
    fi
    step "PTX wrappers" 60 bash -c "ptx_test ptx_sm80_test $architecture"
  fi
  step "prefill in a fresh thread" 30 "$python" -c "$fresh_thread"
  step "transposed views" 30 "$python" -c "$transposed_views"
  step pytest 240 "$python" -m pytest -q -p no:cacheprovider -m cuda python_tests
  if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
      step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 \
        "$python" -c "$small_shapes"
    done
  else
    echo "=== compute-sanitizer is not installed: skipped"
  fi
}

run_speed() {
  build_if_missing
  for head_dim in 128 64; do
    for window in 4096 1024; do
      step "prefill, window $window, head dim $head_dim" 90 "$python" -m benchmarks.attention \
        --device cuda --dtypes bfloat16 --peers flex sdpa-causal mm --heads 32 --kv-heads 8 \
        --length 32768 --head-dim "$head_dim" --window "$window"
    done
  done
  step decode 60 "$python" -m benchmarks.decode --device cuda --batches 1 4 16 64
  step rope 30 "$python" -m benchmarks.rope --device cuda
}

run_models() {
  build_if_missing
  step evaluate 180 "$python" -m lminf_cuda evaluate --device cuda --out "$logs/evaluation"
  step passkey 120 "$python" -m lminf_cuda passkey --device cuda
  step generate 60 "$python" -m lminf_cuda generate --device cuda --greedy \
    --prompt-file lminf_cuda/demo_model/held_out.txt
}

"run_$part"

if [ ${#failed[@]} -gt 0 ]; then
  printf 'gpu_check: failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
echo "gpu_check: $part: all passed in $SECONDS s"
