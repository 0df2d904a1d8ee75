/**
 * cuBLASLt and hipBLASLt by FFI: they have the same functions under two prefixes, and other numbers for most things. What
 * differs is a {@link BlasLtHeader} for each.
 *
 * Handles and device addresses are 64-bit integers.
 */
import type { ColumnMajor, Gemm } from "./column_major_gemm.ts";
import type { DType } from "./dtype.ts";
import { FfiError } from "./errors.ts";
import { type OpenedLibrary, openLibrary, type OpenOptions, pinLibrary } from "./library.ts";
import type { Scaling } from "./matmul_plan.ts";

/** The C functions of a library whose names begin with `prefix` (handles and descriptors are pointers, enums ints). */
export function functionsOf(prefix: string) {
  return {
    // Status Create(Handle *lightHandle)
    create: { name: `${prefix}Create`, parameters: ["buffer"], result: "i32" },
    // Status Destroy(Handle lightHandle)
    destroy: { name: `${prefix}Destroy`, parameters: ["u64"], result: "i32" },
    // Status MatmulDescCreate(MatmulDesc *matmulDesc, ComputeType computeType, DataType scaleType)
    matmulDescCreate: {
      name: `${prefix}MatmulDescCreate`,
      parameters: ["buffer", "i32", "i32"],
      result: "i32",
    },
    // Status MatmulDescSetAttribute(MatmulDesc matmulDesc, MatmulDescAttributes attr, const void *buf,
    //     size_t sizeInBytes)
    matmulDescSetAttribute: {
      name: `${prefix}MatmulDescSetAttribute`,
      parameters: ["u64", "i32", "buffer", "usize"],
      result: "i32",
    },
    // Status MatmulDescDestroy(MatmulDesc matmulDesc)
    matmulDescDestroy: { name: `${prefix}MatmulDescDestroy`, parameters: ["u64"], result: "i32" },
    // Status MatrixLayoutCreate(MatrixLayout *matLayout, DataType type, uint64_t rows, uint64_t cols, int64_t ld)
    matrixLayoutCreate: {
      name: `${prefix}MatrixLayoutCreate`,
      parameters: ["buffer", "i32", "u64", "u64", "i64"],
      result: "i32",
    },
    // Status MatrixLayoutSetAttribute(MatrixLayout matLayout, MatrixLayoutAttribute attr, const void *buf,
    //     size_t sizeInBytes)
    matrixLayoutSetAttribute: {
      name: `${prefix}MatrixLayoutSetAttribute`,
      parameters: ["u64", "i32", "buffer", "usize"],
      result: "i32",
    },
    // Status MatrixLayoutDestroy(MatrixLayout matLayout)
    matrixLayoutDestroy: { name: `${prefix}MatrixLayoutDestroy`, parameters: ["u64"], result: "i32" },
    // Status MatmulPreferenceCreate(MatmulPreference *pref)
    matmulPreferenceCreate: {
      name: `${prefix}MatmulPreferenceCreate`,
      parameters: ["buffer"],
      result: "i32",
    },
    // Status MatmulPreferenceSetAttribute(MatmulPreference pref, MatmulPreferenceAttributes attr, const void *buf,
    //     size_t sizeInBytes)
    matmulPreferenceSetAttribute: {
      name: `${prefix}MatmulPreferenceSetAttribute`,
      parameters: ["u64", "i32", "buffer", "usize"],
      result: "i32",
    },
    // Status MatmulPreferenceDestroy(MatmulPreference pref)
    matmulPreferenceDestroy: { name: `${prefix}MatmulPreferenceDestroy`, parameters: ["u64"], result: "i32" },
    // Status MatmulAlgoGetHeuristic(Handle lightHandle, MatmulDesc operationDesc, MatrixLayout Adesc,
    //     MatrixLayout Bdesc, MatrixLayout Cdesc, MatrixLayout Ddesc, MatmulPreference preference,
    //     int requestedAlgoCount, MatmulHeuristicResult heuristicResultsArray[], int *returnAlgoCount)
    matmulAlgoGetHeuristic: {
      name: `${prefix}MatmulAlgoGetHeuristic`,
      parameters: ["u64", "u64", "u64", "u64", "u64", "u64", "u64", "i32", "buffer", "buffer"],
      result: "i32",
    },
    // Status Matmul(Handle lightHandle, MatmulDesc computeDesc, const void *alpha, const void *A, MatrixLayout Adesc,
    //     const void *B, MatrixLayout Bdesc, const void *beta, const void *C, MatrixLayout Cdesc, void *D,
    //     MatrixLayout Ddesc, const MatmulAlgo *algo, void *workspace, size_t workspaceSizeInBytes, Stream stream)
    matmul: {
      name: `${prefix}Matmul`,
      parameters: [
        "u64",
        "u64",
        "buffer",
        "u64",
        "u64",
        "u64",
        "u64",
        "buffer",
        "u64",
        "u64",
        "u64",
        "u64",
        "buffer",
        "u64",
        "usize",
        "u64",
      ],
      result: "i32",
    },
  } as const satisfies Deno.ForeignLibraryInterface;
}

