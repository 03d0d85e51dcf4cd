#!/usr/bin/env bash
# Everything a machine with a GPU is asked for, in parts of at most nine minutes each (an H200 with
# 16 cores); no network:
#
#   benchmarks/gpu_check.sh tests|speed|models [OUTPUT_FOLDER]
#
#   tests   build the extension in place for this GPU (LMINF_CARRIED=1: take the one that is there);
#           the PTX wrappers on the device; then pytest -m cuda, and compute-sanitizer (memcheck,
#           racecheck) over small shapes, where it is installed
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
  "$python" python_tests/small_shapes.py > /dev/null 2>&1 || build
}

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
  step pytest 300 "$python" -m pytest -q -p no:cacheprovider -m cuda python_tests
  if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
      step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 \
        "$python" python_tests/small_shapes.py
    done
  else
    echo "=== compute-sanitizer is not installed: skipped"
  fi
}

run_speed() {
  build_if_missing
  for head_dim in 128 64; do
    for window in 4096 1024; do
      step "prefill, window $window, head dim $head_dim" 90 "$python" -m lminf_cuda bench \
        --device cuda --dtype bfloat16 --peers flex,sdpa-causal,mm --heads 32 --kv-heads 8 \
        --length 32768 --head-dim "$head_dim" --window "$window" --out benchmarks/results
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
