import { dtypeBytes } from "../ffi/dtype.ts";
import { ShapeError } from "../ffi/errors.ts";
import { Float, type GpuDevice } from "../ffi/gpu.ts";
import type { Tensor } from "../ffi/tensor.ts";
import { type AttentionDType, emptyTiles, type QkvTiles, TILE } from "./attention_tiles.ts";
import { expect, expectShape } from "./check.ts";
import { launchTuned } from "./coordinate_descent.ts";
import { hasFlashAttention } from "./flash_attention.ts";
import FUSED_LINEAR_CU from "./fused_linear.cu" with { type: "text" };
import { launch } from "./gpu.ts";

const SOURCE = { name: "fused_linear.cu", text: FUSED_LINEAR_CU };

/** A warpgroup that brings tiles and finishes sums, and two that multiply. */
const THREADS = 384;
/** Rows of a block's tile, and of the two of a cluster. */
const TILE_ROWS = 128;
const PAIR_ROWS = 2 * TILE_ROWS;
/** Of the summed dimension, in a tile. */
const TILE_BYTES = 128;
/** What a block keeps of its shared memory for barriers, and to start tiles at multiples of 1024. */
const RESERVED = 2048;
/** Behind a row of finished sums. */
const SUM_PADDING = 16;
/** Columns of a tile: the first is the most efficient, the others fill the last round of tiles better. */
const WIDTHS = [256, 208];
/** Slabs of rows that 07_tuning tries. */
const SLABS = [1, 2, 3, 4];
/** Bytes of rows that stay in the L2 cache while weights go by: some 50 MB in two halves, which both hold what both read. */
const CACHED_BYTES = 16e6;

/** What becomes of the sums, as fused_linear.cu numbers it. */
const EPILOGUES = { linear: 0, residual: 1, gelu: 2, qkv: 3, qkvGelu: 4 } as const;
type Epilogue = keyof typeof EPILOGUES;

/**
 * A matrix in bfloat16, or in E4M3 with a scale for each row: then as {@link quantizeRows} or {@link outputScales} scale rows of `x`, and
 * {@link quantizeWeightRows} those of weights, so that sums stay within f16.
 */
export interface FusedOperand {
  readonly values: Tensor;
  readonly scales?: Tensor | undefined;
}

/** A Linear layer of one stream of tokens. */
export interface FusedLayer {
  /** `[rows, k]`. */
  readonly x: FusedOperand;
  /** `[columns, k]`, of the same dtype. */
  readonly weight: FusedOperand;
  /** `[columns]` bf16. */
  readonly bias?: Tensor | undefined;
}

/** What an epilogue takes of a stream, beside its layer. */
interface StreamEnd {
  readonly out?: Tensor;
  readonly residual?: Tensor;
  readonly gate?: Tensor;
  readonly outScales?: Tensor | undefined;
  readonly normQ?: Tensor;
  readonly normK?: Tensor;
}

/** What all streams have in common. */
interface JointEnd {
  readonly tiles?: QkvTiles;
  readonly pairs?: Tensor;
  readonly hidden?: number;
  readonly eps?: number;
}

/** How the kernel's work is shared out. */
export interface FusedShape {
  /** Columns of a tile. */
  readonly width: number;
  /** Into how many slabs of rows the work is cut, one after the other. */
  readonly slabs: number;
}

/** One or two layers, whose sizes but for their rows are the same. */
export type Layers<L> = readonly [L] | readonly [L, L];

/** What rows of bytes are multiples of, for copies of tiles and for stores. */
const ROW_MULTIPLE = 16;
/** Columns that a thread finishes. */
const COLUMNS = 8;

/** Whether {@link fusedQkv} takes heads of 128 in so many dimensions, from as many of the input. */
export function fusedQkvTakes(hidden: number, k: number): boolean {
  return hidden % WIDTHS[0] === 0 && k % ROW_MULTIPLE === 0;
}

/** Whether {@link fusedGelu}, and the MLP beside {@link fusedQkv}, take so many columns. */
export function fusedGeluTakes(columns: number, k: number): boolean {
  return columns % COLUMNS === 0 && k % ROW_MULTIPLE === 0;
}

