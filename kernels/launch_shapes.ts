import type { Dim3, GpuDevice } from "../ffi/gpu.ts";
import { blockSize } from "./gpu.ts";

/** Pieces that a thread of a memory-bound kernel loads before it uses the first: what hides the memory's latency. */
export const IN_FLIGHT = 4;
/** Threads that one multiprocessor has at a time. */
export const RESIDENT_THREADS = 2048;

/** Blocks that a grid can have along y; where there are more rows, a block takes several. */
export const MOST_BLOCKS_Y = 65535;

/** {@link IN_FLIGHT}, or half of it where `pieces` are so few that every multiprocessor would get hardly any blocks. */
export function inFlight({ limits }: GpuDevice, pieces: number): number {
  return pieces < IN_FLIGHT * limits.multiprocessors * RESIDENT_THREADS ? IN_FLIGHT / 2 : IN_FLIGHT;
}

/**
 * How a kernel covers `[batch, tokens, hidden]` when a thread keeps `N` neighbouring columns and walks `ROWS` tokens.
 *
 * @param width `N`, a divisor of hidden.
 */
export function tokenLaunch(
  gpu: GpuDevice,
  [batch, tokens, hidden]: readonly number[],
  width: number,
): { constants: { N: number; ROWS: number }; grid: Dim3; block: number } {
  const columns = hidden / width;
  const block = blockSize(gpu, columns, 128);
  return {
    constants: { N: width, ROWS: IN_FLIGHT },
    grid: [Math.ceil(tokens / IN_FLIGHT), Math.ceil(columns / block), batch],
    block,
  };
}

/** 256 threads: x for the `items` of a row, a power of two, and y for several short rows. */
export function rowBlock(items: number): readonly [x: number, y: number] {
  let x = 1;
  while (x < items && x < 256) x *= 2;
  return [x, 256 / x];
}

/** Bytes, 16 at most, that may move at a time where all of `values` are addresses, sizes and strides in bytes. */
export function wordBytes(values: readonly (number | bigint)[]): number {
  let word = 16;
  while (values.some((value) => BigInt(value) % BigInt(word) !== 0n)) word /= 2;
  return word;
}
