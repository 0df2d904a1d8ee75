import type { GpuDevice } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import ATTENTION_TILES_CU from "./attention_tiles.cu" with { type: "text" };
import { denseRows } from "./contiguous.ts";
import { float32ToFloat8 } from "../ffi/float8.ts";
import { launch, vectorWidth } from "./gpu.ts";

const SOURCE = { name: "attention_tiles.cu", text: ATTENTION_TILES_CU };

/** Tokens of a tile, and dimensions of a head. */
export const TILE = 128;
/** Bytes of a piece, which the swizzle moves as a whole. */
const PIECE = 16;
const THREADS = 256;

/** Whose tiles they are: k's rows are permuted, v is transposed. */
export type TileKind = "query" | "key" | "value";

/**
 * Casts to E4M3 as it is, saturating at 448, and lays out in the tiles that flashAttentionFloat8 reads.
 *
 * @param x `[batch, tokens, heads, 128]` f32 or bf16. @returns u8 `[batch * heads, tiles, 128 * 128]`; tokens behind the
 *   last one are 0.
 */
export function attentionTiles(gpu: GpuDevice, kind: TileKind, x: Tensor): Tensor {
  const [batch, tokens, heads] = x.shape;
  const tiles = Math.ceil(tokens / TILE);
  const out = Tensor.empty(gpu, [batch * heads, tiles, TILE * TILE], "u8");
  gpu.scope(() => {
    const rows = denseRows(x);
    launch(gpu, SOURCE, {
      entry: `${kind}Tiles`,
      types: { T: x.dtype },
      constants: { N: vectorWidth(TILE, [rows]) },
      grid: [tiles, heads, batch],
      block: THREADS,
      args: [out, rows, tokens, ...rows.strides.slice(0, 3).map(BigInt)],
    });
  });
  return out;
}

/** `x` dense `[batch, tokens, heads, 128]`; `out` as {@link attentionTiles} returns it. */
export function attentionTilesReference(
  out: Uint8Array,
  x: Float32Array,
  kind: TileKind,
  tokens: number,
  heads: number,
): void {
  const codes = new Uint8Array(x.length);
  float32ToFloat8(x, codes);
  out.fill(0);
  const tiles = Math.ceil(tokens / TILE);
  for (let i = 0; i < x.length; i++) {
    const dimension = i % TILE;
    const head = Math.floor(i / TILE) % heads;
    const token = Math.floor(i / (TILE * heads)) % tokens;
    const sample = Math.floor(i / (TILE * heads * tokens));
    const inTile = token % TILE;
    const [row, byte] = kind === "value"
      ? [dimension, inTile]
      : [kind === "key" ? permutedRow(inTile) : inTile, dimension];
    const piece = Math.floor(byte / PIECE) ^ row % 8;
    const tile = (sample * heads + head) * tiles + Math.floor(token / TILE);
    out[tile * TILE * TILE + row * TILE + piece * PIECE + byte % PIECE] = codes[i];
  }
}

/** Where a tile of keys has a token: token `4 t + 2 b + e` of 16 in row `8 b + 2 t + e`. */
function permutedRow(token: number): number {
  const [place, t, b, e] = [token % 16, token % 16 >> 2, token % 4 >> 1, token % 2];
  return token - place + 8 * b + 2 * t + e;
}
