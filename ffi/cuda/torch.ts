/**
 * libtorch through its C shim: tensors over our memory, and operators called through PyTorch's dispatcher. Written after
 * torch/csrc/inductor/aoti_torch/c/shim.h and torch/csrc/stable/c/shim.h of PyTorch 2.11 to 2.13.
 *
 * PyTorch shares the device's primary context with us. It keeps its current stream for each thread, so that all calls
 * are synchronous ones. Its libraries are never unmapped: their threads and exit handlers outlive Deno's own end.
 */
import type { DType } from "../dtype.ts";
import { FfiError } from "../errors.ts";
import { type OpenedLibrary, openLibraryAt, pinLibrary } from "../library.ts";
import type { Tensor } from "../tensor.ts";
import { defaultBits, type OperatorSchema } from "./torch_schema.ts";

const SHIM = {
  // uint64_t aoti_torch_abi_version(void)
  aoti_torch_abi_version: { parameters: [], result: "u64" },
  // int32_t aoti_torch_device_type_cuda(void)
  aoti_torch_device_type_cuda: { parameters: [], result: "i32" },
  // int32_t aoti_torch_dtype_bfloat16(void)
  aoti_torch_dtype_bfloat16: { parameters: [], result: "i32" },
  // int32_t aoti_torch_dtype_float8_e4m3fn(void)
  aoti_torch_dtype_float8_e4m3fn: { parameters: [], result: "i32" },
  // AOTITorchError aoti_torch_create_tensor_from_blob(void *data, int64_t ndim, const int64_t *sizes_ptr,
  //     const int64_t *strides_ptr, int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
  //     AtenTensorHandle *ret): no copy, and the memory stays ours
  aoti_torch_create_tensor_from_blob: {
    parameters: ["u64", "i64", "buffer", "buffer", "i64", "i32", "i32", "i32", "buffer"],
    result: "i32",
  },
  // AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor)
  aoti_torch_delete_tensor_object: { parameters: ["u64"], result: "i32" },
  // AOTITorchError aoti_torch_call_dispatcher(const char *opName, const char *overloadName, StableIValue *stack)
  aoti_torch_call_dispatcher: { parameters: ["buffer", "buffer", "buffer"], result: "i32" },
  // AOTITorchError aoti_torch_create_cuda_stream_guard(void *stream, int32_t device_index, CUDAStreamGuardHandle *ret)
  aoti_torch_create_cuda_stream_guard: { parameters: ["u64", "i32", "buffer"], result: "i32" },
  // AOTITorchError aoti_torch_delete_cuda_stream_guard(CUDAStreamGuardHandle guard)
  aoti_torch_delete_cuda_stream_guard: { parameters: ["u64"], result: "i32" },
  // const char *torch_exception_get_what_without_backtrace(void): from 2.13 on
  torch_exception_get_what_without_backtrace: { parameters: [], result: "pointer", optional: true },
  // AOTITorchError torch_new_stable_ivalue(StableIValue **ret_value): from 2.13 on
  torch_new_stable_ivalue: { parameters: ["buffer"], result: "i32", optional: true },
  // void *operator new(size_t size): of the C++ library that libtorch itself deletes with
  _Znwm: { parameters: ["usize"], result: "u64" },
  // void *memcpy(void *dest, const void *src, size_t n)
  memcpy: { parameters: ["u64", "buffer", "usize"], result: "u64" },
} as const satisfies Deno.ForeignLibraryInterface;

/** In site-packages, what PyTorch for CUDA has and PyTorch for the CPU has not. */
export const TORCH_FOR_CUDA = "torch/lib/libtorch_cuda.so";

/** Depends on all others of PyTorch's libraries: what is looked up in it is looked up in them. */
const LIBRARY = "libtorch.so";

const HINT = "pip install --upgrade torch installs PyTorch for CUDA with the libraries that it needs";

