/**
 * FLUX.1-Kontext (Batifol et al. 2025, "FLUX.1 Kontext: Flow Matching for In-Context Image Generation and Editing in
 * Latent Space"): the picture to edit is encoded, and its tokens stand behind the noise's in every step, told apart by
 * their first position (diffusers' `pipelines/flux/pipeline_flux_kontext.py`).
 */
import type { Device } from "../../ffi/device.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { resizeLanczos } from "./lanczos.ts";
import type { Ops } from "./ops.ts";
import type { Picture } from "./pipeline.ts";

/** In pixels. */
export interface Size {
  /** Columns. */
  readonly width: number;
  /** Rows. */
  readonly height: number;
}

/** Widths and heights that Kontext was trained on, about a million pixels each. */
export const PREFERRED_SIZES: readonly (readonly [width: number, height: number])[] = [
  [672, 1568],
  [688, 1504],
  [720, 1456],
  [752, 1392],
  [800, 1328],
  [832, 1248],
  [880, 1184],
  [944, 1104],
  [1024, 1024],
  [1104, 944],
  [1184, 880],
  [1248, 832],
  [1328, 800],
  [1392, 752],
  [1456, 720],
  [1504, 688],
  [1568, 672],
];

/** The preferred size whose shape (width to height) is nearest; of two as near the narrower one, as in diffusers. */
export function preferredSize({ width, height }: Size): Size {
  const distance = ([w, h]: readonly [number, number]) => Math.abs(width / height - w / h);
  const [w, h] = PREFERRED_SIZES.reduce((best, size) => distance(size) < distance(best) ? size : best);
  return { width: w, height: h };
}

/**
 * The picture as the autoencoder takes it.
 *
 * @param multiple of 16, what its sides are multiples of. @param resize to the preferred size of its shape; else it keeps
 * its own, cut to multiples.
 */
export function fitReference(picture: Picture, multiple: number, resize: boolean): Picture {
  const cut = (side: number) => Math.max(multiple, side - side % multiple);
  // Diffusers cuts before it looks at the shape, which for small pictures makes another one.
  const own = { width: cut(picture.width), height: cut(picture.height) };
  const { width, height } = resize ? preferredSize(own) : own;
  const rgb = resizeLanczos(picture.rgb, picture.width, picture.height, width, height);
  return { width, height, rgb };
}

/** The noise's tokens `[batch, tokens, channels]` with those of the picture to edit behind them, where there is one. */
export function withReference(ops: Ops, latents: Tensor, imageLatents: Tensor | undefined): Tensor {
  return imageLatents === undefined
    ? latents
    : ops.concat([latents, ops.cast(imageLatents, latents.dtype)], 1);
}

/** 8-bit RGB as the autoencoder's input: f32 `[1, 3, height, width]`, -1..1. */
export function pixelTensor(device: Device, { width, height, rgb }: Picture): Tensor {
  const { fround } = Math;
  // Diffusers divides and shifts in float32, too.
  const levels = Float32Array.from({ length: 256 }, (_, value) => 2 * fround(value / 255) - 1);
  const size = width * height;
  const planes = new Float32Array(3 * size);
  for (let pixel = 0; pixel < size; pixel++) {
    for (let channel = 0; channel < 3; channel++) {
      planes[channel * size + pixel] = levels[rgb[3 * pixel + channel]];
    }
  }
  return Tensor.fromFloat32(device, planes, [1, 3, height, width]);
}