/** `x weight^T + bias` into `out` `[rows, columns]` bf16 with dense rows. */
export function fusedLinear(
  gpu: GpuDevice,
  layers: Layers<FusedLayer & { readonly out: Tensor }>,
  shape?: FusedShape,
): void {
  issue(gpu, "linear", layers, {}, shape);
}

/**
 * `residual + gate * (x weight^T + bias)` into `out`.
 *
 * @param layers with `residual` and `out` `[rows, columns]` bf16 with dense rows, which may be the same, and `gate`
 *   `[columns]` bf16.
 */
export function fusedResidual(
  gpu: GpuDevice,
  layers: Layers<FusedLayer & { readonly residual: Tensor; readonly gate: Tensor; readonly out: Tensor }>,
  shape?: FusedShape,
): void {
  issue(gpu, "residual", layers, {}, shape);
}

/**
 * {@link geluTanh} of `x weight^T + bias` into `out`, in float8 divided by `outScales` `[rows]`, f32.
 */
export function fusedGelu(
  gpu: GpuDevice,
  layers: Layers<FusedLayer & { readonly out: Tensor; readonly outScales?: Tensor | undefined }>,
  shape?: FusedShape,
): void {
  issue(gpu, "gelu", layers, {}, shape);
}

/** What {@link fusedQkv} takes of a stream. */
export interface QkvLayer extends FusedLayer {
  /** `[128]` bf16: weights of QK-norm. */
  readonly normQ: Tensor;
  readonly normK: Tensor;
}

/** The MLP beside attention: where GELU of its columns goes, `[rows, columns]`, as {@link fusedGelu} has it. */
export interface MlpEnd {
  readonly out: Tensor;
  readonly outScales?: Tensor | undefined;
}

/**
 * q, k and v of streams whose tokens lie behind one another, to the tiles that flash attention reads: QK-norm and rotary
 * embedding of q and k, all rounded once.
 *
 * @param layers with `3 * hidden` columns, q's, k's and v's. All but the last have a multiple of 128 rows.
 * @param pairs from {@link rotaryPairs}, of the tokens of all streams in their order.
 * @param mlp of a single stream, whose layer has its columns behind those of v.
 */
export function fusedQkv(
  gpu: GpuDevice,
  layers: Layers<QkvLayer>,
  { heads, pairs, eps, dtype, mlp }: {
    readonly heads: number;
    readonly pairs: Tensor;
    readonly eps: number;
    /** What attention multiplies in. */
    readonly dtype: AttentionDType;
    readonly mlp?: MlpEnd | undefined;
  },
  shape?: FusedShape,
): QkvTiles {
  const tokens = layers.reduce((sum, { x }) => sum + x.values.shape[0], 0);
  expectShape("fusedQkv", "pairs", pairs, [tokens, TILE / 2, 2]);
  const empty = () => emptyTiles(gpu, [1, tokens, heads], dtype);
  const tiles = { q: empty(), k: empty(), v: empty(), keys: tokens };
  const ends = layers.map((layer) => ({ ...layer, ...mlp })) as unknown as typeof layers;
  const hidden = heads * TILE;
  issue(gpu, mlp === undefined ? "qkv" : "qkvGelu", ends, { tiles, pairs, hidden, eps }, shape);
  return tiles;
}

