import { float32ToBfloat16 } from "../ffi/bfloat16.ts";
import { dtypeBytes } from "../ffi/dtype.ts";
import { float32ToFloat8 } from "../ffi/float8.ts";
import type { GpuDevice } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import { denseRows } from "./contiguous.ts";
import { launch, vectorWidth } from "./gpu.ts";
import VALUE_TILES_CU from "./value_tiles.cu" with { type: "text" };

const SOURCE = { name: "value_tiles.cu", text: VALUE_TILES_CU };

/** Tokens of a tile, and dimensions of a head. */
export const TILE = 128;
/** Bytes of a row of a tile, or of its half, and how many rows there are. */
const ROW_BYTES = 128;
/** Bytes of a piece, which the swizzle moves as a whole. */
const PIECE = 16;
const THREADS = 256;

/** What v is multiplied by in tiles of float8, so that attention can sum in f16: flash_attention.cu says how. */
export const FLOAT8_VALUE_FACTOR = 1 / 8;

/** What attention multiplies in, by our kernel as by FlashAttention-3. */
export type AttentionDType = "f8e4m3" | "bf16";

/**
 * What flash_attention.cu reads: q, k and v in tiles of 128 tokens of a head, `[batch * heads, tiles, 128 * 128]` of one
 * {@link AttentionDType} each, and how many keys they have. In bf16 a tile is two halves of 64 dimensions. A row has 128 bytes,
 * and its pieces of 16 are swizzled: piece c of row r stands at c ^ (r % 8). Rows are tokens, but for float8: there k's are
 * permuted in groups of 16 (row 8 b + 2 t + e has token 4 t + 2 b + e), and v's are dimensions, whose values are multiplied by
 * {@link FLOAT8_VALUE_FACTOR}. Tokens behind the last one are 0.
 */
export interface QkvTiles {
  readonly q: Tensor;
  readonly k: Tensor;
  readonly v: Tensor;
  readonly keys: number;
}

/** Whose tiles they are. */
export type TileKind = "query" | "key" | "value";

/** How many tiles a head's tokens take. */
export function tilesOf(tokens: number): number {
  return Math.ceil(tokens / TILE);
}

/** Tiles `[batch * heads, tiles, 128 * 128]`, uninitialized. */
export function emptyTiles(
  gpu: GpuDevice,
  [batch, tokens, heads]: readonly number[],
  dtype: AttentionDType,
): Tensor {
  return Tensor.empty(gpu, [batch * heads, tilesOf(tokens), TILE * TILE], dtype);
}

/**
 * Values as float8 tiles: times {@link FLOAT8_VALUE_FACTOR} cast to E4M3, saturating at 448.
 *
 * @param streams one or two tensors `[batch, tokens, heads, 128]` of one dtype, f32 or bf16, whose tokens lie behind one
 *   another.
 */
export function valueTiles(gpu: GpuDevice, streams: readonly [Tensor] | readonly [Tensor, Tensor]): Tensor {
  const [batch, first, heads] = streams[0].shape;
  const tokens = streams.reduce((sum, { shape }) => sum + shape[1], 0);
  const out = emptyTiles(gpu, [batch, tokens, heads], "f8e4m3");
  gpu.scope(() => {
    const [x, y = x] = streams.map(denseRows);
    launch(gpu, SOURCE, {
      entry: "valueTiles",
      types: { T: x.dtype },
      constants: { N: vectorWidth(TILE, [x, y]) },
      grid: [out.shape[1], heads, batch],
      block: THREADS,
      args: [out, x, tokens, ...stepsOf(x), y, first, ...stepsOf(y)],
    });
  });
  return out;
}

/** Strides of sample, token and head. */
function stepsOf({ strides }: Tensor): bigint[] {
  return strides.slice(0, 3).map(BigInt);
}

/**
 * Tiles of q, k or v: `x` dense `[batch, tokens, heads, 128]`, `out` the bytes of all tiles.
 */
export function attentionTilesReference(
  out: Uint8Array<ArrayBuffer>,
  x: Float32Array,
  kind: TileKind,
  tokens: number,
  heads: number,
  dtype: AttentionDType,
): void {
  out.fill(0);
  const bytes = dtypeBytes(dtype);
  const codes = bytes === 1 ? new Uint8Array(x.length) : new Uint16Array(x.length);
  const factor = kind === "value" ? FLOAT8_VALUE_FACTOR : 1;
  if (codes instanceof Uint8Array) float32ToFloat8(x.map((value) => value * factor), codes);
  else float32ToBfloat16(x, codes);
  const elements = bytes === 1 ? out : new Uint16Array(out.buffer, out.byteOffset, out.length / 2);
  const tiles = tilesOf(tokens);
  for (let i = 0; i < x.length; i++) {
    const dimension = i % TILE;
    const head = Math.floor(i / TILE) % heads;
    const token = Math.floor(i / (TILE * heads)) % tokens;
    const sample = Math.floor(i / (TILE * heads * tokens));
    const inTile = token % TILE;
    const [row, column] = bytes === 2
      ? [inTile, dimension]
      : kind === "value"
      ? [dimension, inTile]
      : [kind === "key" ? permutedRow(inTile) : inTile, dimension];
    const half = Math.floor(column * bytes / ROW_BYTES);
    const byte = column * bytes % ROW_BYTES;
    const piece = Math.floor(byte / PIECE) ^ row % 8;
    const tile = (sample * heads + head) * tiles + Math.floor(token / TILE);
    const at = ((tile * bytes + half) * TILE + row) * ROW_BYTES + piece * PIECE + byte % PIECE;
    elements[at / bytes] = codes[i];
  }
}

/** Where a tile of keys has a token: token `4 t + 2 b + e` of 16 in row `8 b + 2 t + e`. */
function permutedRow(token: number): number {
  const [place, t, b, e] = [token % 16, token % 16 >> 2, token % 4 >> 1, token % 2];
  return token - place + 8 * b + 2 * t + e;
}
