/** A launch's arguments for the emulated GPU, in memory as kernels read them. */
import { dtypeBytes } from "../../ffi/dtype.ts";
import { FfiError } from "../../ffi/errors.ts";
import { Float, type KernelArgument } from "../../ffi/gpu.ts";
import { Tensor } from "../../ffi/tensor.ts";

/** Where a buffer lies. */
export function addressOf(buffer: ArrayBufferView<ArrayBuffer>): bigint {
  return Deno.UnsafePointer.value(Deno.UnsafePointer.of(buffer));
}

/** Arguments in memory, and their addresses; compared with the kernel's parameters. */
export function packArguments(name: string, args: readonly KernelArgument[], parameters: Int32Array) {
  if (args.length !== parameters.length) {
    throw new FfiError(`${name} takes ${parameters.length} arguments, ${args.length} were given`);
  }
  const values = new DataView(new ArrayBuffer(8 * Math.max(1, args.length)));
  const pointers = new BigUint64Array(Math.max(1, args.length));
  const base = addressOf(values);
  for (const [i, arg] of args.entries()) {
    const [kind, elementBytes] = [String.fromCharCode(parameters[i] & 0xff), parameters[i] >> 8];
    const given = kindOf(arg);
    if (given !== kind) {
      throw new FfiError(`${name}: argument ${i} is ${KINDS[given]}, the kernel takes ${KINDS[kind]}`);
    }
    if (arg instanceof Tensor && elementBytes > 0 && elementBytes !== dtypeBytes(arg.dtype)) {
      throw new FfiError(
        `${name}: argument ${i} is ${arg}, the kernel takes elements of ${elementBytes} bytes`,
      );
    }
    pointers[i] = base + BigInt(8 * i);
    if (arg instanceof Tensor) values.setBigUint64(8 * i, arg.pointer, true);
    else if (arg instanceof Float) values.setFloat32(8 * i, arg.value, true);
    else if (typeof arg === "bigint") values.setBigInt64(8 * i, arg, true);
    else if (arg !== undefined) {
      if (typeof arg !== "number" || !Number.isInteger(arg) || Math.abs(arg) >= 2 ** 31) {
        throw new FfiError(`${name}: argument ${i} is ${arg}, no int; give a bigint or a Float`);
      }
      values.setInt32(8 * i, arg, true);
    }
  }
  return { values, pointers };
}

/** Letters of simt.hpp's SimtParameter. */
const KINDS: Readonly<Record<string, string>> = {
  p: "a tensor or undefined (a pointer)",
  i: "a whole number (int)",
  l: "a bigint (long long)",
  f: "a Float (float)",
};

function kindOf(arg: KernelArgument): string {
  if (arg === undefined || arg instanceof Tensor) return "p";
  if (arg instanceof Float) return "f";
  return typeof arg === "bigint" ? "l" : "i";
}
