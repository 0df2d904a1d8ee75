#!/usr/bin/env bash
# What --offload and --t5_float8 cost and save: times of two prompts, and the most memory that the GPU had in use, each in a
# process of its own; then the same in what a GPU of 24 GB has, where FLUX.1-dev has to run with --offload.
#
#   bash tests/gpu/full_size/offload.sh FLUX.1-dev-configs [FLAG...]
#
# The folder needs configs and tokenizers only (dev_configs.sh makes one). Further flags go to every run, e.g. --height 512.
# Prints a table in Markdown; $OUT/offload.log has all that was printed. Fails where the run in 24 GB does.
set -uo pipefail
configs=$1
shift
out=$(realpath -m "${OUT:-.gpu/out}")
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
printf 'a lighthouse at night\na red apple on a table\n' >"$work/prompts.txt"
log=$out/offload.log
: >"$log"
here=tests/gpu/full_size

# run NAME FLAG...: a row of the table. The first prompt's times have compiling and measuring in them, the second's not.
run() {
  local name=$1 code first last
  shift
  nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits -i 0 -lms 20 >"$work/memory" &
  local watcher=$!
  first=$(nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits -i 0)
  deno task --quiet generate --device cuda --ckpt "$configs" --random-weights --cache-dir "$work/cache" \
    --prompt-file "$work/prompts.txt" --compile_export_mode compile --output-file "$work/a.png" --json "$@" \
    >"$work/json" 2>>"$log"
  code=$?
  kill "$watcher"
  wait "$watcher" 2>/dev/null
  cat "$work/json" >>"$log"
  last=$(sort -n "$work/memory" | tail -n 1)
  python3 - "$name" "$code" "$((last - first))" "$work/json" <<'PYTHON'
import json, sys
name, code, mebibytes, path = sys.argv[1:]
runs = [json.loads(line) for line in open(path)]
if not runs:
    print(f"| {name} | failed with code {code} | | | | | |")
else:
    last = runs[-1]["milliseconds"]
    steps = sorted(last["steps"])
    cells = [f"{last['load'] / 1000:.1f}", f"{last['text']:.0f}", f"{steps[len(steps) // 2]:.1f}", f"{runs[-1]['seconds']:.2f}"]
    weights = runs[-1]["memory"]["weights"] / 1e9
    print(f"| {name} | {' | '.join(cells)} | {weights:.1f} | {int(mebibytes) * 2**20 / 1e9:.1f} |")
PYTHON
  return "$code"
}

echo "| | loading, s | text, ms | step, ms | second picture, s | weights on the GPU behind it, GB | most memory in use, GB |"
echo "|---|--:|--:|--:|--:|--:|--:|"
run "(warm-up)" "$@" >/dev/null
run "all on the GPU" "$@"
run "--t5_float8 weights" --t5_float8 weights "$@"
run "--t5_float8 off" --t5_float8 off "$@"
run "--offload" --offload "$@"
run "--offload --t5_float8 weights" --offload --t5_float8 weights "$@"
run "--offload --t5_float8 off" --offload --t5_float8 off "$@"

mkfifo "$work/hold"
deno run -A $here/ballast.ts --leave 24 <"$work/hold" >"$work/ballast" &
ballast=$!
exec 9>"$work/hold"
until grep -q ready "$work/ballast"; do
  kill -0 "$ballast" 2>/dev/null || { echo "the ballast did not start" >&2; exit 1; }
  sleep 0.2
done
cat "$work/ballast" | tee -a "$log" >&2
run "in 24 GB: all on the GPU (has to fail)" "$@" && failed=1
run "in 24 GB: --offload" --offload "$@" || failed=1
run "in 24 GB: --offload --t5_float8 weights" --offload --t5_float8 weights "$@" || failed=1
exec 9>&-
wait "$ballast"
exit "${failed:-0}"
