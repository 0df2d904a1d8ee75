/**
 * cuDNN's backend API by FFI: the C functions in use, {@link CudnnBackend} with every status checked, and
 * {@link Descriptor}, of which graphs, plans and all else are made.
 *
 * Source: `cudnn_graph.h` of cuDNN 9.14. Handles and device addresses are 64-bit integers.
 */
import type { DType } from "../dtype.ts";
import { FfiError } from "../errors.ts";
import { type OpenedLibrary, openLibrary, pinLibrary, textAt } from "../library.ts";
import { Nvrtc } from "./nvrtc.ts";
import { dottedVersion } from "./versions.ts";

const CUDNN = {
  // size_t cudnnGetVersion(void)
  cudnnGetVersion: { parameters: [], result: "usize" },
  // size_t cudnnGetCudartVersion(void)
  cudnnGetCudartVersion: { parameters: [], result: "usize" },
  // const char *cudnnGetErrorString(cudnnStatus_t status)
  cudnnGetErrorString: { parameters: ["i32"], result: "pointer" },
  // void cudnnGetLastErrorString(char *message, size_t max_size)
  cudnnGetLastErrorString: { parameters: ["buffer", "usize"], result: "void" },
  // cudnnStatus_t cudnnCreate(cudnnHandle_t *handle)
  cudnnCreate: { parameters: ["buffer"], result: "i32" },
  // cudnnStatus_t cudnnDestroy(cudnnHandle_t handle)
  cudnnDestroy: { parameters: ["u64"], result: "i32" },
  // cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t streamId)
  cudnnSetStream: { parameters: ["u64", "u64"], result: "i32" },
  // cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t descriptorType,
  //     cudnnBackendDescriptor_t *descriptor)
  cudnnBackendCreateDescriptor: { parameters: ["i32", "buffer"], result: "i32" },
  // cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t descriptor)
  cudnnBackendDestroyDescriptor: { parameters: ["u64"], result: "i32" },
  // cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t descriptor,
  //     cudnnBackendAttributeName_t attributeName, cudnnBackendAttributeType_t attributeType, int64_t elementCount,
  //     const void *arrayOfElements)
  cudnnBackendSetAttribute: { parameters: ["u64", "i32", "i32", "i64", "buffer"], result: "i32" },
  // cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t const descriptor,
  //     cudnnBackendAttributeName_t attributeName, cudnnBackendAttributeType_t attributeType,
  //     int64_t requestedElementCount, int64_t *elementCount, void *arrayOfElements)
  cudnnBackendGetAttribute: { parameters: ["u64", "i32", "i32", "i64", "buffer", "buffer"], result: "i32" },
  // cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t descriptor)
  cudnnBackendFinalize: { parameters: ["u64"], result: "i32" },
  // cudnnStatus_t cudnnBackendExecute(cudnnHandle_t handle, cudnnBackendDescriptor_t executionPlan,
  //     cudnnBackendDescriptor_t variantPack)
  cudnnBackendExecute: { parameters: ["u64", "u64", "u64"], result: "i32" },
} as const satisfies Deno.ForeignLibraryInterface;

