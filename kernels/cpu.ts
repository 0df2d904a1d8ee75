import { extentOf, wasmAddress } from "../ffi/cpu/convert.ts";
import { CpuDevice, isAligned, viewOf } from "../ffi/cpu/device.ts";
import { dtypeBytes } from "../ffi/dtype.ts";
import { ShapeError } from "../ffi/errors.ts";
import { Tensor } from "../ffi/tensor.ts";
import { bfloat16ToFloat32, float32ToBfloat16 } from "../ffi/bfloat16.ts";
import { float32ToFloat8, float8ToFloat32 } from "../ffi/float8.ts";

/**
 * The CPU's way to run an operator: every input as a dense Float32Array, the reference on them, and the result
 * rounded once to the output's dtype. So a bfloat16 operator computes in float32 inside, as PyTorch's do.
 */
export function onCpu(
  out: Tensor,
  inputs: readonly (Tensor | undefined)[],
  reference: (out: Float32Array, ...inputs: Float32Array[]) => void,
): Tensor {
  const { device } = out;
  device.scope(() => {
    const values = inputs.map((input) => input === undefined ? EMPTY : readBriefly(input));
    if (out.dtype === "f32") {
      reference(viewOf(out, "f32", out.size), ...values);
    } else if (out.dtype === "bf16" && device instanceof CpuDevice && device.converter !== undefined) {
      const wide = Tensor.empty(device, [out.size], "f32");
      reference(viewOf(wide, "f32", out.size), ...values);
      device.converter.store(wasmAddress(wide)!, 1, out.size, out, out.size, 1);
    } else {
      const result = new Float32Array(out.size);
      reference(result, ...values);
      writeFloat32(out, result);
    }
  });
  return out;
}

const EMPTY = new Float32Array(0);

/** Elements that are converted at a time where an operator goes through its tensors from front to back. */
const PIECE = 2 ** 20;

/**
 * Calls `body` on matching pieces of dense tensors of the same size, one after another: f32 copies of 16-bit floats
 * then stay small, however large the tensors are. Pieces have a multiple of `unit` elements.
 */
export function eachPiece(
  out: Tensor,
  inputs: readonly Tensor[],
  body: (out: Tensor, ...inputs: Tensor[]) => void,
  unit = 1,
): void {
  const step = Math.ceil(PIECE / unit) * unit;
  for (let start = 0; start < out.size; start += step) {
    const piece = (x: Tensor) => x.reshape([x.size]).narrow(0, start, Math.min(step, x.size - start));
    body(piece(out), ...inputs.map(piece));
  }
}

/** Stores a dense tensor's values into another one of the same size; either may lie outside of the arena. */
export function convert(out: Tensor, x: Tensor): void {
  const { device } = out;
  const simd = [out, x].every(({ dtype }) => dtype === "f32" || dtype === "bf16");
  if (!simd || !(device instanceof CpuDevice) || device.converter === undefined) {
    return writeFloat32(out, readFloat32(x));
  }
  const { converter } = device;
  device.scope(() => {
    let result = converter.float32(x, (byteLength) => device.alloc(byteLength));
    if (out.dtype === "bf16") {
      const from = wasmAddress(result)!;
      result = wasmAddress(out) === undefined ? Tensor.empty(device, out.shape, "bf16") : out;
      converter.store(from, 1, out.size, result, out.size, 1);
    }
    if (result !== out) viewOf(out, "u8", out.byteLength).set(viewOf(result, "u8", out.byteLength));
  });
}

/** As {@link readFloat32}, faster for bf16; a copy lasts until the end of the innermost scope only. */
function readBriefly(tensor: Tensor): Float32Array {
  const { device } = tensor;
  if (tensor.dtype !== "bf16" || !tensor.isContiguous || tensor.size < 1024) return readFloat32(tensor);
  if (!(device instanceof CpuDevice) || device.converter === undefined) return readFloat32(tensor);
  const wide = device.converter.float32(tensor, (byteLength) => device.alloc(byteLength));
  return viewOf(wide, "f32", tensor.size);
}

