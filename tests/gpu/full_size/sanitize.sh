#!/usr/bin/env bash
# Runs the kernel tests on a GPU under compute-sanitizer: out of bounds and misaligned accesses (memcheck), races on
# shared memory (racecheck), reads of what nothing wrote (initcheck), barriers that not all threads reach (synccheck).
#
#   bash tests/gpu/full_size/sanitize.sh [SECONDS for all tools, default 400] [FILTER of test names]
#
# The four tools run side by side, each with its log in $OUT (or a temporary folder). Ends with an error when one of them
# reports something, or does not finish. It works with a driver on the machine itself; where containers are sandboxed
# (gVisor), compute-sanitizer says "Device not supported".
set -uo pipefail
cd "$(dirname "$0")/../../.."
seconds=${1:-400}
filter=${2:-}
logs=${OUT:-$(mktemp -d)}

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -n 1)
[ -n "$sanitizer" ] || { echo "sanitize.sh: compute-sanitizer is not here: it comes with the CUDA toolkit" >&2; exit 2; }

# cuDNN's own attention kernel is left out of two tools: its wgmma pipeline has more barriers than synccheck can follow
# (it says so, and breaks the kernel), and racecheck takes the hand-over of its shared memory for races.
declare -A options=(
  [memcheck]="" [initcheck]=""
  [racecheck]="--kernel-name-exclude kns=cudnn_generated" [synccheck]="--kernel-name-exclude kns=cudnn_generated"
)
tools=(memcheck racecheck initcheck synccheck)
for tool in "${tools[@]}"; do
  # The exit code must come from the sanitizer and not from a test that is too slow under it.
  timeout "$seconds" "$sanitizer" --tool "$tool" ${options[$tool]} --target-processes all --error-exitcode 99 --print-limit 20 \
    deno test --allow-all --no-check ${filter:+--filter "$filter"} tests/gpu/kernels_test.ts \
    >"$logs/sanitize.$tool.log" 2>&1 &
  jobs+=($!)
done

failed=0
for i in "${!tools[@]}"; do
  tool=${tools[$i]}
  wait "${jobs[$i]}"
  code=$?
  echo "== $tool"
  grep -E "ERROR SUMMARY|RACECHECK SUMMARY|^(ok|FAILED) \|" "$logs/sanitize.$tool.log"
  case $code in
    0) echo "$tool: nothing to report" ; continue ;;
    124) echo "$tool: not done after $seconds s" ;;
    99) echo "$tool: ERRORS" ;;
    *) echo "$tool: ended with code $code (a test failed, or the tool does not work here)" ;;
  esac
  failed=1
  tail -n 30 "$logs/sanitize.$tool.log"
done
exit "$failed"
