/** C's layouts in memory: structs of `int`s, and the arguments of a kernel. Little-endian, as all our machines are. */
import { FfiError } from "./errors.ts";
import { Float, type KernelArgument, TensorMap } from "./gpu.ts";
import type { Tensor } from "./tensor.ts";

/**
 * A struct of `byteLength` bytes that is zero but for fields at the given offsets (in bytes): 32-bit integers, signed or
 * not, floats, and bigints for 64-bit integers and addresses.
 *
 * @throws {FfiError} for a number that no 32-bit integer is, and a field that is not aligned or not inside
 */
export function packStruct(
  byteLength: number,
  fields: readonly (readonly [offset: number, value: number | bigint | Float])[],
): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(byteLength);
  const view = new DataView(bytes.buffer);
  for (const [offset, value] of fields) {
    const size = typeof value === "bigint" ? 8 : 4;
    if (offset % size !== 0 || offset < 0 || offset + size > byteLength) {
      throw new FfiError(`a field of ${size} bytes at ${offset} does not fit into a struct of ${byteLength}`);
    }
    if (typeof value === "bigint") view.setBigUint64(offset, value, true);
    else if (value instanceof Float) view.setFloat32(offset, value.value, true);
    else if ((value | 0) === value || value >>> 0 === value) view.setInt32(offset, value, true);
    else throw new FfiError(`${value}, at ${offset} of a struct, is no 32-bit integer`);
  }
  return bytes;
}

/** What a kernel's parameters can take at most, in bytes (CUDA C++ Programming Guide, function parameters). */
const MOST_BYTES = 4096;

/** Where a {@link TensorMap} starts, as cuda.h declares it. */
const MAP_ALIGNMENT = 64;

/**
 * A kernel's arguments, one behind the other at multiples of their own size (of 64 bytes for maps): the layout of its
 * parameters on the device. One buffer serves all launches, since a driver copies the arguments before the launch returns.
 */
export class ArgumentBuffer {
  readonly buffer = new ArrayBuffer(MOST_BYTES);
  /** Address of the buffer, which stays where it is. */
  readonly address: bigint = Deno.UnsafePointer.value(Deno.UnsafePointer.of(new Uint8Array(this.buffer)));
  /** Where each of the arguments that were packed last starts, in bytes. */
  readonly starts: number[] = [];
  readonly #bytes = new Uint8Array(this.buffer);
  readonly #ints = new Int32Array(this.buffer);
  readonly #floats = new Float32Array(this.buffer);
  readonly #longs = new BigInt64Array(this.buffer);
  readonly #pointers = new BigUint64Array(this.buffer);

  /**
   * Writes the arguments and returns how many bytes they take.
   *
   * @param kernel its name, for messages. @param device on which all tensors must lie.
   * @throws {FfiError} for a number that is no 32-bit integer, a tensor of another device, or too many arguments
   */
  pack(args: readonly KernelArgument[], kernel: string, device: Tensor["device"]): number {
    let at = 0; // in units of 4 bytes
    if (args.length * 8 > MOST_BYTES) throw tooMany(args, kernel);
    this.starts.length = 0;
    for (let i = 0; i < args.length; i++) {
      const arg = args[i];
      if (typeof arg === "number") {
        if ((arg | 0) !== arg) throw new FfiError(`${kernel}: argument ${i}, ${arg}, is no 32-bit integer`);
        this.starts.push(4 * at);
        this.#ints[at++] = arg;
      } else if (arg instanceof Float) {
        this.starts.push(4 * at);
        this.#floats[at++] = arg.value;
      } else if (arg instanceof TensorMap) {
        checkDevice(arg.matrix, i, kernel, device);
        at = Math.ceil(4 * at / MAP_ALIGNMENT) * MAP_ALIGNMENT / 4;
        if (4 * at + arg.bytes.length > MOST_BYTES) throw tooMany(args, kernel);
        this.starts.push(4 * at);
        this.#bytes.set(arg.bytes, 4 * at);
        at += arg.bytes.length / 4;
      } else {
        at += at & 1;
        this.starts.push(4 * at);
        if (Array.isArray(arg)) {
          if (4 * at + 8 * arg.length > MOST_BYTES) throw tooMany(args, kernel);
          for (let member = 0; member < arg.length; member++, at += 2) {
            this.#packLong(at >> 1, arg[member], i, kernel, device);
          }
        } else {
          this.#packLong(at >> 1, arg as Tensor | bigint | undefined, i, kernel, device);
          at += 2;
        }
      }
    }
    return at * 4;
  }

  #packLong(
    at: number,
    value: Tensor | bigint | undefined,
    argument: number,
    kernel: string,
    device: Tensor["device"],
  ): void {
    if (typeof value === "bigint") this.#longs[at] = value;
    else if (value === undefined) this.#pointers[at] = 0n;
    else {
      checkDevice(value, argument, kernel, device);
      this.#pointers[at] = value.pointer;
    }
  }
}

function tooMany(args: readonly KernelArgument[], kernel: string): FfiError {
  return new FfiError(`${kernel}: ${args.length} arguments are too many`);
}

function checkDevice(tensor: Tensor, argument: number, kernel: string, device: Tensor["device"]): void {
  if (tensor.memory.device === device) return;
  throw new FfiError(`${kernel}: argument ${argument}, ${tensor}, lies on ${tensor.device.name}`);
}
