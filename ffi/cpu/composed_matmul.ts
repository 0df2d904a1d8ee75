import { float32ToBfloat16 } from "../bfloat16.ts";
import type { MatmulPlan } from "../device.ts";
import { float8ToFloat32 } from "../float8.ts";
import { Tensor } from "../tensor.ts";
import type { Allocate } from "./convert.ts";
import type { CpuMemory } from "./device.ts";
import { readVector } from "./vector.ts";

/** Whether a plan has what providers do not know: float8 operands, or an activation. */
export function isComposed({ a, activation }: MatmulPlan): boolean {
  return a.dtype === "f8e4m3" || activation !== undefined;
}

/**
 * A single product by a provider's plain one: float8 operands are widened, which is exact, `multiply` sums in f32, and
 * scales, bias and activation follow on the sums, which are rounded once.
 */
export function composedMatmul(
  plan: MatmulPlan,
  scratch: Allocate,
  multiply: (plan: MatmulPlan) => void,
): void {
  const { a, b, bias, out, alpha, activation, scaleA, scaleB, constant } = plan;
  const [m, n] = out.shape;
  if (m === 0 || n === 0) return;
  const wide = (operand: Tensor) => operand.dtype === "f8e4m3" ? widened(operand, scratch) : operand;
  const [left, right] = [wide(a), wide(b)];
  const memory = scratch(m * n * 4);
  const product = new Tensor(memory, "f32", [m, n]);
  multiply({ a: left, b: right, out: product, alpha, constant: constant === true && right === b });

  const sums = new Float32Array(memory.buffer, memory.byteOffset, m * n);
  const rowScales = scaleA === undefined ? ONE : readVector(scaleA);
  const columnScales = scaleB === undefined ? ONE : readVector(scaleB);
  const shifts = bias === undefined ? undefined : readVector(bias);
  for (let i = 0; i < m; i++) {
    const rowScale = rowScales[rowScales.length === 1 ? 0 : i];
    for (let j = 0; j < n; j++) {
      let sum = sums[i * n + j] * rowScale * columnScales[columnScales.length === 1 ? 0 : j];
      if (shifts !== undefined) sum += shifts[j];
      sums[i * n + j] = activation === undefined ? sum : geluTanh(sum);
    }
  }
  store(sums, out);
}

const ONE = Float32Array.of(1);
const SQRT_2_PI = Math.sqrt(2 / Math.PI);

function geluTanh(x: number): number {
  return 0.5 * x * (1 + Math.tanh(SQRT_2_PI * (x + 0.044715 * x ** 3)));
}

/** A float8 matrix as dense f32. */
function widened(matrix: Tensor, scratch: Allocate): Tensor {
  const [rows, columns] = matrix.shape;
  const [rowStride, columnStride] = matrix.strides;
  const { buffer, byteOffset, byteLength } = matrix.memory as CpuMemory;
  const codes = new Uint8Array(buffer, byteOffset, byteLength);
  const memory = scratch(rows * columns * 4);
  const row = new Uint8Array(columns);
  for (let i = 0; i < rows; i++) {
    const start = matrix.offset + i * rowStride;
    for (let j = 0; j < columns; j++) row[j] = codes[start + j * columnStride];
    const values = new Float32Array(memory.buffer, memory.byteOffset + i * columns * 4, columns);
    float8ToFloat32(row, values, "f8e4m3");
  }
  return new Tensor(memory, "f32", [rows, columns]);
}

/** Rounds dense sums into a matrix of f32 or bf16, strided or not. */
function store(sums: Float32Array, out: Tensor): void {
  const [rows, columns] = out.shape;
  const [rowStride, columnStride] = out.strides;
  const { buffer, byteOffset, byteLength } = out.memory as CpuMemory;
  let values: Float32Array | Uint16Array = sums;
  let target: Float32Array | Uint16Array = new Float32Array(buffer, byteOffset, byteLength >> 2);
  if (out.dtype === "bf16") {
    values = new Uint16Array(sums.length);
    float32ToBfloat16(sums, values);
    target = new Uint16Array(buffer, byteOffset, byteLength >> 1);
  }
  for (let i = 0; i < rows; i++) {
    const start = out.offset + i * rowStride;
    for (let j = 0; j < columns; j++) target[start + j * columnStride] = values[i * columns + j];
  }
}
