import { Float, type GpuDevice } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import { type AttentionDType, emptyTiles, type QkvTiles, TILE, valueTiles } from "./attention_tiles.ts";
import { expect, expectShape } from "./check.ts";
import { concat } from "./concat.ts";
import { denseRows } from "./contiguous.ts";
import { launchTuned } from "./coordinate_descent.ts";
import { gpuOf, launch, vectorWidth } from "./gpu.ts";
import JOINT_QK_NORM_ROPE_CU from "./joint_qk_norm_rope.cu" with { type: "text" };
import { qkNormRope } from "./qk_norm_rope.ts";

const SOURCE = { name: "joint_qk_norm_rope.cu", text: JOINT_QK_NORM_ROPE_CU };
/** Heads of q, and as many of k, that a thread turns with the same part of the tables, if there are so many. */
const HEADS = 2;
/** The same for tiles of v, too, whose rows lie far apart (68 us for 4352 tokens, 73 with two). */
const HEADS_WITH_V = 4;
/** What 07_tuning tries. */
const SHAPES = { perThread: [1, 2, 3, 4] };
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

/** Projections `[batch, tokens, heads * headDim]` of q, k and v by heads, with the weights of their norms. */
export function qkvStream(
  projections: readonly Tensor[],
  heads: number,
  { normQ, normK }: Pick<QkvStream, "normQ" | "normK">,
): QkvStream {
  const [q, k, v] = projections.map((x) => {
    const [batch, tokens, hidden] = x.shape;
    return x.reshape([batch, tokens, heads, hidden / heads]);
  });
  return { q, k, v, normQ, normK };
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
  const shape = expectStreams(streams, cos, sin);
  const joint = () => Tensor.empty(gpu, shape, first.q.dtype);
  const [q, k] = [joint(), joint()];
  const v = streams.length === 1 ? undefined : joint();
  turnStreams(gpu, streams, { cos, sin, eps }, { q, k, v });
  return { q, k, v: v ?? first.v };
}

/** How many streams {@link jointQkNormRopeTiles} takes. */
const MOST_TILED_STREAMS = 2;

/** Whether {@link jointQkNormRopeTiles} takes these streams. */
export function jointQkNormRopeTilesTakes(streams: readonly QkvStream[]): boolean {
  const [{ q }] = streams;
  return gpuOf(q) !== undefined && q.dtype === "bf16" && q.shape[3] === TILE &&
    streams.length <= MOST_TILED_STREAMS;
}

/**
 * {@link jointQkNormRope} to the tiles that flash attention reads: q and k rounded once from f32, in float8 without scales and
 * saturating at 448; v as {@link valueTiles} has it.
 *
 * @param streams that {@link jointQkNormRopeTilesTakes}. @throws ShapeError as {@link jointQkNormRopeFused}.
 */
export function jointQkNormRopeTiles(
  gpu: GpuDevice,
  streams: readonly QkvStream[],
  cos: Tensor,
  sin: Tensor,
  eps: number,
  dtype: AttentionDType,
): QkvTiles {
  const shape = expectStreams(streams, cos, sin);
  const empty = () => emptyTiles(gpu, shape, dtype);
  const [q, k] = [empty(), empty()];
  // In bf16 v lies as it is, and the same kernel copies it; in float8 its tiles are transposed.
  const copied = dtype === "bf16" ? empty() : undefined;
  turnStreams(gpu, streams, { cos, sin, eps }, { q, k, v: copied, tiles: q.shape[1] });
  const v = copied ?? valueTiles(gpu, streams.map((stream) => stream.v) as [Tensor, Tensor]);
  return { q, k, v, keys: shape[1] };
}