type Functions = ReturnType<typeof functionsOf>;

/** What the headers of the two libraries say, under names of ours. Undefined is what a library does not have. */
export interface BlasLtHeader {
  /** Of functions. */
  readonly prefix: string;
  readonly success: number;
  readonly notSupported: number;
  readonly dataTypes: Readonly<Partial<Record<DType, number>>>;
  /** Sums in f32, whose "fast" variants would round f32 inputs to TF32 or bf16. */
  readonly compute32f: number;
  readonly notTransposed: number;
  readonly transposed: number;
  readonly desc: Readonly<
    Record<
      | "transA"
      | "transB"
      | "epilogue"
      | "biasPointer"
      | "biasDataType"
      | "scalePointerA"
      | "scalePointerB",
      number
    >
  >;
  /** Sums of float8 products that stay in the matrix units, with fewer bits than f32 has. */
  readonly fastAccum?: number;
  /** How scales for rows are told apart from one scale: by modes, or by other attributes for their addresses. */
  readonly rowScales:
    | { readonly modeA: number; readonly modeB: number; readonly outerVector: number }
    | { readonly pointerA: number; readonly pointerB: number };
  readonly epilogues: Readonly<Record<"none" | "bias" | "gelu" | "geluBias", number>>;
  readonly layout: Readonly<Record<"batchCount" | "batchStride", number>>;
  readonly preference: {
    readonly maxWorkspace: number;
    /** Partial sums that are added in f32. */
    readonly reduction?: { readonly mask: number; readonly computeType: number };
    /** Alignments of A, B, C and D in bytes. */
    readonly alignments?: readonly number[];
  };
  readonly algoBytes: number;
  readonly resultBytes: number;
  readonly workspaceOffset: number;
  readonly stateOffset: number;
}

/** Scratch that an algorithm may use: what NVIDIA advises for Hopper. */
export const WORKSPACE_BYTES = 32 * 2 ** 20;

/** The descriptors of a product; who makes them destroys them. */
export interface GemmDescriptors extends Disposable {
  readonly operation: bigint;
  readonly a: bigint;
  readonly b: bigint;
  readonly d: bigint;
}

type Value = Int8Array<ArrayBuffer> | Int32Array<ArrayBuffer> | BigUint64Array<ArrayBuffer>;

/** The opened library: its functions, its messages, and its descriptors, which need neither a handle nor a GPU. */
export class BlasLtLibrary<Symbols extends Deno.ForeignLibraryInterface> implements Disposable {
  readonly functions: OpenedLibrary<Functions>["symbols"];
  /** What this library alone has. */
  readonly own: OpenedLibrary<Symbols>["symbols"];
  readonly #libraries: readonly Disposable[];

  /**
   * @param name of the library for people. @param statusText its words for a status.
   * @throws {LibraryNotFoundError}
   */
  constructor(
    readonly name: string,
    public header: BlasLtHeader,
    own: Symbols,
    options: OpenOptions,
    private readonly statusText: (own: OpenedLibrary<Symbols>["symbols"], status: number) => string,
  ) {
    const library = openLibrary(name, functionsOf(header.prefix), options);
    const ownLibrary = openLibrary(name, own, { ...options, sonames: [library.path], search: "system" });
    this.#libraries = [library, ownLibrary];
    this.functions = library.symbols;
    this.own = ownLibrary.symbols;
    // It registers kernels with the vendor's runtime, and is not made to be unmapped while the process lives.
    pinLibrary(library.path);
  }