/** libtorch, opened, for one GPU. */
export class Torch implements Disposable {
  readonly path: string;
  /** E.g. `"2.11.0"`. */
  readonly version: string;
  readonly #library: OpenedLibrary<typeof SHIM>;
  readonly #handle = new BigUint64Array(1);

  /**
   * @param folder of its libraries. @param index of the GPU.
   * @throws {FfiError} where it does not open, or is too old
   */
  constructor(folder: string, private readonly index: number) {
    this.path = `${folder}/${LIBRARY}`;
    this.#library = openLibraryAt("PyTorch", this.path, SHIM, HINT);
    pinLibrary(this.path, { onlyIfLoaded: true });
    const version = this.#library.symbols.aoti_torch_abi_version();
    this.version = [56n, 48n, 40n].map((shift) => version >> shift & 255n).join(".");
  }

  /** Those of `symbols` that neither PyTorch's libraries have nor those that they depend on. */
  lacks(symbols: readonly string[]): string[] {
    const wanted = symbols.map((name) => [name, { parameters: [], result: "void", optional: true }] as const);
    using library = openLibraryAt<Deno.ForeignLibraryInterface>(
      "PyTorch",
      this.path,
      Object.fromEntries(wanted),
      HINT,
    );
    return symbols.filter((name) => library.symbols[name] === null);
  }

  /**
   * Runs `body` with `stream` as PyTorch's current one.
   *
   * @throws what `body` throws
   */
  onStream<T>(stream: bigint, body: () => T): T {
    const { aoti_torch_create_cuda_stream_guard, aoti_torch_delete_cuda_stream_guard } =
      this.#library.symbols;
    const status = aoti_torch_create_cuda_stream_guard(stream, this.index, this.#handle);
    this.#check(status, "aoti_torch_create_cuda_stream_guard");
    const [guard] = this.#handle;
    try {
      return body();
    } finally {
      const status = aoti_torch_delete_cuda_stream_guard(guard);
      this.#check(status, "aoti_torch_delete_cuda_stream_guard");
    }
  }

  /** Handles of tensors of PyTorch's over the same memory, bf16 or f8e4m3. */
  tensors(tensors: readonly Tensor[]): bigint[] {
    const made: bigint[] = [];
    try {
      for (const tensor of tensors) made.push(this.#tensor(tensor));
      return made;
    } catch (error) {
      for (const tensor of made) this.delete(tensor);
      throw error;
    }
  }

  delete(tensor: bigint): void {
    const status = this.#library.symbols.aoti_torch_delete_tensor_object(tensor);
    this.#check(status, "aoti_torch_delete_tensor_object");
  }

  /**
   * Runs an operator.
   *
   * @param name with namespace and a final NUL. @param stack has the arguments before and the results afterwards.
   */
  call(name: Uint8Array<ArrayBuffer>, stack: BigUint64Array<ArrayBuffer>): void {
    const status = this.#library.symbols.aoti_torch_call_dispatcher(name, NO_OVERLOAD, stack);
    this.#check(status, `the operator ${new TextDecoder().decode(name.subarray(0, -1))}`);
  }

  /** An optional argument that is there: the address of its value in memory that the callee frees. */
  present(bits: bigint): bigint {
    const { torch_new_stable_ivalue, _Znwm, memcpy } = this.#library.symbols;
    if (torch_new_stable_ivalue === null) this.#handle[0] = _Znwm(8n);
    else this.#check(torch_new_stable_ivalue(this.#handle), "torch_new_stable_ivalue");
    const [address] = this.#handle;
    memcpy(address, BigUint64Array.of(bits), 8n);
    return address;
  }

  /** The libraries stay in memory until the process ends. */
  [Symbol.dispose](): void {
    this.#library.close();
  }

  #tensor({ pointer, shape, strides, dtype }: Tensor): bigint {
    const { symbols } = this.#library;
    const status = symbols.aoti_torch_create_tensor_from_blob(
      pointer,
      BigInt(shape.length),
      BigInt64Array.from(shape, BigInt),
      BigInt64Array.from(strides, BigInt),
      0n,
      this.#dtype(dtype),
      symbols.aoti_torch_device_type_cuda(),
      this.index,
      this.#handle,
    );
    this.#check(status, "aoti_torch_create_tensor_from_blob");
    return this.#handle[0];
  }

  #dtype(dtype: DType): number {
    const { aoti_torch_dtype_bfloat16, aoti_torch_dtype_float8_e4m3fn } = this.#library.symbols;
    if (dtype === "bf16") return aoti_torch_dtype_bfloat16();
    if (dtype === "f8e4m3") return aoti_torch_dtype_float8_e4m3fn();
    throw new FfiError(`PyTorch: no tensor of ${dtype} was asked for so far`);
  }

