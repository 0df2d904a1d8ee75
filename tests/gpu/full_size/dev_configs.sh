#!/usr/bin/env bash
# Makes folders with the configs and tokenizers of FLUX.1-dev and FLUX.1-Kontext-dev: dev's own transformer, scheduler and
# index, and what it shares with schnell. No weights: for --random-weights.
#
#   bash tests/gpu/full_size/dev_configs.sh FLUX.1-schnell FLUX.1-dev TARGET
#
# makes TARGET/FLUX.1-dev and TARGET/FLUX.1-Kontext-dev.
set -euo pipefail
schnell=$1 dev=$2 target=$3
for name in FLUX.1-dev FLUX.1-Kontext-dev; do
  mkdir -p "$target/$name"
  for part in text_encoder text_encoder_2 tokenizer tokenizer_2 vae; do cp -r "$schnell/$part" "$target/$name"; done
  for part in transformer scheduler model_index.json; do cp -r "$dev/$part" "$target/$name"; done
done
sed -i 's/"FluxPipeline"/"FluxKontextPipeline"/' "$target/FLUX.1-Kontext-dev/model_index.json"
