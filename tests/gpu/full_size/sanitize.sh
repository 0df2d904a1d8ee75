#!/usr/bin/env bash
# Runs the kernel tests on a GPU under compute-sanitizer: out of bounds and misaligned accesses (memcheck), races on
# shared memory (racecheck), reads of what nothing wrote (initcheck), barriers that not all threads reach (synccheck).
#
#   bash tests/gpu/full_size/sanitize.sh [SECONDS for each tool, default 120] [FILTER of test names]
#
# Ends with an error when a tool reports something, or does not finish. It works with a driver on the machine itself;
# where containers are sandboxed (gVisor), compute-sanitizer says "Device not supported".
set -uo pipefail
cd "$(dirname "$0")/../../.."
seconds=${1:-120}
filter=${2:-}

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -n 1)
[ -n "$sanitizer" ] || { echo "sanitize.sh: compute-sanitizer is not here: it comes with the CUDA toolkit" >&2; exit 2; }

failed=0
for tool in memcheck racecheck initcheck synccheck; do
  echo "== $tool"
  # The exit code must come from the sanitizer and not from a test that is too slow under it.
  timeout "$seconds" "$sanitizer" --tool "$tool" --target-processes all --error-exitcode 99 --print-limit 20 \
    deno test --allow-all --no-check ${filter:+--filter "$filter"} tests/gpu/kernels_test.ts 2>&1 | tail -n 40
  code=${PIPESTATUS[0]}
  case $code in
    0) echo "$tool: nothing to report" ;;
    124) echo "$tool: not done after $seconds s"; failed=1 ;;
    99) echo "$tool: ERRORS"; failed=1 ;;
    *) echo "$tool: ended with code $code (a test failed, or the tool does not work here)"; failed=1 ;;
  esac
done
exit "$failed"
