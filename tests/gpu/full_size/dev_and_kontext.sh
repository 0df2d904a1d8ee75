#!/usr/bin/env bash
# FLUX.1-dev and Kontext at full size with random weights: benchmarks, exported packages, sizes, the first-block cache.
#
#   bash tests/gpu/full_size/dev_and_kontext.sh FLUX.1-schnell-configs FLUX.1-dev-configs [STEP...]
#
# Steps: dev dev_exact kontext kontext_exact export sizes cache; all when none is named. Each prints to the terminal and to
# $OUT/dev_and_kontext.log. Ends with an error when a step does.
set -uo pipefail
schnell=$(realpath "$1") dev=$(realpath "$2")
shift 2
cd "$(dirname "$0")/../../.."
here=tests/gpu/full_size
out=$(realpath -m "${OUT:-.gpu/out}")
mkdir -p "$out"
log=$out/dev_and_kontext.log
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bash $here/dev_configs.sh "$schnell" "$dev" "$work"
steps=" ${*:-dev dev_exact kontext kontext_exact export sizes cache} "
failed=()
step() {
  local name=$1 seconds=$2
  shift 2
  [[ $steps == *" $name "* ]] || return
  echo "== $name" | tee -a "$log"
  timeout "$seconds" "$@" 2>&1 | tee -a "$log"
  [ "${PIPESTATUS[0]}" = 0 ] || failed+=("$name")
}

common=(--device cuda --random-weights --warmups 1 --runs 3 --output-file "$work/a.png")
picture=(--image docs/first_image.png)  # square: 1024 x 1024, 4096 tokens
exact=(--disable_fa3 --disable_quant)
step dev 300 deno task --quiet benchmark "${common[@]}" --ckpt "$work/FLUX.1-dev" --compile_export_mode compile
step dev_exact 300 deno task --quiet benchmark "${common[@]}" --ckpt "$work/FLUX.1-dev" --compile_export_mode compile "${exact[@]}"
step kontext 300 deno task --quiet benchmark "${common[@]}" "${picture[@]}" --ckpt "$work/FLUX.1-Kontext-dev" --compile_export_mode compile
step kontext_exact 300 deno task --quiet benchmark "${common[@]}" "${picture[@]}" --ckpt "$work/FLUX.1-Kontext-dev" --compile_export_mode compile "${exact[@]}"
step export 200 bash $here/export.sh "$work/FLUX.1-Kontext-dev" "${picture[@]}"

# Kernels are compiled for the first size; the others find them. Without tuning, what is kept is what was compiled.
sizes() {
  local cache=$work/cache before after size
  draw() {
    deno task --quiet generate --device cuda --random-weights --ckpt "$work/FLUX.1-dev" --num_inference_steps 2 \
      --disable_inductor_tuning_flags --compile_export_mode compile --cache-dir "$cache" --output-file "$work/s.png" \
      --height "$1" --width "$2" "${@:3}"
  }
  draw 1024 1024 || return 1
  before=$(find "$cache" -type f | sort)
  for size in "512 512" "256 256" "768 1280" "1216 832" "640 1536"; do draw $size || return 1; done
  after=$(find "$cache" -type f | sort)
  diff <(echo "$before") <(echo "$after") || { echo "another size compiled something"; return 1; }
  for size in "272 304" "2048 2048" "1040 2000" "2048 256"; do draw $size || return 1; done
  draw 512 512 --num_images_per_prompt 4 || return 1
  echo "files in the cache: $(find "$cache" -type f | wc -l), after the first size $(wc -l <<<"$before")"
}
[[ $steps == *" sizes "* ]] && { echo "== sizes" | tee -a "$log"; sizes 2>&1 | tee -a "$log"; [ "${PIPESTATUS[0]}" = 0 ] || failed+=(sizes); }
step cache 400 deno run -A $here/first_block_cache.ts --device cuda --random-weights --ckpt "$work/FLUX.1-dev" --runs 2

echo "failed: ${failed[*]:-none}" | tee -a "$log"
[ ${#failed[@]} = 0 ]