/** Values of the header, under the header's names; a test compares them with an installed header. */
export const HEADER = {
  CUDNN_STATUS_SUCCESS: 0,
  CUDNN_STATUS_NOT_SUPPORTED: 3000, // up to 3999 with the reason

  CUDNN_DATA_FLOAT: 0,
  CUDNN_DATA_HALF: 2,
  CUDNN_DATA_BFLOAT16: 9,
  CUDNN_CROSS_CORRELATION: 1,
  CUDNN_POINTWISE_ADD: 0,
  CUDNN_HEUR_MODE_FALLBACK: 2,
  CUDNN_HEUR_MODE_A: 3,
  CUDNN_NUMERICAL_NOTE_TENSOR_CORE: 0,
  CUDNN_NUMERICAL_NOTE_DOWN_CONVERT_INPUTS: 1,
  CUDNN_NUMERICAL_NOTE_REDUCED_PRECISION_REDUCTION: 2,
  CUDNN_NUMERICAL_NOTE_TYPE_COUNT: 10,

  CUDNN_BACKEND_POINTWISE_DESCRIPTOR: 0,
  CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR: 1,
  CUDNN_BACKEND_ENGINE_DESCRIPTOR: 2,
  CUDNN_BACKEND_ENGINECFG_DESCRIPTOR: 3,
  CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR: 4,
  CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR: 5,
  CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR: 10,
  CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR: 13,
  CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR: 15,
  CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR: 16,
  CUDNN_BACKEND_TENSOR_DESCRIPTOR: 17,
  CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR: 38,
  CUDNN_BACKEND_OPERATION_SDPA_FWD_DESCRIPTOR: 41,

  CUDNN_TYPE_HANDLE: 0,
  CUDNN_TYPE_DATA_TYPE: 1,
  CUDNN_TYPE_BOOLEAN: 2,
  CUDNN_TYPE_INT64: 3,
  CUDNN_TYPE_FLOAT: 4,
  CUDNN_TYPE_VOID_PTR: 6,
  CUDNN_TYPE_CONVOLUTION_MODE: 7,
  CUDNN_TYPE_HEUR_MODE: 8,
  CUDNN_TYPE_NUMERICAL_NOTE: 11,
  CUDNN_TYPE_POINTWISE_MODE: 14,
  CUDNN_TYPE_BACKEND_DESCRIPTOR: 15,
  CUDNN_TYPE_CHAR: 24,

  CUDNN_ATTR_POINTWISE_MODE: 0,
  CUDNN_ATTR_POINTWISE_MATH_PREC: 1,
  CUDNN_ATTR_CONVOLUTION_COMP_TYPE: 100,
  CUDNN_ATTR_CONVOLUTION_CONV_MODE: 101,
  CUDNN_ATTR_CONVOLUTION_DILATIONS: 102,
  CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES: 103,
  CUDNN_ATTR_CONVOLUTION_POST_PADDINGS: 104,
  CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS: 105,
  CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS: 106,
  CUDNN_ATTR_ENGINEHEUR_MODE: 200,
  CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH: 201,
  CUDNN_ATTR_ENGINEHEUR_RESULTS: 202,
  CUDNN_ATTR_ENGINEHEUR_DEVICEPROP: 204,
  CUDNN_ATTR_ENGINECFG_ENGINE: 300,
  CUDNN_ATTR_EXECUTION_PLAN_HANDLE: 400,
  CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG: 401,
  CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE: 402,
  CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION: 405,
  CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP: 407,
  CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA: 700,
  CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA: 701,
  CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC: 702,
  CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W: 703,
  CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X: 704,
  CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y: 705,
  CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR: 750,
  CUDNN_ATTR_OPERATION_POINTWISE_XDESC: 751,
  CUDNN_ATTR_OPERATION_POINTWISE_BDESC: 752,
  CUDNN_ATTR_OPERATION_POINTWISE_YDESC: 753,
  CUDNN_ATTR_OPERATIONGRAPH_HANDLE: 800,
  CUDNN_ATTR_OPERATIONGRAPH_OPS: 801,
  CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT: 900,
  CUDNN_ATTR_TENSOR_DATA_TYPE: 901,
  CUDNN_ATTR_TENSOR_DIMENSIONS: 902,
  CUDNN_ATTR_TENSOR_STRIDES: 903,
  CUDNN_ATTR_TENSOR_UNIQUE_ID: 906,
  CUDNN_ATTR_TENSOR_IS_VIRTUAL: 907,
  CUDNN_ATTR_TENSOR_IS_BY_VALUE: 908,
  CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS: 1000,
  CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS: 1001,
  CUDNN_ATTR_VARIANT_PACK_WORKSPACE: 1003,
  CUDNN_ATTR_ENGINE_GLOBAL_INDEX: 1301,
  CUDNN_ATTR_ENGINE_NUMERICAL_NOTE: 1303,
  CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION: 2702,
  CUDNN_ATTR_OPERATION_SDPA_FWD_QDESC: 2800,
  CUDNN_ATTR_OPERATION_SDPA_FWD_KDESC: 2801,
  CUDNN_ATTR_OPERATION_SDPA_FWD_VDESC: 2802,
  CUDNN_ATTR_OPERATION_SDPA_FWD_ODESC: 2803,
  CUDNN_ATTR_OPERATION_SDPA_FWD_SCALEDESC: 2805,
} as const;

type Named<Prefix extends string> = Extract<keyof typeof HEADER, `${Prefix}_${string}`>;
export type Attribute = Named<"CUDNN_ATTR">;
export type DescriptorType = Named<"CUDNN_BACKEND">;
type AttributeType = Named<"CUDNN_TYPE">;

const DATA_TYPES: Partial<Record<DType, number>> = {
  f32: HEADER.CUDNN_DATA_FLOAT,
  f16: HEADER.CUDNN_DATA_HALF,
  bf16: HEADER.CUDNN_DATA_BFLOAT16,
};

const HINT =
  "pip install nvidia-cudnn-cu13 (nvidia-cudnn-cu12 for CUDA 12); FLUX_LIB_PATH may name the folder";