  /** Makes the descriptors of a product: operation with epilogue, and a layout for each matrix. */
  describe(gemm: Gemm): GemmDescriptors {
    const { matmulDescCreate, matmulDescDestroy, matrixLayoutDestroy } = this.functions;
    const { header } = this;
    using made = new DisposableStack();
    const operation = this.created(
      "MatmulDescCreate",
      (out) => matmulDescCreate(out, header.compute32f, header.dataTypes.f32!),
    );
    made.defer(() => this.check("MatmulDescDestroy", matmulDescDestroy(operation)));
    const transpose = (wanted: boolean) => int32(wanted ? header.transposed : header.notTransposed);
    this.setOperation(operation, header.desc.transA, transpose(gemm.transposeA));
    this.setOperation(operation, header.desc.transB, transpose(gemm.transposeB));
    this.setOperation(operation, header.desc.epilogue, int32(this.#epilogue(gemm)));
    if (gemm.bias !== undefined) {
      this.setOperation(operation, header.desc.biasDataType, int32(this.#dataType(gemm.bias)));
    }
    if (gemm.scaling !== undefined && header.fastAccum !== undefined) {
      this.setOperation(operation, header.fastAccum, Int8Array.of(1));
    }
    if (gemm.scaling === "row" && "outerVector" in header.rowScales) {
      const { modeA, modeB, outerVector } = header.rowScales;
      this.setOperation(operation, modeA, int32(outerVector));
      this.setOperation(operation, modeB, int32(outerVector));
    }
    const layout = (matrix: ColumnMajor) => {
      const handle = this.#layout(matrix, gemm.batch);
      made.defer(() => this.check("MatrixLayoutDestroy", matrixLayoutDestroy(handle)));
      return handle;
    };
    const [a, b, d] = [gemm.a, gemm.b, gemm.d].map(layout);
    const kept = made.move();
    return { operation, a, b, d, [Symbol.dispose]: () => kept.dispose() };
  }

  /** The attributes that take the addresses of scales. */
  scalePointers(scaling: Scaling): readonly [a: number, b: number] {
    const { desc, rowScales } = this.header;
    return scaling === "row" && "pointerA" in rowScales
      ? [rowScales.pointerA, rowScales.pointerB]
      : [desc.scalePointerA, desc.scalePointerB];
  }

  /** What the heuristics have to keep to: scratch, f32 partial sums, and the alignments of A, B, C and D in bytes. */
  preference(alignments: readonly number[]): { readonly handle: bigint } & Disposable {
    const { matmulPreferenceCreate, matmulPreferenceDestroy } = this.functions;
    const handle = this.created("MatmulPreferenceCreate", matmulPreferenceCreate);
    using made = new DisposableStack();
    made.defer(() => this.check("MatmulPreferenceDestroy", matmulPreferenceDestroy(handle)));
    const set = (attribute: number, value: Value) => {
      const { matmulPreferenceSetAttribute } = this.functions;
      const status = matmulPreferenceSetAttribute(handle, attribute, value, BigInt(value.byteLength));
      this.check("MatmulPreferenceSetAttribute", status, () => `attribute ${attribute}`);
    };
    const { maxWorkspace, reduction, alignments: attributes = [] } = this.header.preference;
    set(maxWorkspace, uint64(WORKSPACE_BYTES));
    if (reduction !== undefined) set(reduction.mask, int32(reduction.computeType));
    attributes.forEach((attribute, i) => set(attribute, int32(alignments[i])));
    const kept = made.move();
    return { handle, [Symbol.dispose]: () => kept.dispose() };
  }

  setOperation(operation: bigint, attribute: number, value: Value): void {
    const { matmulDescSetAttribute } = this.functions;
    const status = matmulDescSetAttribute(operation, attribute, value, BigInt(value.byteLength));
    if (status === this.header.success) return;
    throw this.failure("MatmulDescSetAttribute", status, `attribute ${attribute}`);
  }

  /** The object that a function of the library creates through its first parameter. */
  created(call: string, create: (out: BigUint64Array<ArrayBuffer>) => number): bigint {
    const out = new BigUint64Array(1);
    this.check(call, create(out));
    return out[0];
  }

  /** @param call without the prefix. */
  check(call: string, status: number, context?: () => string): void {
    if (status !== this.header.success) throw this.failure(call, status, context?.());
  }

  /** The error for a status, in the library's own words. */
  failure(call: string, status: number, context: string | undefined): FfiError {
    const where = context === undefined ? "" : ` for ${context}`;
    const words = this.statusText(this.own, status);
    return new FfiError(`${this.name}: ${this.header.prefix}${call} failed${where}: ${words}`);
  }

  [Symbol.dispose](): void {
    for (const library of this.#libraries) library[Symbol.dispose]();
  }

  #layout(matrix: ColumnMajor, batch: number): bigint {
    const { matrixLayoutCreate, matrixLayoutDestroy } = this.functions;
    const { dtype, rows, columns, ld, batchStride } = matrix;
    const layout = this.created(
      "MatrixLayoutCreate",
      (out) => matrixLayoutCreate(out, this.#dataType(dtype), BigInt(rows), BigInt(columns), BigInt(ld)),
    );
    const set = (attribute: number, value: Value) => {
      const { matrixLayoutSetAttribute } = this.functions;
      const status = matrixLayoutSetAttribute(layout, attribute, value, BigInt(value.byteLength));
      if (status === this.header.success) return;
      matrixLayoutDestroy(layout);
      throw this.failure("MatrixLayoutSetAttribute", status, `attribute ${attribute}`);
    };
    if (batch > 1) {
      set(this.header.layout.batchCount, int32(batch));
      set(this.header.layout.batchStride, uint64(batchStride));
    }
    return layout;
  }

  #dataType(dtype: DType): number {
    return this.header.dataTypes[dtype]!;
  }

  #epilogue({ bias, activation }: Gemm): number {
    const { none, bias: withBias, gelu, geluBias } = this.header.epilogues;
    if (activation === undefined) return bias === undefined ? none : withBias;
    return bias === undefined ? gelu : geluBias;
  }
}

function int32(value: number): Int32Array<ArrayBuffer> {
  return Int32Array.of(value);
}

function uint64(value: number): BigUint64Array<ArrayBuffer> {
  return BigUint64Array.of(BigInt(value));
}
