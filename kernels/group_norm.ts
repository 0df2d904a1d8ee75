import { Tensor } from "../ffi/tensor.ts";
import { expect, expectShape } from "./check.ts";
import { onCpu } from "./cpu.ts";
import GROUP_NORM_WAT from "./group_norm.wat" with { type: "text" };
import { address, elementSize, vectorAddress, wasmKernels } from "./wasm.ts";

/**
 * Group norm (Wu & He 2018): mean and variance over each group of channels and the whole picture.
 *
 * @param x `[batch, channels, ...]`. @param groups divides channels. @param weight `[channels]`.
 * @param bias `[channels]`. @param eps added to the variance.
 * @returns `x`'s shape (dense) and dtype; statistics in f32 or better.
 */
export function groupNorm(x: Tensor, groups: number, weight: Tensor, bias: Tensor, eps: number): Tensor {
  const [batch, channels] = x.shape;
  expect(channels % groups === 0, "groupNorm", () => `${groups} groups do not divide ${channels} channels`);
  expectShape("groupNorm", "weight", weight, [channels]);
  expectShape("groupNorm", "bias", bias, [channels]);
  const out = Tensor.empty(x.device, x.shape, x.dtype);
  const wasm = wasmKernels("group_norm.wat", GROUP_NORM_WAT, out, [x]);
  if (wasm === undefined || x.size === 0) {
    return onCpu(
      out,
      [x, weight, bias],
      (o, xs, w, b) => groupNormReference(o, xs, w, b, batch, groups, eps),
    );
  }
  wasm.device.scope(() => {
    const [scale, shift] = [weight, bias].map(vectorAddress);
    const pixels = x.size / (batch * channels);
    const args = [
      address(x),
      address(out),
      scale,
      shift,
      channels,
      channels / groups,
      pixels,
      eps,
      elementSize(x),
    ];
    wasm.runner.run(wasm.kernels.normalize, batch * groups, args);
  });
  return out;
}

/** `x` dense `[batch, channels, pixels]`. */
export function groupNormReference(
  out: Float32Array,
  x: Float32Array,
  weight: Float32Array,
  bias: Float32Array,
  batch: number,
  groups: number,
  eps: number,
): void {
  const channels = weight.length;
  const pixels = x.length / (batch * channels);
  const perGroup = channels / groups * pixels;
  for (let group = 0; group < batch * groups; group++) {
    const start = group * perGroup;
    let sum = 0;
    for (let i = start; i < start + perGroup; i++) sum += x[i];
    const mean = sum / perGroup;
    let squares = 0;
    for (let i = start; i < start + perGroup; i++) squares += (x[i] - mean) ** 2;
    const factor = 1 / Math.sqrt(squares / perGroup + eps);
    for (let i = start; i < start + perGroup; i += pixels) {
      const channel = (i / pixels) % channels;
      const scale = factor * weight[channel];
      const shift = bias[channel] - mean * scale;
      for (let p = i; p < i + pixels; p++) out[p] = x[p] * scale + shift;
    }
  }
}
