#!/usr/bin/env bash
# Trains models/tiny on a GPU machine that is lent for minutes and goes back when no command runs on it.
# The chain runs detached; each call watches it for a while and brings out what there is. So: one call after the
# other, without a pause, each a little shorter than the longest that is allowed.
#
#   bash models/tiny/train_in_lease.sh SECONDS [STAGES]     (SECONDS: 540 where a call may take 600)
#
# SECONDS  how long this call watches
# STAGES   file:of:stages, default models/tiny/chain.txt: one line `stage seconds options` each, run in order
#
# Run it in the repository's root. It reads the pictures from $TINY_EMOJI (the webp files, default .tiny/emoji) and
# wheels to install from .tiny/*.whl, works below $TINY_WORK (default $TMPDIR/tiny), and writes logs, sheets and the
# model (model.tar.aa, .ab, ...: `cat model.tar.* | tar x -C models/tiny`) to $OUT.
set -euo pipefail
watch=$1
stages=${2:-models/tiny/chain.txt}
work=${TINY_WORK:-${TMPDIR:-/tmp}/tiny}
emoji=$(realpath "${TINY_EMOJI:-.tiny/emoji}")
python=${PYTHON:-python3}
out=${OUT:?a folder for what comes back}

if [ ! -e "$work/started" ]; then
  mkdir -p "$work/state"
  cp -r models/tiny "$work/model"
  cp .tiny/state/* "$work/state" 2>/dev/null || true  # what an earlier machine left
  cp "$stages" "$work/chain.txt"
  if ls .tiny/*.whl >/dev/null 2>&1; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" .tiny/*.whl
  fi
  export PYTHONPATH=$work/site PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false TORCHINDUCTOR_CACHE_DIR=$work/inductor
  cat > "$work/chain.sh" <<CHAIN
cd "$work/model"
while read -r stage seconds options; do
  [ -n "\$stage" ] && [ "\${stage:0:1}" != "#" ] || continue
  echo "== \$stage \$seconds \$options, \$(date +%T)"
  case \$stage in
    evaluate) $python evaluate.py --emoji "$emoji" \$options </dev/null | tail -n 1 ;;
    *) $python train.py \$stage --emoji "$emoji" --state "$work/state" --seconds \$seconds \$options </dev/null ;;
  esac || { echo "CHAIN FAILED in \$stage"; exit 1; }
done < "$work/chain.txt"
echo "CHAIN DONE"
CHAIN
  touch "$work/started"
  setsid bash "$work/chain.sh" > "$work/log" 2>&1 < /dev/null &
fi

for _ in $(seq "$watch"); do
  sleep 1
  grep -q "CHAIN DONE\|CHAIN FAILED" "$work/log" && break
done
# At most eight files come back.  The newest state, or model once one is exported, travels with every call, so that a
# machine that is taken away costs a minute of training: `cat state.tar.* | tar x -C .tiny/state`, and --resume.
for file in log state/teacher_128.jpg state/teacher_256.jpg state/student_4.jpg; do
  cp "$work/$file" "$out"/ 2>/dev/null || true
done
if [ "$work/model/transformer/diffusion_pytorch_model.safetensors" -nt "$work/started" ]; then
  tar cf - -C "$work/model" transformer text_encoder text_encoder_2 vae scheduler model_index.json |
    split -b 15M - "$out/model.tar."
elif [ -e "$work/state/teacher.pt" ]; then
  tar cf - -C "$work/state" teacher.pt hints.pt | split -b 15M - "$out/state.tar."
fi
grep -E "^==|step |steps|right:|PSNR|exported|encoded|Error|CHAIN" "$work/log" | tail -n 60
