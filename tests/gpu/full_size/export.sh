#!/usr/bin/env bash
# 08_export at full size, with random weights: exports them, then draws the first picture of a new process from the
# package, in a folder without compiled kernels and measured choices, and with a broken NVRTC in the way of the real one.
#
#   bash tests/gpu/full_size/export.sh FLUX.1-schnell-configs [FLAG...]
#
# Prints the seconds from the start of the process to its end, and fails where they are more than 8, where anything was
# compiled or measured, or where the picture is another one. What was just written is in the page cache: it has 26 GB in
# $TMPDIR. Not in /dev/shm, where Deno writes with all permissions only.
set -euo pipefail
configs=$1
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/no_nvrtc"
touch "$work/no_nvrtc/libnvrtc.so.13" "$work/no_nvrtc/libnvrtc.so.12"
common=(--device cuda --ckpt "$configs" --random-weights --cache-dir "$work/cache" --verbose)

deno task --quiet generate "${common[@]}" --compile_export_mode export_aoti --output-file "$work/made.png" "$@"
find "$work/cache" -maxdepth 1 -type f -delete
for run in first second; do
  start=$EPOCHREALTIME
  FLUX_LIB_PATH=$work/no_nvrtc deno task --quiet generate "${common[@]}" --use-cached-model \
    --output-file "$work/$run.png" "$@"
  seconds=$(awk "BEGIN { print $EPOCHREALTIME - $start }")
  echo "$run start from the package: $seconds s"
  cmp "$work/made.png" "$work/$run.png"
  [ -z "$(find "$work/cache" -maxdepth 1 -type f)" ] || { echo "something was compiled or measured" >&2; exit 1; }
done
awk "BEGIN { exit !($seconds < 8) }" || { echo "more than 8 seconds" >&2; exit 1; }
