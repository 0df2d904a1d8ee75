/** Matrix products as the BLAS libraries know them: of matrices in column-major order. */
import type { MatmulPlan } from "./device.ts";
import type { DType } from "./dtype.ts";
import { ShapeError } from "./errors.ts";
import { describeMatmul, type Scaling, scalingOf } from "./matmul_plan.ts";
import type { Tensor } from "./tensor.ts";

/** What matrices consist of. */
export const MATRIX_DTYPES: readonly DType[] = ["f32", "bf16", "f16", "f8e4m3"];
/** What sizes and leading dimensions of float8 matrices are multiples of: matrix units read 16 bytes at a time. */
const FLOAT8_MULTIPLE = 16;

/** A matrix in column-major order: element (row, column) of batch entry i at `row + column * ld + i * batchStride`. */
export interface ColumnMajor {
  readonly dtype: DType;
  readonly rows: number;
  readonly columns: number;
  /** Leading dimension: elements from a column to the next. */
  readonly ld: number;
  readonly batchStride: number;
}

/** A product in BLAS terms: `d = activation(alpha * op(a) @ op(b) + bias)`; op transposes or does nothing. */
export interface Gemm {
  readonly a: ColumnMajor;
  readonly transposeA: boolean;
  readonly b: ColumnMajor;
  readonly transposeB: boolean;
  readonly d: ColumnMajor;
  readonly batch: number;
  /** Whether the plan's `b` is this `a` and the plan's `a` this `b`: so it is wherever the plan's result has dense rows. */
  readonly swapped: boolean;
  /** Dtype of a vector that is added to every column of `d`. */
  readonly bias: DType | undefined;
  readonly activation: MatmulPlan["activation"];
  readonly scaling: Scaling | undefined;
}

/**
 * A plan in BLAS terms, or undefined where the result has no elements.
 *
 * The memory of a row-major matrix is that of its transpose in column-major order. So `out = a @ b^T` with dense rows
 * is `out^T = b @ a^T` there: the plan's `b` comes first, and is to be transposed where its own rows are dense (as a
 * Linear layer's weights are). Where `out` has dense columns instead, `a` comes first.
 *
 * @throws {ShapeError} where the plan's operands do not fit together or are not made for matrix units
 */
export function columnMajorGemm(plan: MatmulPlan): Gemm | undefined {
  const { a, b, bias, out } = plan;
  const require = (condition: boolean, problem: string) => {
    if (!condition) throw new ShapeError(`matmul: ${problem}: ${describeMatmul(plan)}`);
  };
  const { rank } = out;
  require((rank === 2 || rank === 3) && a.rank === rank && b.rank === rank, "matrices are of rank 2 or 3");
  const [m, n] = out.shape.slice(-2);
  const k = a.shape[rank - 1];
  const fits = a.shape[rank - 2] === m && b.shape[rank - 2] === n && b.shape[rank - 1] === k &&
    (rank === 2 || (a.shape[0] === out.shape[0] && b.shape[0] === out.shape[0]));
  require(fits, "the sizes do not fit together");
  for (const { dtype } of [a, b, out]) require(MATRIX_DTYPES.includes(dtype), `no ${dtype} here`);
  require(a.dtype === b.dtype, "a and b differ in dtype");
  const scaling = scalingOf(plan);
  const rounded = scaling === undefined ? a.dtype : "bf16";
  require(out.dtype === "f32" || out.dtype === rounded, `out is neither f32 nor ${rounded}`);
  if (out.size === 0) return undefined;
  require(k > 0, "there is nothing to sum over");

  const left = asColumnMajor(a, require);
  const right = asColumnMajor(b, require);
  const result = asColumnMajor(out, require);
  const swapped = result.transposed;
  if (bias !== undefined) {
    const dense = bias.rank === 1 && bias.shape[0] === n && (n === 1 || bias.strides[0] === 1);
    const added = scaling === undefined ? out.dtype : "bf16";
    require(dense && bias.dtype === added, `bias is not a dense [n] in ${added}`);
    require(swapped, "a bias takes a result with dense rows");
  }
  const [first, second] = swapped ? [right, left] : [left, right];
  if (scaling !== undefined) {
    require(first.transposed && second.transposed, "rows of float8 matrices are dense");
    // The columns of d, tokens in a Linear layer, may be any number.
    const aligned = [k, result.matrix.rows, first.matrix.ld, second.matrix.ld, result.matrix.ld]
      .every((size) => size % FLOAT8_MULTIPLE === 0);
    require(aligned, `float8 takes sizes and strides that are multiples of ${FLOAT8_MULTIPLE}`);
  }
  return {
    a: first.matrix,
    transposeA: first.transposed,
    b: second.matrix,
    transposeB: !second.transposed, // the plan has op(b)'s transpose
    d: result.matrix,
    batch: rank === 3 ? out.shape[0] : 1,
    swapped,
    bias: bias?.dtype,
    activation: plan.activation,
    scaling,
  };
}

/** The column-major matrix that a tensor's memory is, and whether it is the transpose of the tensor. */
function asColumnMajor(
  tensor: Tensor,
  require: (condition: boolean, problem: string) => void,
): { matrix: ColumnMajor; transposed: boolean } {
  const { rank, dtype } = tensor;
  const [rows, columns] = tensor.shape.slice(-2);
  const [rowStride, columnStride] = tensor.strides.slice(-2);
  const batchStride = rank === 3 ? tensor.strides[0] : 0;
  // The stride of a dimension of one element says nothing: it counts as dense, and as no leading dimension.
  const transposed = columnStride === 1 || columns === 1;
  require(transposed || rowStride === 1 || rows === 1, "a matrix has no dense dimension");
  const ld = transposed ? (rows === 1 ? columns : rowStride) : (columns === 1 ? rows : columnStride);
  require(ld >= (transposed ? columns : rows), "rows of a matrix overlap");
  const matrix = transposed
    ? { dtype, rows: columns, columns: rows, ld, batchStride }
    : { dtype, rows, columns, ld, batchStride };
  return { matrix, transposed };
}
