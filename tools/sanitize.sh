#!/usr/bin/env bash
# Runs tests of the emulated CUDA kernels under a sanitizer:
#
#   tools/sanitize.sh address                 the emulated op tests under AddressSanitizer, of
#                                             their grids every pair of values
#   tools/sanitize.sh thread                  a smaller set under ThreadSanitizer: a missing barrier
#                                             in a kernel is a reported race
#   tools/sanitize.sh address|thread PYTEST_ARGUMENTS...    others
#
# Needs GCC's sanitizer libraries, cmake, ninja and the packages of the extra "test".
set -euo pipefail
cd "$(dirname "$0")/.."

sanitizer=${1:?address or thread}
shift
python=${PYTHON:-python3}
folder=build/emulation_$sanitizer

case $sanitizer in
  address)
    library=libasan.so
    chosen=(python_tests/test_lambda_attn.py python_tests/test_lambda_decode.py
      python_tests/test_clamped_rope.py -k emulated --quick)
    ;;
  thread)
    library=libtsan.so
    chosen=(python_tests/test_emulated.py python_tests/test_lambda_attn.py
      -k "another_order or (emulated and test_options and (all or partial))")
    ;;
  *)
    echo "$0: the sanitizer is '$sanitizer', but must be address or thread" >&2
    exit 2
    ;;
esac
if [ $# -gt 0 ]; then chosen=("$@"); fi

headers=$(cd python_tests && "$python" -c "import emulated; print(emulated.cuda_headers())")
cmake -S csrc/emulation -B "$folder" -G Ninja -DLMINF_SANITIZE="$sanitizer" \
  -DPython_EXECUTABLE="$(command -v "$python")" -DLMINF_CUDA_INCLUDE="$headers" > /dev/null
cmake --build "$folder" ${MAX_JOBS:+-j "$MAX_JOBS"}
ctest --test-dir "$folder" --output-on-failure

# Python itself is not instrumented: the sanitizer's library must come first, and Python's own leaks
# are its own business. One OpenMP thread: its barriers are unknown to ThreadSanitizer.
LMINF_EMULATION_BUILD=$PWD/$folder OMP_NUM_THREADS=1 \
  ASAN_OPTIONS=detect_leaks=0 TSAN_OPTIONS=exitcode=66 \
  LD_PRELOAD="$(g++ -print-file-name=$library) $(g++ -print-file-name=libstdc++.so)" \
  "$python" -m pytest -q -p no:cacheprovider -n auto --maxprocesses 8 --dist worksteal \
  "${chosen[@]}"