/** The value of an attribute: so many elements of one of cuDNN's types. */
export interface Value {
  readonly type: AttributeType;
  readonly count: number;
  readonly bytes:
    | BigInt64Array<ArrayBuffer>
    | Int32Array<ArrayBuffer>
    | Float32Array<ArrayBuffer>
    | Uint8Array<ArrayBuffer>;
}

/** What a descriptor is made of. */
export type Attributes = Partial<Record<Attribute, Value>>;

export function int64s(values: readonly number[]): Value {
  return { type: "CUDNN_TYPE_INT64", count: values.length, bytes: BigInt64Array.from(values, BigInt) };
}

export function int64(value: number): Value {
  return int64s([value]);
}

export function float(value: number): Value {
  return { type: "CUDNN_TYPE_FLOAT", count: 1, bytes: Float32Array.of(value) };
}

export function boolean(value: boolean): Value {
  return { type: "CUDNN_TYPE_BOOLEAN", count: 1, bytes: Uint8Array.of(value ? 1 : 0) };
}

export function text(value: string): Value {
  const bytes = new TextEncoder().encode(value);
  return { type: "CUDNN_TYPE_CHAR", count: bytes.length, bytes };
}

/** @throws {FfiError} for a dtype that we have no use for in cuDNN */
export function dataType(dtype: DType): Value {
  const value = DATA_TYPES[dtype];
  if (value === undefined) throw new FfiError(`cuDNN: no ${dtype} here`);
  return { type: "CUDNN_TYPE_DATA_TYPE", count: 1, bytes: Int32Array.of(value) };
}

/** A value of one of cuDNN's enumerations. */
export function enumerator(type: AttributeType, value: Exclude<keyof typeof HEADER, Attribute>): Value {
  return { type, count: 1, bytes: Int32Array.of(HEADER[value]) };
}

export function descriptors(...values: readonly Descriptor[]): Value {
  const bytes = BigInt64Array.from(values, ({ handle }) => handle);
  return { type: "CUDNN_TYPE_BACKEND_DESCRIPTOR", count: values.length, bytes };
}

/** A cuDNN handle. */
export function handleValue(handle: bigint): Value {
  return { type: "CUDNN_TYPE_HANDLE", count: 1, bytes: BigInt64Array.of(handle) };
}

/** Addresses on the device, or on the host for tensors that are passed by value. */
export function pointers(values: readonly bigint[]): Value {
  return { type: "CUDNN_TYPE_VOID_PTR", count: values.length, bytes: BigInt64Array.from(values) };
}

/** A call of cuDNN that did not succeed. */
export class CudnnError extends FfiError {
  constructor(message: string, readonly status: number) {
    super(message);
  }

  /** Whether cuDNN does not do this at all; else something went wrong. */
  get unsupported(): boolean {
    return Math.floor(this.status / 1000) * 1000 === HEADER.CUDNN_STATUS_NOT_SUPPORTED;
  }
}

/** The opened library. It makes descriptors, and most of them need neither a handle nor a GPU. */
export class CudnnBackend implements Disposable {
  readonly symbols: OpenedLibrary<typeof CUDNN>["symbols"];
  /** E.g. 91400 for 9.14.0. */
  readonly versionNumber: number;
  readonly #library: OpenedLibrary<typeof CUDNN>;
  readonly #needed = new DisposableStack();
  /** The major version of CUDA that it was built for. */
  readonly #cuda: number;
  #compiler: Nvrtc | undefined;

