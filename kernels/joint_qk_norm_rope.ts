import { Float, type GpuDevice } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import { expect, expectShape } from "./check.ts";
import { concat } from "./concat.ts";
import { denseRows } from "./contiguous.ts";
import { gpuOf, launch, vectorWidth } from "./gpu.ts";
import JOINT_QK_NORM_ROPE_CU from "./joint_qk_norm_rope.cu" with { type: "text" };
import { qkNormRope } from "./qk_norm_rope.ts";

const SOURCE = { name: "joint_qk_norm_rope.cu", text: JOINT_QK_NORM_ROPE_CU };
/** Heads of q, and as many of k, that a thread turns with the same part of the tables, if there are so many. */
const HEADS = 2;
/** Threads of a block, at most. */
const MOST_THREADS = 512;

/** The projections of one stream of tokens, `[batch, tokens, heads, headDim]` each, and its norms' weights `[headDim]`. */
export interface QkvStream {
  readonly q: Tensor;
  readonly k: Tensor;
  readonly v: Tensor;
  readonly normQ: Tensor;
  readonly normK: Tensor;
}

/** What attention takes, `[batch, tokens, heads, headDim]` each. */
export interface Qkv {
  readonly q: Tensor;
  readonly k: Tensor;
  readonly v: Tensor;
}

/**
 * From the projections of one or more streams to the inputs of joint attention (Esser et al. 2024, MM-DiT): QK-norm and
 * rotary embedding of q and k, then the streams' tokens behind one another.
 * Composite: this body of primitives is the eager baseline; a fused kernel may replace it.
 *
 * @param cos `[tokens, headDim]` f32 for the tokens of all streams in their order. @param sin the same.
 * @returns of a single stream `v` is the tensor that was given.
 */
export function jointQkNormRope(streams: readonly QkvStream[], cos: Tensor, sin: Tensor, eps: number): Qkv {
  let start = 0;
  const parts = streams.map(({ q, k, v, normQ, normK }) => {
    const tokens = q.shape[1];
    const tables = [cos, sin].map((table) => table.narrow(0, start, tokens));
    start += tokens;
    const rotated = (x: Tensor, weight: Tensor) => qkNormRope(x, weight, tables[0], tables[1], eps);
    return { q: rotated(q, normQ), k: rotated(k, normK), v };
  });
  if (parts.length === 1) return parts[0];
  return {
    q: concat(parts.map(({ q }) => q), 1),
    k: concat(parts.map(({ k }) => k), 1),
    v: concat(parts.map(({ v }) => v), 1),
  };
}

/**
 * {@link jointQkNormRope} in one kernel a stream on a GPU, rounded once, that writes where the stream's tokens belong;
 * on the CPU the same. Views of q, k and v inside of a wider product are read where they are.
 *
 * @throws ShapeError where the sizes do not fit, for dtypes that differ, or for tables that are not f32.
 */
export function jointQkNormRopeFused(
  streams: readonly QkvStream[],
  cos: Tensor,
  sin: Tensor,
  eps: number,
): Qkv {
  const [first] = streams;
  const gpu = gpuOf(first.q);
  if (gpu === undefined) return jointQkNormRope(streams, cos, sin, eps);
  const [batch, , heads, headDim] = first.q.shape;
  const tokens = streams.reduce((sum, { q }) => sum + q.shape[1], 0);
  expect(headDim % 2 === 0, "jointQkNormRope", () => `head dim ${headDim} is odd`);
  for (const stream of streams) expectStream(stream, first);
  for (const [what, table] of Object.entries({ cos, sin })) {
    expectShape("jointQkNormRope", what, table, [tokens, headDim]);
    expect(table.dtype === "f32", "jointQkNormRope", () => `${what} is ${table}, expected f32`);
  }
  const joint = () => Tensor.empty(gpu, [batch, tokens, heads, headDim], first.q.dtype);
  const [q, k] = [joint(), joint()];
  const v = streams.length === 1 ? undefined : joint();
  let start = 0;
  for (const stream of streams) {
    const length = stream.q.shape[1];
    const part = (dim: number, whole: Tensor) => whole.narrow(dim, start, length);
    turnStream(gpu, stream, part(0, cos), part(0, sin), eps, part(1, q), part(1, k), v && part(1, v));
    start += length;
  }
  return { q, k, v: v ?? first.v };
}

function expectStream({ q, k, v, normQ, normK }: QkvStream, first: QkvStream): void {
  const [batch, , heads, headDim] = first.q.shape;
  expectShape("jointQkNormRope", "q", q, [batch, null, heads, headDim]);
  expectShape("jointQkNormRope", "k", k, q.shape);
  expectShape("jointQkNormRope", "v", v, q.shape);
  expectShape("jointQkNormRope", "normQ", normQ, [headDim]);
  expectShape("jointQkNormRope", "normK", normK, [headDim]);
  const alike = [q, k, v].every(({ dtype }) => dtype === first.q.dtype) && normQ.dtype === normK.dtype;
  expect(alike, "jointQkNormRope", () => `${[q, k, v, normQ, normK].join("; ")} behind ${first.q}`);
}

/** One stream: into its part of q, k and, where it is given, v. */
function turnStream(
  gpu: GpuDevice,
  stream: QkvStream,
  cos: Tensor,
  sin: Tensor,
  eps: number,
  outQ: Tensor,
  outK: Tensor,
  outV: Tensor | undefined,
): void {
  const [batch, tokens, heads, headDim] = outQ.shape;
  gpu.scope(() => {
    const [q, k, v, cosines, sines] = [stream.q, stream.k, stream.v, cos, sin].map(denseRows);
    const norms = [stream.normQ, stream.normK].map(denseRows);
    const aligned = vectorWidth(headDim, [cosines, sines]) > 1;
    const width = aligned ? vectorWidth(headDim, [outQ, outK, outV, q, k, v, ...norms]) : 1;
    const { warpSize } = gpu.limits;
    let lanes = 1;
    while (lanes < warpSize && lanes < headDim / width) lanes *= 2;
    const wanted = Math.min(Math.ceil(heads / HEADS) * lanes, MOST_THREADS);
    const block = Math.ceil(wanted / warpSize) * warpSize;
    launch(gpu, SOURCE, {
      entry: "jointQkNormRope",
      types: { T: outQ.dtype, W: stream.normQ.dtype },
      constants: {
        N: width,
        LANES: lanes,
        VECTORS: Math.ceil(headDim / (width * lanes)),
        HEADS: Math.ceil(heads * lanes / block),
        BLOCK: block,
        COPY_V: outV === undefined ? 0 : 1,
      },
      grid: [tokens, batch],
      block,
      args: [
        outQ,
        outK,
        outV,
        q,
        k,
        v,
        ...norms,
        cosines,
        sines,
        heads,
        headDim,
        new Float(eps),
        ...[outQ.strides[0], ...[q, k, v].flatMap(({ strides }) => strides.slice(0, 3))].map(BigInt),
        BigInt(cosines.strides[0]),
        BigInt(sines.strides[0]),
      ],
    });
  });
}
