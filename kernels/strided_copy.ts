import { dtypeBytes } from "../ffi/dtype.ts";
import { ShapeError } from "../ffi/errors.ts";
import type { GpuDevice } from "../ffi/gpu.ts";
import type { Tensor } from "../ffi/tensor.ts";
import { launch } from "./gpu.ts";
import { IN_FLIGHT, rowBlock, wordBytes } from "./launch_shapes.ts";
import STRIDED_COPY_CU from "./strided_copy.cu" with { type: "text" };
import TRANSPOSE_CU from "./transpose.cu" with { type: "text" };

const ROWS_SOURCE = { name: "strided_copy.cu", text: STRIDED_COPY_CU };
const TRANSPOSE_SOURCE = { name: "transpose.cu", text: TRANSPOSE_CU };

/** A dimension of both tensors with its strides in elements. */
interface Dimension {
  readonly size: number;
  readonly to: number;
  readonly from: number;
}

/** Dimensions that copyRows numbers its rows by, and transposeTiles its pairs of dimensions. */
const ROWS_OUTER = 5;
const TRANSPOSE_OUTER = 4;
/** A shorter dimension leaves most of a transposed tile empty; a longer one does not fit into the kernel's ints. */
const SHORTEST_SIDE = 8;
const LONGEST_SIDE = 2 ** 30;
const TILE = 32;
const INT_MAX = 2 ** 31 - 1;

/**
 * Copies the elements of `x` bit by bit into `out` of the same shape and dtype on a GPU; both may be strided, and they
 * share no memory. The counterpart of the CPU's copyStrided.
 *
 * Throws {@link ShapeError} for more than 6 dimensions that do not lie densely behind one another, and for more than
 * 2^31 - 1 rows.
 */
export function copyStridedOnGpu(gpu: GpuDevice, out: Tensor, x: Tensor): void {
  if (x.size === 0) return;
  const dims = mergedDimensions(out, x);
  const fitting = dims.filter(({ size }) => size >= SHORTEST_SIDE && size <= LONGEST_SIDE);
  const a = fitting.find(({ from }) => from === 1);
  const b = fitting.find(({ to }) => to === 1);
  const outer = dims.filter((dim) => dim !== a && dim !== b);
  const transposed = a !== undefined && b !== undefined && a !== b && outer.length <= TRANSPOSE_OUTER &&
    dtypeBytes(x.dtype) <= 4;
  if (transposed) transposeTiles(gpu, out, x, a, b, outer);
  else copyRows(gpu, out, x, dims);
}

/** Dimensions from the outermost to the innermost, without those of size 1; neighbours that are dense are one. */
function mergedDimensions(out: Tensor, x: Tensor): Dimension[] {
  const dims: Dimension[] = [];
  x.shape.forEach((size, dim) => {
    if (size === 1) return;
    const inner = { size, to: out.strides[dim], from: x.strides[dim] };
    const last = dims.at(-1);
    const dense = last !== undefined && last.to === inner.to * size && last.from === inner.from * size;
    if (dense) dims[dims.length - 1] = { ...inner, size: last.size * size };
    else dims.push(inner);
  });
  return dims;
}

function copyRows(gpu: GpuDevice, out: Tensor, x: Tensor, dims: readonly Dimension[]): void {
  const size = dtypeBytes(x.dtype);
  const row = dims.at(-1) ?? { size: 1, to: 1, from: 1 };
  const outer = dims.slice(0, -1);
  const rows = outer.reduce((product, dim) => product * dim.size, 1);
  const inBytes = outer.map((dim) => ({ size: dim.size, to: dim.to * size, from: dim.from * size }));
  const dense = row.to === 1 && row.from === 1;
  const bytes = dense
    ? wordBytes([out.pointer, x.pointer, row.size * size, ...inBytes.flatMap(({ to, from }) => [to, from])])
    : size;
  const words = row.size * size / bytes;
  if (outer.length > ROWS_OUTER || rows > INT_MAX || words > INT_MAX) {
    throw new ShapeError(`copy: ${x} with strides [${x.strides.join(", ")}] has too many rows or dimensions`);
  }
  const block = rowBlock(words);
  const COLUMNS = words > 2 * block[0] ? IN_FLIGHT : words > block[0] ? 2 : 1;
  const ROWS = IN_FLIGHT / COLUMNS;
  const columnBlocks = Math.ceil(words / (block[0] * COLUMNS));
  launch(gpu, ROWS_SOURCE, {
    entry: "copyRows",
    types: {},
    constants: { BYTES: bytes, ROWS, COLUMNS, OUTER: outer.length },
    grid: Math.ceil(rows / (block[1] * ROWS)) * columnBlocks,
    block,
    args: [
      out,
      x,
      rows,
      words,
      columnBlocks,
      BigInt(dense ? bytes : row.to * size),
      BigInt(dense ? bytes : row.from * size),
      ...outerArguments(inBytes, ROWS_OUTER),
    ],
  });
}

function transposeTiles(
  gpu: GpuDevice,
  out: Tensor,
  x: Tensor,
  a: Dimension,
  b: Dimension,
  outer: readonly Dimension[],
): void {
  const size = dtypeBytes(x.dtype);
  const strides = [a.size, a.to, b.size, b.from, ...outer.flatMap(({ to, from }) => [to, from])];
  const word = Math.min(4, wordBytes([out.pointer, x.pointer, ...strides.map((stride) => stride * size)]));
  const E = word / size;
  const tilesA = Math.ceil(a.size / (TILE * E));
  const tilesB = Math.ceil(b.size / (TILE * E));
  launch(gpu, TRANSPOSE_SOURCE, {
    entry: "transposeTiles",
    types: { T: x.dtype },
    constants: { E, OUTER: outer.length },
    grid: outer.reduce((product, dim) => product * dim.size, tilesA * tilesB),
    block: 256,
    args: [
      out,
      x,
      a.size,
      b.size,
      tilesA,
      tilesB,
      BigInt(a.to),
      BigInt(b.from),
      ...outerArguments(outer, TRANSPOSE_OUTER),
    ],
  });
}

/** Sizes of all but the outermost dimension, then strides of the target, then of the source; 0 for those not there. */
function outerArguments(outer: readonly Dimension[], most: number): (number | bigint)[] {
  const all = Array.from({ length: most }, (_, i) => outer[i] ?? { size: 0, to: 0, from: 0 });
  return [
    ...all.slice(1).map(({ size }) => size),
    ...all.map(({ to }) => BigInt(to)),
    ...all.map(({ from }) => BigInt(from)),
  ];
}