  #check(status: number, call: string): void {
    if (status === 0) return;
    const failed = `PyTorch ${this.version}: ${call} failed`;
    const text = this.#library.symbols.torch_exception_get_what_without_backtrace?.() ?? null;
    if (text === null) {
      throw new FfiError(failed, { hint: "PyTorch has written the reason to stderr, above this line" });
    }
    throw new FfiError(`${failed}: ${new Deno.UnsafePointerView(text).getCString().split("\n")[0]}`);
  }
}

/** An operator with arguments that are given to it each time; the others keep the defaults of its schema. */
export class TorchOperator {
  readonly #name: Uint8Array<ArrayBuffer>;
  readonly #results: number;
  /** Where the given arguments are in the stack. */
  readonly #places: readonly {
    readonly index: number;
    readonly optional: boolean;
    readonly isTensor: boolean;
  }[];
  readonly #defaults: BigUint64Array<ArrayBuffer>;
  /** Arguments, then results. Written again by each call. */
  readonly #stack: BigUint64Array<ArrayBuffer>;

  /**
   * @param namespace e.g. `"fa3_fwd"`. @param given the arguments' names, each with its type, as the schema has them.
   * @throws {FfiError} where the schema does not have them, or has others without a default
   */
  constructor(
    private readonly torch: Torch,
    namespace: string,
    { name, args, results }: OperatorSchema,
    given: Readonly<Record<string, string>>,
  ) {
    this.#name = cString(`${namespace}::${name}`);
    this.#results = results;
    this.#places = Object.entries(given).map(([label, type]) => {
      const index = args.findIndex((argument) => argument.name === label && argument.type === type);
      if (index < 0) {
        throw new FfiError(`PyTorch: the operator ${namespace}::${name} takes no ${type} ${label}`);
      }
      return { index, optional: args[index].optional, isTensor: type === "Tensor" };
    });
    this.#defaults = new BigUint64Array(Math.max(args.length, results));
    this.#defaults.set(args.map((argument) => argument.name in given ? 0n : defaultBits(argument)));
    this.#stack = this.#defaults.slice();
  }

  /**
   * @param values of the given arguments in their order: handles of tensors, which are used up whatever happens, or a
   *   number's 64 bits.
   * @returns the results' handles, for the caller to delete. @throws {FfiError} with PyTorch's reason
   */
  call(values: readonly bigint[]): bigint[] {
    this.#stack.set(this.#defaults);
    try {
      values.forEach((bits, i) => {
        const { index, optional } = this.#places[i];
        this.#stack[index] = optional ? this.torch.present(bits) : bits;
      });
    } catch (error) {
      values.forEach((bits, i) => this.#places[i].isTensor && this.torch.delete(bits));
      throw error;
    }
    this.torch.call(this.#name, this.#stack);
    return [...this.#stack.subarray(0, this.#results)];
  }
}

const NO_OVERLOAD = cString("");

function cString(text: string): Uint8Array<ArrayBuffer> {
  return new TextEncoder().encode(`${text}\0`);
}
