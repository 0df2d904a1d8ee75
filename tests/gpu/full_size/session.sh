#!/usr/bin/env bash
# What is measured on a GPU machine, in two calls of less than ten minutes each:
#
#   bash tests/gpu/full_size/session.sh             doctor tests reference compare generate profile bandwidth
#   bash tests/gpu/full_size/session.sh ladder export lora sanitize
#
# Any of these steps can be named. Each has a time limit, and none needs another to succeed, except that compare reads
# what reference has written. Everything that is printed goes to $OUT/session.log, the end of each step's to the
# terminal; numbers go to $OUT/*.json and a picture to $OUT/picture.png. Ends with an error when a step does.
#
# Expects deno on the PATH, and in the folder .gpu, which travels with the repository:
#   FLUX.1-schnell/          configs and tokenizers in diffusers' layout, no weights
#   *.whl                    what the machine's Python lacks (diffusers)
set -uo pipefail
cd "$(dirname "$0")/../../.."
out=$(realpath -m "${OUT:-.gpu/out}")
mkdir -p "$out"
work=${FLUX_WORK:-/dev/shm/flux}  # 36 GB, in memory so that loading reads from no disk
configs=${FLUX_CONFIGS:-$PWD/.gpu/FLUX.1-schnell}
site=${FLUX_SITE:-/tmp/flux-site}
here=tests/gpu/full_size
log=$out/session.log
export PYTHONUNBUFFERED=1 NO_COLOR=1
if [ ! -d "$site" ] && ls .gpu/*.whl >/dev/null 2>&1; then
  python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" .gpu/*.whl
fi
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}

steps=" ${*:-doctor tests reference compare generate profile bandwidth} "
failed=()
# step NAME SECONDS COMMAND...
step() {
  local name=$1 seconds=$2 started=$SECONDS code
  shift 2
  [[ $steps == *" $name "* ]] || return
  echo "== $name" | tee -a "$log"
  timeout "$seconds" "$@" 2>&1 | tee -a "$log" | tail -n 40
  code=${PIPESTATUS[0]}
  echo "== $name: code $code after $((SECONDS - started)) s" | tee -a "$log"
  [ "$code" = 0 ] || failed+=("$name")
}

step doctor 20 deno task --quiet doctor
step tests 300 deno task --quiet test:gpu
step reference 200 python3 $here/make_reference.py --configs "$configs" --out "$work"
cp "$work/reference.json" "$out" 2>/dev/null
step compare 120 deno run -A $here/compare.ts --reference "$work" --json "$out/compare.json"
step generate 40 deno task --quiet generate --device cuda --ckpt "$configs" --random-weights --verbose \
  --output-file "$out/picture.png"
step profile 60 deno run -A $here/profile.ts --configs "$configs" --json "$out/profile.json"
step ladder 240 deno task --quiet ladder --device cuda --ckpt "$configs" --random-weights --warmups 2 --runs 5 --markdown
step export 150 bash $here/export.sh "$configs"
step lora 150 deno run -A $here/lora.ts --configs "$configs" --json "$out/lora.json"
step bandwidth 45 deno run -A $here/bandwidth.ts --json "$out/bandwidth.json"
step sanitize 500 env OUT="$out" bash $here/sanitize.sh

echo "failed: ${failed[*]:-none}" | tee -a "$log"
[ ${#failed[@]} = 0 ]
