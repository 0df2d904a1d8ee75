import type { DType } from "../ffi/dtype.ts";
import { Float, type GpuDevice } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import { expect, expectShape } from "./check.ts";
import { contiguous } from "./contiguous.ts";
import { onCpu } from "./cpu.ts";
import { gpuOf, launch, vectorWidth } from "./gpu.ts";
import GROUP_NORM_CU from "./group_norm.cu" with { type: "text" };
import GROUP_NORM_WAT from "./group_norm.wat" with { type: "text" };
import { address, elementSize, vectorAddress, wasmKernels } from "./wasm.ts";

const SOURCE = { name: "group_norm.cu", text: GROUP_NORM_CU };
/** Threads of a block, and vectors that each has on their way at a time. */
const BLOCK = 256;
const VECTORS = 4;
/** Threads of a block that merges the moments of a group: thousands, which it waits for. */
const MERGING = 1024;
/**
 * Blocks among which a picture is shared out at least, if it is large enough: some for each multiprocessor of any GPU. A
 * fixed number, so that all GPUs add up in the same order.
 */
const BLOCKS = 1024;
/** Floats of a `Moments` in group_norm.cu. */
const MOMENTS = 3;

/** What {@link groupNorm} takes beside the picture. */
interface GroupNorm {
  readonly groups: number;
  readonly weight: Tensor;
  readonly bias: Tensor;
  readonly eps: number;
  /** Whether SiLU follows, before the result is stored. */
  readonly silu: boolean;
}

/**
 * Group norm (Wu & He 2018): mean and variance over each group of channels and the whole picture.
 *
 * @param x `[batch, channels, ...]`. @param groups divides channels. @param weight `[channels]`.
 * @param bias `[channels]`. @param eps added to the variance.
 * @returns `x`'s shape and dtype, dense; on a GPU dense as NHWC (channels last) where `x` is that. Statistics in f32 or
 * better.
 * @throws ShapeError where the sizes do not fit.
 */