/** Checks sizes and dtypes. @returns the shape of what all streams give together. */
function expectStreams(
  streams: readonly QkvStream[],
  cos: Tensor,
  sin: Tensor,
): [batch: number, tokens: number, heads: number, headDim: number] {
  const [first] = streams;
  const [batch, , heads, headDim] = first.q.shape;
  const tokens = streams.reduce((sum, { q }) => sum + q.shape[1], 0);
  expect(headDim % 2 === 0, "jointQkNormRope", () => `head dim ${headDim} is odd`);
  for (const stream of streams) expectStream(stream, first);
  for (const [what, table] of Object.entries({ cos, sin })) {
    expectShape("jointQkNormRope", what, table, [tokens, headDim]);
    expect(table.dtype === "f32", "jointQkNormRope", () => `${what} is ${table}, expected f32`);
  }
  return [batch, tokens, heads, headDim];
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

/** What turns q and k. */
interface Turn {
  readonly cos: Tensor;
  readonly sin: Tensor;
  readonly eps: number;
}

/** Where the streams go, together: tensors `[batch, tokens, heads, headDim]`, or tiles. */
interface Target {
  readonly q: Tensor;
  readonly k: Tensor;
  readonly v?: Tensor | undefined;
  /** Tiles of a head, where it is tiles. */
  readonly tiles?: number;
}

function turnStreams(
  gpu: GpuDevice,
  streams: readonly QkvStream[],
  { cos, sin, eps }: Turn,
  { q, k, v, tiles }: Target,
): void {
  let start = 0;
  streams.forEach((stream, i) => {
    const length = stream.q.shape[1];
    const part = (dim: number, whole: Tensor) => whole.narrow(dim, start, length);
    const turn = { cos: part(0, cos), sin: part(0, sin), eps };
    if (tiles === undefined) {
      turnStream(gpu, stream, turn, { q: part(1, q), k: part(1, k), v: v && part(1, v) }, length, 0);
    } else {
      const last = i === streams.length - 1;
      turnStream(gpu, stream, turn, { q, k, v, tiles }, last ? tiles * TILE - start : length, start);
    }
    start += length;
  });
}

/** One stream: into its part of q, k and, where it is given, v. @param rows of the grid. */
function turnStream(
  gpu: GpuDevice,
  stream: QkvStream,
  { cos, sin, eps }: Turn,
  out: Target,
  rows: number,
  start: number,
): void {
  const [batch, tokens, heads, headDim] = stream.q.shape;
  const tiled = out.tiles !== undefined;
  gpu.scope(() => {
    const [q, k, v, cosines, sines] = [stream.q, stream.k, stream.v, cos, sin].map(denseRows);
    const norms = [stream.normQ, stream.normK].map(denseRows);
    const aligned = vectorWidth(headDim, [cosines, sines]) > 1;
    const outputs = tiled ? [] : [out.q, out.k, out.v];
    const width = aligned ? vectorWidth(headDim, [...outputs, q, k, v, ...norms]) : 1;
    const { warpSize } = gpu.limits;
    let lanes = 1;
    while (lanes < warpSize && lanes < headDim / width) lanes *= 2;
    const types = { T: q.dtype, W: stream.normQ.dtype, O: out.q.dtype };
    const issue = ({ perThread }: { readonly perThread: number }) => {
      const wanted = Math.min(Math.ceil(heads / perThread) * lanes, MOST_THREADS);
      const block = Math.ceil(wanted / warpSize) * warpSize;
      launch(gpu, SOURCE, {
        entry: "jointQkNormRope",
        types,
        constants: {
          N: width,
          LANES: lanes,
          VECTORS: Math.ceil(headDim / (width * lanes)),
          HEADS: Math.ceil(heads * lanes / block),
          BLOCK: block,
          COPY_V: out.v === undefined ? 0 : 1,
          TILES: tiled ? 1 : 0,
        },
        grid: [rows, batch],
        block,
        args: [
          out.q,
          out.k,
          out.v,
          q,
          k,
          v,
          ...norms,
          cosines,
          sines,
          heads,
          headDim,
          new Float(eps),
          ...[out.q.strides[0], ...[q, k, v].flatMap(({ strides }) => strides.slice(0, 3))].map(BigInt),
          BigInt(cosines.strides[0]),
          BigInt(sines.strides[0]),
          tokens,
          start,
          out.tiles ?? 0,
        ],
      });
    };
    const shape = { perThread: tiled && out.v !== undefined ? HEADS_WITH_V : HEADS };
    const key = `jointQkNormRope ${Object.values(types)} ${q} ${out.v} ${out.tiles} by ${width}`;
    launchTuned(gpu, { key, out: out.q, inputs: [q, k, v], start: shape, values: SHAPES, issue });
  });
}
