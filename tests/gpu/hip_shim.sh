#!/usr/bin/env bash
# The HIP device on an NVIDIA GPU, by the shim of tests/support/hip_shim.cpp, which forwards HIP's, hipRTC's, hipBLASLt's and
# MIOpen's functions to CUDA's. Test code: it says that the calls belong together, and nothing about AMD's libraries or speed.
#
#   bash tests/gpu/hip_shim.sh [FLUX.1-schnell-configs]
#
# Runs the tests of tests/gpu/hip_shim_test.ts; draws the embedded model's picture with --device hip and --device cuda, both
# exact, and prints how far they are apart; and, where a folder with configs and tokenizers is given, draws a picture of 512 x
# 512 pixels with the full model's shapes and random weights with all recipes. Pictures go to $OUT. Needs g++, libcuda, NVRTC
# and cuBLASLt (of the toolkit or of Python's wheels), cuDNN for the picture to compare with. Convolutions and attention are
# plain kernels here: the full model needs about a minute.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=$(realpath -m "${OUT:-.gpu/out}")
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export NO_COLOR=1
failed=()
step() { echo "== $1"; shift; "$@" || failed+=("$*"); }

step "the shim" deno run --allow-read --allow-write --allow-ffi --allow-env --allow-run=g++ \
  tests/support/hip_shim.ts "$work"
step "tests" deno test --no-prompt --allow-read --allow-write --allow-ffi --allow-sys=cpus --allow-run=deno,g++ --allow-env \
  tests/gpu/hip_shim_test.ts

exact=(--prompt "A cat playing with a ball of yarn" --disable_fa3 --disable_quant --compile_export_mode compile
  --cache-dir "$work/cache")
step "the embedded model, hip" env FLUX_LIB_PATH="$work" deno task --quiet generate --device hip "${exact[@]}" \
  --output-file "$out/hip_shim_tiny.png" --verbose
step "the embedded model, cuda" deno task --quiet generate --device cuda "${exact[@]}" --output-file "$work/cuda.png"
step "how far they are apart" deno run --allow-read --allow-ffi --allow-env tests/gpu/compare_pictures.ts \
  "$out/hip_shim_tiny.png" "$work/cuda.png"
if [ $# -gt 0 ]; then
  step "the full model, hip" env FLUX_LIB_PATH="$work" deno task --quiet generate --device hip --ckpt "$1" \
    --random-weights --height 512 --width 512 --compile_export_mode compile --cache-dir "$work/cache" \
    --output-file "$out/hip_shim_full.png" --verbose
fi
[ ${#failed[@]} -eq 0 ] && echo "hip_shim: all passed" || { printf 'FAILED: %s\n' "${failed[@]}"; exit 1; }