  /** @throws {LibraryNotFoundError} where cuDNN, or cuBLASLt, which it calls, are not installed */
  constructor() {
    this.#library = openLibrary("cuDNN", CUDNN, { sonames: ["libcudnn.so.9"], hint: HINT });
    this.symbols = this.#library.symbols;
    // It registers kernels with the CUDA runtime, and is not made to be unmapped while the process lives.
    pinLibrary(this.#library.path);
    this.versionNumber = Number(this.symbols.cudnnGetVersion());
    // cuDNN opens cuBLASLt by its bare name. Python's wheels put it in a folder where the loader does not look, but it
    // finds what is open already.
    const cuda = this.#cuda = Math.floor(Number(this.symbols.cudnnGetCudartVersion()) / 1000);
    try {
      this.#needed.use(openLibrary("cuBLASLt (for cuDNN)", {}, {
        sonames: [`libcublasLt.so.${cuda}`],
        hint: `pip install ${
          cuda >= 13 ? "nvidia-cublas" : `nvidia-cublas-cu${cuda}`
        }, or install the CUDA toolkit`,
      }));
    } catch (error) {
      this[Symbol.dispose]();
      throw error;
    }
  }

  /** E.g. `"9.14.0"`. */
  get version(): string {
    return dottedVersion(this.versionNumber);
  }

  /**
   * Opens NVRTC, which cuDNN then finds as it finds cuBLASLt: some of its engines compile their kernels when a plan is
   * made, and refuse to be without it.
   *
   * @throws {LibraryNotFoundError}
   */
  openCompiler(): void {
    this.#compiler ??= this.#needed.use(new Nvrtc(this.#cuda));
  }

  /** An empty descriptor, which cuDNN fills in; who makes it destroys it. */
  create(type: DescriptorType): Descriptor {
    return new Descriptor(this, type);
  }

  /** A finalized descriptor; who makes it destroys it. */
  make(type: DescriptorType, attributes: Attributes): Descriptor {
    const descriptor = this.create(type);
    try {
      // Object.entries knows the keys as strings only.
      for (const [attribute, value] of Object.entries(attributes)) {
        descriptor.set(attribute as Attribute, value);
      }
      descriptor.finalize();
    } catch (error) {
      descriptor[Symbol.dispose]();
      throw error;
    }
    return descriptor;
  }

  /**
   * @param call what was called, with the descriptor's or the attribute's name
   * @throws {CudnnError} for every status but success, with the library's own message
   */
  check(status: number, call: string): void {
    if (status === HEADER.CUDNN_STATUS_SUCCESS) return;
    const name = textAt(this.symbols.cudnnGetErrorString(status)) ?? "no name";
    const buffer = new Uint8Array(1024);
    this.symbols.cudnnGetLastErrorString(buffer, BigInt(buffer.length));
    const message = new TextDecoder().decode(buffer.subarray(0, buffer.indexOf(0))).replaceAll(/\s+/g, " ")
      .trim();
    throw new CudnnError(
      `cuDNN: ${call} failed: ${name} (${status})${message === "" ? "" : `, ${message}`}`,
      status,
    );
  }

  [Symbol.dispose](): void {
    this.#needed.dispose();
    this.#library.close();
  }
}

/** A backend descriptor: attributes are set, then it is finalized, and then others may refer to it. */
export class Descriptor implements Disposable {
  readonly handle: bigint;

  constructor(private readonly backend: CudnnBackend, readonly type: DescriptorType) {
    const out = new BigUint64Array(1);
    const status = backend.symbols.cudnnBackendCreateDescriptor(HEADER[type], out);
    backend.check(status, `cudnnBackendCreateDescriptor(${type})`);
    this.handle = out[0];
  }

  set(attribute: Attribute, { type, count, bytes }: Value): void {
    const { cudnnBackendSetAttribute } = this.backend.symbols;
    const status = cudnnBackendSetAttribute(
      this.handle,
      HEADER[attribute],
      HEADER[type],
      BigInt(count),
      bytes,
    );
    this.backend.check(status, `cudnnBackendSetAttribute(${attribute})`);
  }

  finalize(): void {
    const status = this.backend.symbols.cudnnBackendFinalize(this.handle);
    this.backend.check(status, `cudnnBackendFinalize(${this.type})`);
  }

  /** Reads an attribute into `into`, which has room for `count` elements, and returns how many there are. */
  get(attribute: Attribute, type: AttributeType, count: number, into: Value["bytes"]): number {
    const found = new BigInt64Array(1);
    const { cudnnBackendGetAttribute } = this.backend.symbols;
    const status = cudnnBackendGetAttribute(
      this.handle,
      HEADER[attribute],
      HEADER[type],
      BigInt(count),
      found,
      into,
    );
    this.backend.check(status, `cudnnBackendGetAttribute(${attribute})`);
    return Number(found[0]);
  }

  /** UTF-8 text. */
  getText(attribute: Attribute): Uint8Array<ArrayBuffer> {
    const length = this.get(attribute, "CUDNN_TYPE_CHAR", 0, new Uint8Array(0));
    const text = new Uint8Array(length);
    this.get(attribute, "CUDNN_TYPE_CHAR", length, text);
    return text;
  }

  /** A whole number. */
  getInt64(attribute: Attribute): number {
    const value = new BigInt64Array(1);
    this.get(attribute, "CUDNN_TYPE_INT64", 1, value);
    return Number(value[0]);
  }

  [Symbol.dispose](): void {
    const status = this.backend.symbols.cudnnBackendDestroyDescriptor(this.handle);
    this.backend.check(status, `cudnnBackendDestroyDescriptor(${this.type})`);
  }
}
