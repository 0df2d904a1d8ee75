import type { DType } from "../ffi/dtype.ts";
import type { GpuDevice, GpuLimits, KernelArgument, KernelSource } from "../ffi/gpu.ts";
import type { Tensor } from "../ffi/tensor.ts";
import { contiguous } from "./contiguous.ts";
import { launchTuned } from "./coordinate_descent.ts";
import { launch } from "./gpu.ts";
import { RESIDENT_THREADS } from "./launch_shapes.ts";

/** Threads of a block whose rows take a warp or less each: some rows a block, so that blocks are not too many. */
const SMALL_BLOCK = 128;
/** The most threads that a block has on any GPU. */
const LARGEST_BLOCK = 1024;

/** What a kernel that works on rows is compiled for and started with; see `rowSum` in common.cuh. */
export interface RowLaunch {
  readonly constants: {
    /** Threads that share a row: a part of a warp, or the whole block. */
    readonly THREADS: number;
    /** Threads of a block. */
    readonly BLOCK: number;
    /** Vectors that each thread holds of its row, at most. */
    readonly VECTORS: number;
  };
  readonly grid: number;
  readonly block: number;
}

/** Vectors of a long row that a thread holds: with more it has too few neighbours, with fewer too many to wait for. */
const HELD = 3;
/** What 07_tuning tries instead. */
const HELD_VALUES = [1, 2, 3, 4, 6];

/**
 * Shares rows of `vectors` vectors among threads. A row of up to a warp's width takes a part of the warp, with one
 * vector a thread; one of up to four times that takes a warp; a longer one takes a block, with `held` vectors a thread.
 * Where there are so few rows that all their vectors are on their way at once, a thread has one of them. Only rows of
 * more than 3072 vectors take more than four. (Measured: docs/performance.md.)
 */
export function rowLaunch(
  { warpSize, multiprocessors }: GpuLimits,
  rows: number,
  vectors: number,
  held = HELD,
): RowLaunch {
  let threads = 1;
  while (threads < warpSize && threads < vectors) threads *= 2;
  const few = rows * vectors <= multiprocessors * RESIDENT_THREADS;
  if (vectors > (few ? 1 : 4) * warpSize) {
    const wanted = Math.ceil(vectors / ((few ? 1 : held) * warpSize)) * warpSize;
    threads = Math.min(LARGEST_BLOCK, wanted);
  }
  const block = threads <= warpSize ? SMALL_BLOCK : threads;
  return {
    constants: { THREADS: threads, BLOCK: block, VECTORS: Math.ceil(vectors / threads) },
    grid: Math.ceil(rows * threads / block),
    block,
  };
}

/** A kernel that works on rows, shared out by {@link rowLaunch}. */
export interface RowKernel {
  readonly entry: string;
  readonly types: Readonly<Record<string, DType>>;
  /** Beside those of {@link RowLaunch}. */
  readonly constants?: Readonly<Record<string, number>>;
  readonly rows: number;
  /** Elements of a row, and how many of them move at a time: the constant `N`. */
  readonly length: number;
  readonly width: number;
  /** Samples of so many rows each, for kernels whose grid has them along y. */
  readonly batch?: number;
  /** Vectors that a thread holds of a long row without measuring; three when left out. */
  readonly held?: number;
  readonly out: Tensor;
  readonly inputs: readonly Tensor[];
  readonly args: readonly KernelArgument[];
}

/** Launches a kernel that works on rows, shared out as {@link rowLaunch} says or as 07_tuning finds fastest. */
export function launchRows(gpu: GpuDevice, source: KernelSource, kernel: RowKernel): void {
  const { entry, types, constants: own, rows, length, width, batch, held = HELD, out, inputs, args } = kernel;
  const issue = ({ held }: { readonly held: number }) => {
    const { constants, grid, block } = rowLaunch(gpu.limits, rows, length / width, held);
    launch(gpu, source, {
      entry,
      types,
      constants: { ...constants, ...own, N: width },
      grid: batch === undefined ? grid : [grid, batch],
      block,
      args,
    });
  };
  const key = `${source.name}:${entry} ${Object.values(types)} ${batch} x ${rows} x ${length} by ${width}`;
  launchTuned(gpu, { key, out, inputs, start: { held }, values: { held: HELD_VALUES }, issue });
}

/**
 * The rows (last dimension) of a tensor, as a kernel finds them: row `r` starts at
 * `floor(r / inner) * outerStride + (r % inner) * innerStride`.
 */
export interface Rows {
  /** The tensor itself, or a dense copy where its strides do not come down to two. */
  readonly source: Tensor;
  readonly count: number;
  readonly inner: number;
  readonly outerStride: number;
  readonly innerStride: number;
}

/** Finds the {@link Rows} of `x`, each of which is dense. A copy lasts as long as the scope around. */
export function rowsOf(x: Tensor): Rows {
  const hidden = x.shape.at(-1)!;
  const levels: { size: number; stride: number }[] = [];
  for (const [dim, size] of x.shape.slice(0, -1).entries()) {
    if (size === 1) continue;
    const stride = x.strides[dim];
    const outer = levels.at(-1);
    if (outer !== undefined && outer.stride === size * stride) {
      levels[levels.length - 1] = { size: outer.size * size, stride };
    } else levels.push({ size, stride });
  }
  const dense = hidden === 1 || x.strides.at(-1) === 1;
  if (!dense || levels.length > 2) return rowsOf(contiguous(x));
  const inner = levels.at(-1) ?? { size: 1, stride: hidden };
  const outerStride = levels.length === 2 ? levels[0].stride : 0;
  return { source: x, count: x.size / hidden, inner: inner.size, outerStride, innerStride: inner.stride };
}