/** A CPU tensor's elements in row-major order as f32: a view where it is dense f32 already, else a converted copy. */
export function readFloat32(tensor: Tensor): Float32Array {
  if (!tensor.isContiguous) return gather(tensor);
  const { size, dtype } = tensor;
  if (!isAligned(tensor, dtypeBytes(dtype))) return readUnaligned(tensor);
  switch (dtype) {
    case "f32":
      return viewOf(tensor, "f32", size);
    case "bf16": {
      const values = new Float32Array(size);
      bfloat16ToFloat32(viewOf(tensor, "bf16", size), values);
      return values;
    }
    case "f16":
      return new Float32Array(halfView(viewOf(tensor, "f16", size)));
    case "f8e4m3":
    case "f8e5m2": {
      const values = new Float32Array(size);
      float8ToFloat32(viewOf(tensor, "u8", size), values, dtype);
      return values;
    }
    case "i64":
      return Float32Array.from(viewOf(tensor, "i64", size), Number);
    default:
      return Float32Array.from(viewOf(tensor, dtype, size));
  }
}

/** Stores row-major f32 values into a dense CPU tensor, rounded to its dtype. */
export function writeFloat32(tensor: Tensor, values: Float32Array): void {
  const { size, dtype } = tensor;
  switch (dtype) {
    case "f32":
      return viewOf(tensor, "f32", size).set(values);
    case "bf16":
      return float32ToBfloat16(values, viewOf(tensor, "bf16", size));
    case "f16":
      return halfView(viewOf(tensor, "f16", size)).set(values);
    case "f8e4m3":
      return float32ToFloat8(values, viewOf(tensor, "u8", size));
    case "u8":
      return viewOf(tensor, "u8", size).set(values);
    default:
      throw new ShapeError(`cpu: no operator writes ${dtype}`);
  }
}

/** Copies a CPU tensor's elements (of 1, 2 or 4 bytes) bit by bit into `out` of the same shape; both may be strided. */
export function copyStrided(out: Tensor, tensor: Tensor): void {
  if (tensor.size === 0) return;
  const unit = ({ 1: "u8", 2: "bf16", 4: "i32" } as const)[dtypeBytes(tensor.dtype)];
  if (unit === undefined) throw new ShapeError(`cpu: no strided copy of ${tensor}`);
  const source = viewOf(tensor, unit, extentOf(tensor));
  const target = viewOf(out, unit, extentOf(out));
  const width = tensor.shape.at(-1) ?? 1;
  const [fromStep, toStep] = [tensor.strides.at(-1) ?? 1, out.strides.at(-1) ?? 1];
  const walk = (dim: number, from: number, to: number): void => {
    if (dim < tensor.rank - 1) {
      for (let i = 0; i < tensor.shape[dim]; i++) {
        walk(dim + 1, from + i * tensor.strides[dim], to + i * out.strides[dim]);
      }
    } else if (fromStep === 1 && toStep === 1) {
      target.set(source.subarray(from, from + width), to);
    } else {
      for (let i = 0; i < width; i++) target[to + i * toStep] = source[from + i * fromStep];
    }
  };
  walk(0, 0, 0);
}

/** Strided elements, converted. */
function gather(tensor: Tensor): Float32Array {
  const device = tensor.device;
  const dense = device.alloc(tensor.byteLength);
  try {
    const copy = new Tensor(dense, tensor.dtype, tensor.shape);
    copyStrided(copy, tensor);
    return readFloat32(copy).slice();
  } finally {
    device.free(dense);
  }
}

/** Elements whose address is no multiple of their size: safetensors data may start anywhere. */
function readUnaligned(tensor: Tensor): Float32Array {
  const device = tensor.device;
  const memory = device.alloc(tensor.byteLength);
  try {
    device.upload(viewOf(tensor, "u8", tensor.byteLength), memory);
    return readFloat32(new Tensor(memory, tensor.dtype, tensor.shape)).slice();
  } finally {
    device.free(memory);
  }
}

function halfView(bits: Uint16Array): Float16Array {
  return new Float16Array(bits.buffer, bits.byteOffset, bits.length);
}