export function groupNorm(x: Tensor, groups: number, weight: Tensor, bias: Tensor, eps: number): Tensor {
  const gpu = gpuOf(x);
  if (gpu !== undefined) return groupNormOnGpu(gpu, x, { groups, weight, bias, eps, silu: false });
  const [batch, channels] = x.shape;
  expectFit(x, groups, weight, bias);
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

function expectFit(x: Tensor, groups: number, weight: Tensor, bias: Tensor): void {
  const [, channels] = x.shape;
  expect(channels % groups === 0, "groupNorm", () => `${groups} groups do not divide ${channels} channels`);
  expectShape("groupNorm", "weight", weight, [channels]);
  expectShape("groupNorm", "bias", bias, [channels]);
}

/** {@link groupNorm} on a GPU, or with SiLU behind it in the same kernels. */
export function groupNormOnGpu(gpu: GpuDevice, x: Tensor, norm: GroupNorm): Tensor {
  const { groups, weight, bias } = norm;
  expectFit(x, groups, weight, bias);
  expect(
    weight.dtype === bias.dtype,
    "groupNorm",
    () => `weight is ${weight}, bias is ${bias}: they take one dtype`,
  );
  // Pictures with the channels last, as memory has them.
  const interleaved = x.permute([0, ...x.shape.keys().drop(2), 1]);
  return gpu.scope(() => {
    if (x.isContiguous || !interleaved.isContiguous) {
      const out = Tensor.empty(gpu, x.shape, x.dtype);
      normalizePlanar(gpu, out, contiguous(x), norm);
      return out;
    }
    const out = Tensor.empty(gpu, interleaved.shape, x.dtype);
    normalizeInterleaved(gpu, out, interleaved, norm);
    return out.permute([0, x.rank - 1, ...x.shape.keys().drop(2).map((dim) => dim - 1)]);
  });
}

/** `out` and `x` dense `[batch, channels, ...]`. */
function normalizePlanar(gpu: GpuDevice, out: Tensor, x: Tensor, norm: GroupNorm): void {
  const { groups, weight, bias, eps, silu } = norm;
  const [batch, channels] = x.shape;
  const pixels = x.size / (batch * channels);
  const perGroup = channels / groups;
  const width = vectorWidth(pixels, [out, x].map((picture) => picture.reshape([batch, channels, pixels])));
  const types = { T: x.dtype, W: weight.dtype };
  const constants = { N: width, VECTORS, BLOCK, LANES: 1, SILU: 0 };
  const tile = BLOCK * VECTORS * width;
  const { chunk, parts } = shareOut(perGroup * pixels, tile, batch * groups);
  const partials = Tensor.empty(gpu, [batch * groups, parts, MOMENTS], "f32");
  launch(gpu, SOURCE, {
    entry: "momentsPlanar",
    types,
    constants,
    grid: batch * groups * parts,
    block: BLOCK,
    args: [partials, x, BigInt(perGroup * pixels), parts, BigInt(chunk)],
  });
  const statistics = mergeMoments(gpu, partials, types, constants, eps);
  const tiles = Math.ceil(pixels / tile);
  launch(gpu, SOURCE, {
    entry: "normalizePlanar",
    types,
    constants: { ...constants, SILU: Number(silu) },
    grid: batch * channels * tiles,
    block: BLOCK,
    args: [out, x, statistics, weight, bias, channels, perGroup, BigInt(pixels), tiles],
  });
}

/** `out` and `x` dense `[batch, ..., channels]`. */
function normalizeInterleaved(gpu: GpuDevice, out: Tensor, x: Tensor, norm: GroupNorm): void {
  const { groups, weight, bias, eps, silu } = norm;
  const batch = x.shape[0];
  const channels = x.shape.at(-1)!;
  const pixels = x.size / (batch * channels);
  const perGroup = channels / groups;
  const width = vectorWidth(channels, [out, x]);
  const types = { T: x.dtype, W: weight.dtype };
  const lanes = Math.min(BLOCK, channels / width);
  const slices = Math.ceil(channels / (lanes * width));
  const rows = Math.floor(BLOCK / lanes);
  const constants = { N: width, VECTORS, BLOCK, LANES: lanes, SILU: 0 };
  const { chunk, parts } = shareOut(pixels, rows * VECTORS, batch * slices);
  const partials = Tensor.empty(gpu, [batch * groups, parts * perGroup, MOMENTS], "f32");
  const shape = { grid: batch * slices * parts, block: rows * lanes };
  launch(gpu, SOURCE, {
    entry: "momentsInterleaved",
    types,
    constants,
    ...shape,
    args: [partials, x, channels, perGroup, BigInt(pixels), parts, chunk],
  });
  const statistics = mergeMoments(gpu, partials, types, constants, eps);
  launch(gpu, SOURCE, {
    entry: "normalizeInterleaved",
    types,
    constants: { ...constants, SILU: Number(silu) },
    ...shape,
    args: [out, x, statistics, weight, bias, channels, perGroup, BigInt(pixels), parts, chunk],
  });
}

/** Splits `items` into parts of whole tiles, so that `runs` of them make about {@link BLOCKS} blocks. */
function shareOut(items: number, tile: number, runs: number): { chunk: number; parts: number } {
  const tiles = Math.ceil(items / tile);
  const chunk = tile * Math.ceil(tiles / Math.ceil(BLOCKS / runs));
  return { chunk, parts: Math.ceil(items / chunk) };
}

/** Mean and `1 / sqrt(variance + eps)` of each group, `[groups, 2]`, from `partials` `[groups, parts, MOMENTS]`. */
function mergeMoments(
  gpu: GpuDevice,
  partials: Tensor,
  types: Readonly<Record<string, DType>>,
  constants: Readonly<Record<string, number>>,
  eps: number,
): Tensor {
  const [groups, parts] = partials.shape;
  const statistics = Tensor.empty(gpu, [groups, 2], "f32");
  launch(gpu, SOURCE, {
    entry: "mergeMoments",
    types,
    constants,
    grid: groups,
    block: MERGING,
    args: [statistics, partials, parts, new Float(eps)],
  });
  return statistics;
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
