import type { AttentionLibrary, GpuDevice } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import { attention } from "./attention.ts";
import type { AttentionDType } from "./attention_tiles.ts";
import { expectShape } from "./check.ts";
import { flashAttention, hasFlashAttention } from "./flash_attention.ts";
import { libraryAttention } from "./library_attention.ts";
import { denseRows } from "./contiguous.ts";
import { gpuOf } from "./gpu.ts";
import { portableAttention, portableAttentionTakes } from "./portable_attention.ts";
import { runFastest } from "./run_fastest.ts";
import {
  jointQkNormRope,
  jointQkNormRopeFused,
  jointQkNormRopeTiles,
  jointQkNormRopeTilesTakes,
  type Qkv,
  type QkvStream,
} from "./joint_qk_norm_rope.ts";

export interface JointAttentionOptions {
  /** Where the result goes, `[batch, tokens, heads, headDim]` with a dense last dimension; a new tensor when left out. */
  readonly out?: Tensor;
}

/**
 * From the projections of one or more streams of tokens to what they attend to jointly (Esser et al. 2024, MM-DiT):
 * QK-norm, rotary embedding, the streams behind one another, attention.
 * Composite: this body of primitives is the eager baseline; fused kernels may replace it.
 *
 * @param cos `[tokens, headDim]` f32 for the tokens of all streams in their order. @param sin the same.
 * @returns `[batch, tokens, heads, headDim]` in the projections' dtype.
 */
export function jointAttention(
  streams: readonly QkvStream[],
  cos: Tensor,
  sin: Tensor,
  eps: number,
  options: JointAttentionOptions = {},
): Tensor {
  return attendTo(() => jointQkNormRope(streams, cos, sin, eps), cos, options);
}

/** {@link jointAttention} with one kernel a stream before the attention of a library, on a GPU. */
export function jointAttentionByLibrary(
  streams: readonly QkvStream[],
  cos: Tensor,
  sin: Tensor,
  eps: number,
  options: JointAttentionOptions = {},
): Tensor {
  return attendTo(() => jointQkNormRopeFused(streams, cos, sin, eps), cos, options);
}

/** {@link jointAttentionByLibrary} by our portable kernel; undefined where it does not take such heads on this GPU. */
export function jointAttentionPortable(
  streams: readonly QkvStream[],
  cos: Tensor,
  sin: Tensor,
  eps: number,
  { out }: JointAttentionOptions = {},
): Tensor | undefined {
  const gpu = gpuOf(cos);
  if (gpu === undefined) return undefined;
  return gpu.scope(() => {
    const { q, k, v } = jointQkNormRopeFused(streams, cos, sin, eps);
    const place = out ?? Tensor.empty(gpu, q.shape, q.dtype);
    const plan = { q, k: denseRows(k), v: denseRows(v), out: place, scale: q.shape[3] ** -0.5 };
    if (!portableAttentionTakes(gpu, plan)) return undefined;
    portableAttention(gpu, plan);
    return place;
  });
}

/** Attention of what `join` gives, which goes afterwards. */
function attendTo(join: () => Qkv, { device }: Tensor, options: JointAttentionOptions): Tensor {
  return device.scope(() => {
    const { q, k, v } = join();
    return attention(q, k, v, options);
  });
}

/**
 * {@link jointAttention} by our own kernels on a Hopper GPU, or by {@link jointAttentionByLibrary}: whichever
 * {@link GpuDevice.measuring} finds faster.
 */
export function jointAttentionFused(
  streams: readonly QkvStream[],
  cos: Tensor,
  sin: Tensor,
  eps: number,
  options: JointAttentionOptions = {},
): Tensor {
  const gpu = gpuOf(cos);
  if (gpu === undefined || !jointAttentionTiledTakes(gpu, streams)) {
    return jointAttentionByLibrary(streams, cos, sin, eps, options);
  }
  const ways = [
    () => jointAttentionTiled(gpu, streams, cos, sin, eps, "bf16", options),
    () => jointAttentionByLibrary(streams, cos, sin, eps, options),
  ];
  const key = `jointAttention ${streams.map(({ q }) => q).join(", ")}`;
  return runFastest(gpu, key, ways);
}

/** Whether {@link jointAttentionTiled} takes these streams on this GPU. */
export function jointAttentionTiledTakes(gpu: GpuDevice, streams: readonly QkvStream[]): boolean {
  return hasFlashAttention(gpu) && jointQkNormRopeTilesTakes(streams);
}

/**
 * {@link jointAttention} by {@link flashAttention}, from tiles that the kernel writes which norms and turns q and k.
 *
 * @param streams that {@link jointAttentionTiledTakes}. @param dtype f8e4m3: q, k and v are cast without scales.
 */
export function jointAttentionTiled(
  gpu: GpuDevice,
  streams: readonly QkvStream[],
  cos: Tensor,
  sin: Tensor,
  eps: number,
  dtype: AttentionDType,
  { out }: JointAttentionOptions = {},
): Tensor {
  const [{ q }] = streams;
  const [batch, , heads, headDim] = q.shape;
  const shape = [batch, cos.shape[0], heads, headDim];
  if (out !== undefined) expectShape("jointAttention", "out", out, shape);
  return gpu.scope(() => {
    const place = out ?? Tensor.empty(gpu, shape, q.dtype);
    const tiles = jointQkNormRopeTiles(gpu, streams, cos, sin, eps, dtype);
    flashAttention(gpu, tiles, headDim ** -0.5, place);
    return place;
  });
}

/**
 * {@link jointAttentionByLibrary} with the library that is named, which may attend in float8.
 *
 * @param streams of heads that it takes. @param dtype what q, k and v are cast to behind norm and rotation.
 */
export function jointAttentionByNamed(
  gpu: GpuDevice,
  library: AttentionLibrary,
  streams: readonly QkvStream[],
  cos: Tensor,
  sin: Tensor,
  eps: number,
  dtype: AttentionDType,
  options: JointAttentionOptions = {},
): Tensor {
  return gpu.scope(() => {
    const qkv = jointQkNormRopeFused(streams, cos, sin, eps);
    return libraryAttention(gpu, library, qkv, dtype, options);
  });
}