function issue(
  gpu: GpuDevice,
  epilogue: Epilogue,
  layers: Layers<FusedLayer & StreamEnd>,
  { tiles, pairs: turns, hidden = 0, eps = 0 }: JointEnd,
  given?: FusedShape,
): void {
  const [first] = layers;
  if (!hasFlashAttention(gpu)) throw new ShapeError(`fusedLinear: ${gpu.name} is no Hopper GPU`);
  for (const layer of layers) expectLayer(layer, first, epilogue);
  const { dtype } = first.x.values;
  const bytes = dtypeBytes(dtype);
  const [columns, k] = first.weight.values.shape;
  let start = 0;
  const streams = layers.map((layer) => {
    const rows = layer.x.values.shape[0];
    const fields = streamFields(layer, rows, start);
    start += rows;
    return fields;
  });
  const pairs = layers.map(({ x }) => Math.ceil(x.values.shape[0] / PAIR_ROWS));
  const total = pairs.reduce((sum, count) => sum + count, 0);
  const sizes = [tiles?.q.shape[1] ?? 0, hidden, first.out?.strides[0] ?? 0, first.residual?.strides[0] ?? 0];
  const issueAs = ({ width, slabs }: FusedShape) => {
    const stageBytes = (TILE_ROWS + width) * TILE_BYTES;
    const sumBytes = TILE_ROWS * (2 * width + SUM_PADDING);
    const stages = Math.floor((gpu.limits.sharedBytesPerBlock - RESERVED - sumBytes) / stageBytes);
    const maps = layers.map(({ x, weight }) => [
      gpu.tensorMap(x.values, TILE_ROWS),
      gpu.tensorMap(weight.values, width / 2),
    ]);
    const columnTiles = Math.ceil(columns / width);
    const clusters = Math.min(Math.floor(gpu.limits.multiprocessors / 2), total * columnTiles);
    launch(gpu, SOURCE, {
      entry: "fusedLinear",
      types: {},
      constants: {
        BYTES: bytes,
        TILED_BYTES: tiles === undefined ? bytes : dtypeBytes(tiles.q.dtype),
        TILE_N: width,
        STAGES: stages,
        EPILOGUE: EPILOGUES[epilogue],
      },
      grid: 2 * clusters,
      block: THREADS,
      shared: stages * stageBytes + sumBytes + 1024,
      args: [
        ...maps[0],
        ...maps[maps.length - 1],
        streams[0],
        streams[streams.length - 1],
        [tiles?.q, tiles?.k, tiles?.v, turns, ...sizes.map(BigInt)],
        pairs[0],
        total,
        Math.ceil(total / slabs),
        columns,
        columnTiles,
        Math.ceil(k * bytes / TILE_BYTES),
        new Float(eps),
      ],
    });
  };
  if (given !== undefined) return issueAs(given);
  const widths = epilogue === "linear" || epilogue === "residual" ? WIDTHS : WIDTHS.slice(0, 1);
  launchTuned(gpu, {
    key: `fusedLinear ${epilogue} ${layers.map(({ x }) => x.values)} ${first.weight.values} ${tiles?.q}`,
    out: first.out ?? tiles!.q,
    inputs: layers.flatMap(({ x, weight, residual = x.values }) => [x.values, weight.values, residual]),
    start: { width: widthFor(gpu, columns, widths), slabs: slabsFor(start * k * bytes) },
    values: { width: widths, slabs: SLABS },
    issue: issueAs,
  });
}

