import { dtypeBytes } from "../ffi/dtype.ts";
import { ShapeError } from "../ffi/errors.ts";
import { Float, type GpuDevice } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import { type AttentionDType, type QkvTiles, TILE, tilesOf } from "./attention_tiles.ts";
import { expect, expectShape } from "./check.ts";
import FLASH_ATTENTION_CU from "./flash_attention.cu" with { type: "text" };
import { launch } from "./gpu.ts";

const SOURCE = { name: "flash_attention.cu", text: FLASH_ATTENTION_CU };

/** A warpgroup that brings tiles, and two that compute. */
const THREADS = 384;
/** Tiles of k, and of v, in shared memory: what fits beside one of q. */
const STAGES: Record<AttentionDType, number> = { f8e4m3: 4, bf16: 3 };
/** Tiles start at multiples of this. */
const ALIGNMENT = 1024;
/** Rows of split tiles that a block of mergeParts has. */
const MERGED_ROWS = 8;

/** Whether this GPU has the instructions of {@link flashAttention}: Hopper's. */
export function hasFlashAttention({ limits }: GpuDevice): boolean {
  return limits.architecture === "sm_90a";
}

/**
 * Attention from tiles in E4M3 (without scales, as flux-fast has it) or bfloat16; softmax in f32, sums in f32 or, of E4M3, in f16 (Shah et
 * al. 2024, FlashAttention-3). What it computes is attentionReference in attention.ts; the softmax's weights are rounded to the
 * tiles' dtype.
 *
 * @param tiles of `batch * heads` heads.
 * @param out `[batch, queries, heads, 128]` with a dense last dimension and rows at multiples of 16 bytes: bf16, or f8e4m3
 *   of one sample with `outScales`. @param outScales f32 `[queries]`: what each query's results are divided by.
 * @throws ShapeError where the sizes do not fit, or on a GPU without {@link hasFlashAttention}.
 */
export function flashAttention(
  gpu: GpuDevice,
  { q, k, v, keys }: QkvTiles,
  scale: number,
  out: Tensor,
  outScales?: Tensor,
): void {
  const [batch, queries, heads] = out.shape;
  if (!hasFlashAttention(gpu)) throw new ShapeError(`flashAttention: ${gpu.name} is no Hopper GPU`);
  const [queryTiles, keyTiles] = [tilesOf(queries), tilesOf(keys)];
  expectShape("flashAttention", "out", out, [null, null, null, TILE]);
  expectShape("flashAttention", "q", q, [batch * heads, queryTiles, TILE * TILE]);
  expectShape("flashAttention", "k", k, [batch * heads, keyTiles, TILE * TILE]);
  expectShape("flashAttention", "v", v, k.shape);
  const scaled = out.dtype === "f8e4m3" && batch === 1 && outScales !== undefined;
  if (scaled) expectShape("flashAttention", "outScales", outScales, [queries]);
  else expect(out.dtype === "bf16", "flashAttention", () => `out is ${out}, expected bf16`);
  const alike = [k, v].every(({ dtype }) => dtype === q.dtype) && q.dtype in STAGES;
  expect(alike, "flashAttention", () => `tiles are ${q}, ${k} and ${v}, expected one of f8e4m3 and bf16`);
  const stored = out.strides.slice(0, 3).every((stride, dim) =>
    out.shape[dim] === 1 || stride * dtypeBytes(out.dtype) % 16 === 0
  );
  expect(stored && out.pointer % 16n === 0n, "flashAttention", () => `${out} has rows at odd places`);
  if (out.size === 0 || keys === 0) throw new ShapeError(`flashAttention: nothing to attend for ${out}`);
  const bytes = dtypeBytes(q.dtype);
  const stages = STAGES[q.dtype as AttentionDType];
  const { whole, parts, split } = partition(batch * heads * queryTiles, keyTiles, gpu.limits.multiprocessors);
  gpu.scope(() => {
    const rows = split * parts * TILE;
    const partial = rows === 0 ? undefined : Tensor.empty(gpu, [rows, TILE], "f32");
    const moments = rows === 0 ? undefined : Tensor.empty(gpu, [rows, 2], "f32");
    const steps = out.strides.slice(0, 3).map(BigInt);
    const kernel = { types: { O: out.dtype }, constants: { BYTES: bytes, STAGES: stages } };
    launch(gpu, SOURCE, {
      entry: "flashAttention",
      ...kernel,
      grid: whole + split * parts,
      block: THREADS,
      shared: (1 + 2 * stages) * TILE * TILE * bytes + ALIGNMENT,
      args: [
        out,
        outScales,
        partial,
        moments,
        q,
        k,
        v,
        queries,
        queryTiles,
        keys,
        keyTiles,
        heads,
        whole,
        parts,
        ...steps,
        new Float(scale * Math.LOG2E),
      ],
    });
    if (split === 0) return;
    launch(gpu, SOURCE, {
      entry: "mergeParts",
      ...kernel,
      grid: [split, TILE / MERGED_ROWS],
      block: 32 * MERGED_ROWS,
      args: [out, outScales, partial, moments, queries, queryTiles, heads, whole, parts, ...steps],
    });
  });
}

/** Parts that a tile is split into, at most. */
const MOST_PARTS = 8;
/** What each part costs beside its keys, of a tile's time: it starts without keys, and leaves sums to be merged. */
const PART_COST = 0.02;

/**
 * How tiles of queries are given to blocks, of which each multiprocessor has one at a time: `whole` of them to a block each,
 * the other `split` ones, which would leave some multiprocessors idle at the end, to `parts` blocks each, by their keys.
 */
export function partition(
  tiles: number,
  keyTiles: number,
  multiprocessors: number,
): { readonly whole: number; readonly split: number; readonly parts: number } {
  const left = tiles % multiprocessors;
  let [parts, least] = [1, 1];
  for (let p = 2; left > 0 && p <= Math.min(MOST_PARTS, keyTiles); p++) {
    const time = Math.ceil(left * p / multiprocessors) / p + PART_COST * p;
    if (time < least) [parts, least] = [p, time];
  }
  return parts === 1 ? { whole: tiles, split: 0, parts } : { whole: tiles - left, split: left, parts };
}