/** Checks sizes, dtypes and places of a stream's operands; `first` is the first stream's. */
function expectLayer(layer: FusedLayer & StreamEnd, first: FusedLayer & StreamEnd, epilogue: Epilogue): void {
  const { x, weight, bias, out, residual, gate, outScales, normQ, normK } = layer;
  const { values: { dtype, shape: [columns, k] } } = first.weight;
  const [rows] = x.values.shape;
  const bytes = dtypeBytes(dtype);
  const float8 = dtype === "f8e4m3";
  const shape = (what: string, tensor: Tensor, wanted: readonly (number | null)[]) =>
    expectShape("fusedLinear", what, tensor, wanted);
  const must = (holds: boolean, message: () => string) => expect(holds, "fusedLinear", message);
  shape("x", x.values, [null, k]);
  shape("weight", weight.values, [columns, k]);
  must(float8 || dtype === "bf16", () => `takes bf16 and f8e4m3, not ${weight.values}`);
  must(
    x.values.dtype === dtype && weight.values.dtype === dtype,
    () => `x is ${x.values}, weight ${weight.values}`,
  );
  must(
    k * bytes % ROW_MULTIPLE === 0 && columns % COLUMNS === 0,
    () => `${weight.values}: rows at odd places`,
  );
  must(rows > 0, () => `x is empty: ${x.values}`);
  for (const [what, { values, scales }] of Object.entries({ x, weight })) {
    const dense = values.strides[1] === 1 && values.strides[0] * bytes % ROW_MULTIPLE === 0;
    must(dense && values.pointer % 16n === 0n, () => `${what} has rows at odd places: ${values}`);
    must((scales !== undefined) === float8, () => `${what} is ${values}, with scales: ${scales}`);
    if (scales !== undefined) shape(`${what}'s scales`, scales, [values.shape[0]]);
  }
  for (const [what, vector] of Object.entries({ bias, gate })) {
    if (vector === undefined) continue;
    must(
      vector.size === columns && vector.dtype === "bf16",
      () => `${what} is ${vector}, of ${columns} columns`,
    );
  }
  for (const [what, weights] of Object.entries({ normQ, normK })) {
    if (weights !== undefined) shape(what, weights, [TILE]);
  }
  if (residual !== undefined && epilogue === "residual") shape("residual", residual, [rows, columns]);
  if (out === undefined) return;
  const stored = float8 && (epilogue === "gelu" || epilogue === "qkvGelu") ? "f8e4m3" : "bf16";
  must(
    out.dtype === stored && out.shape[0] === rows,
    () => `out is ${out}, expected ${rows} rows of ${stored}`,
  );
  must((outScales !== undefined) === (stored === "f8e4m3"), () => `out is ${out}, with scales: ${outScales}`);
  const alignment = COLUMNS * dtypeBytes(stored);
  const placed = out.strides[1] === 1 && out.strides[0] * dtypeBytes(stored) % alignment === 0;
  must(placed && out.pointer % BigInt(alignment) === 0n, () => `out has rows at odd places: ${out}`);
  must(out.strides[0] === first.out?.strides[0], () => `outs have different rows: ${out}, ${first.out}`);
}

/** The members of fused_linear.cu's Stream. */
function streamFields(
  { x, weight, bias, out, residual, gate, outScales, normQ, normK }: FusedLayer & StreamEnd,
  rows: number,
  start: number,
): (Tensor | undefined | bigint)[] {
  return [
    x.scales,
    weight.scales,
    bias,
    out,
    residual,
    gate,
    outScales,
    normQ,
    normK,
    BigInt(rows),
    BigInt(start),
  ];
}

/**
 * The width that leaves the least to wait for in the last round of tiles, for FLUX's 4352 tokens: whatever the rows are, since
 * each width is compiled, and pictures of another size are to compile nothing.
 */
function widthFor(gpu: GpuDevice, columns: number, widths: readonly number[]): number {
  const pairs = 17;
  const clusters = Math.floor(gpu.limits.multiprocessors / 2);
  const cost = (width: number) => Math.ceil(pairs * Math.ceil(columns / width) / clusters) * width;
  return widths.reduce((best, width) => cost(width) < cost(best) ? width : best);
}

/** Two slabs where the rows are more than what stays in the cache beside the rest. */
function slabsFor(bytes: number): number {
  return bytes <= CACHED_BYTES ? 1 : 2;
}

/**
 * `x weight^T + bias`, row-major `[rows, columns]`: what all epilogues start from, of dequantized numbers. The kernel rounds
 * each sum to bfloat16 before its bias, and sums of float8 to f16 all along.
 *
 * @param x `[rows, k]`. @param weight `[columns, k]`. @param bias `[columns]`.
 */
export function fusedLinearReference(
  x: Float32Array,
  weight: Float32Array,
  k: number,
  bias?: Float32Array,
): Float32Array {
  const columns = weight.length / k;
  return Float32Array.from({ length: x.length / k * columns }, (_, i) => {
    const [row, column] = [Math.floor(i / columns), i % columns];
    let sum = 0;
    for (let j = 0; j < k; j++) sum += x[row * k + j] * weight[column * k + j];
    return sum + (bias?.[column] ?? 0);
  });
}
