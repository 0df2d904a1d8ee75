/**
 * cuBLASLt by FFI: matrix products on NVIDIA GPUs.
 *
 * Source: `cublasLt.h`, `cublas_api.h` and `library_types.h` of CUDA 13.0; 12.x has the same functions and values.
 * Handles and device addresses are 64-bit integers. cuBLASLt knows column-major matrices; {@link columnMajorGemm} says
 * which of them a plan's row-major ones are.
 */
import type { MatmulPlan } from "../device.ts";
import type { DType } from "../dtype.ts";
import { FfiError, ShapeError } from "../errors.ts";
import { type OpenedLibrary, openLibrary, pinLibrary } from "../library.ts";
import { describeMatmul, type Scaling, scalingOf } from "../matmul_plan.ts";
import type { Tensor } from "../tensor.ts";
import type { CudaContext } from "./context.ts";
import { NumberMap } from "../number_map.ts";
import { cudaSonames, dottedVersion } from "./versions.ts";

const CUBLASLT = {
  // size_t cublasLtGetVersion(void)
  cublasLtGetVersion: { parameters: [], result: "usize" },
  // const char *cublasLtGetStatusName(cublasStatus_t status)
  cublasLtGetStatusName: { parameters: ["i32"], result: "pointer" },
  // const char *cublasLtGetStatusString(cublasStatus_t status)
  cublasLtGetStatusString: { parameters: ["i32"], result: "pointer" },
  // cublasStatus_t cublasLtCreate(cublasLtHandle_t *lightHandle)
  cublasLtCreate: { parameters: ["buffer"], result: "i32" },
  // cublasStatus_t cublasLtDestroy(cublasLtHandle_t lightHandle)
  cublasLtDestroy: { parameters: ["u64"], result: "i32" },
  // cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *matmulDesc, cublasComputeType_t computeType,
  //     cudaDataType_t scaleType)
  cublasLtMatmulDescCreate: { parameters: ["buffer", "i32", "i32"], result: "i32" },
  // cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t matmulDesc,
  //     cublasLtMatmulDescAttributes_t attr, const void *buf, size_t sizeInBytes)
  cublasLtMatmulDescSetAttribute: { parameters: ["u64", "i32", "buffer", "usize"], result: "i32" },
  // cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t matmulDesc)
  cublasLtMatmulDescDestroy: { parameters: ["u64"], result: "i32" },
  // cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *matLayout, cudaDataType type, uint64_t rows,
  //     uint64_t cols, int64_t ld)
  cublasLtMatrixLayoutCreate: { parameters: ["buffer", "i32", "u64", "u64", "i64"], result: "i32" },
  // cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t matLayout,
  //     cublasLtMatrixLayoutAttribute_t attr, const void *buf, size_t sizeInBytes)
  cublasLtMatrixLayoutSetAttribute: { parameters: ["u64", "i32", "buffer", "usize"], result: "i32" },
  // cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t matLayout)
  cublasLtMatrixLayoutDestroy: { parameters: ["u64"], result: "i32" },
  // cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *pref)
  cublasLtMatmulPreferenceCreate: { parameters: ["buffer"], result: "i32" },
  // cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t pref,
  //     cublasLtMatmulPreferenceAttributes_t attr, const void *buf, size_t sizeInBytes)
  cublasLtMatmulPreferenceSetAttribute: { parameters: ["u64", "i32", "buffer", "usize"], result: "i32" },
  // cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t pref)
  cublasLtMatmulPreferenceDestroy: { parameters: ["u64"], result: "i32" },
  // cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t lightHandle, cublasLtMatmulDesc_t operationDesc,
  //     cublasLtMatrixLayout_t Adesc, cublasLtMatrixLayout_t Bdesc, cublasLtMatrixLayout_t Cdesc,
  //     cublasLtMatrixLayout_t Ddesc, cublasLtMatmulPreference_t preference, int requestedAlgoCount,
  //     cublasLtMatmulHeuristicResult_t heuristicResultsArray[], int *returnAlgoCount)
  cublasLtMatmulAlgoGetHeuristic: {
    parameters: ["u64", "u64", "u64", "u64", "u64", "u64", "u64", "i32", "buffer", "buffer"],
    result: "i32",
  },
  // cublasStatus_t cublasLtMatmul(cublasLtHandle_t lightHandle, cublasLtMatmulDesc_t computeDesc, const void *alpha,
  //     const void *A, cublasLtMatrixLayout_t Adesc, const void *B, cublasLtMatrixLayout_t Bdesc, const void *beta,
  //     const void *C, cublasLtMatrixLayout_t Cdesc, void *D, cublasLtMatrixLayout_t Ddesc,
  //     const cublasLtMatmulAlgo_t *algo, void *workspace, size_t workspaceSizeInBytes, cudaStream_t stream)
  cublasLtMatmul: {
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

/** Values, sizes and offsets of the headers, under the headers' names; a test compares them with installed headers. */
export const HEADER = {
  CUBLAS_STATUS_SUCCESS: 0,
  CUBLAS_STATUS_NOT_SUPPORTED: 15,

  CUDA_R_32F: 0,
  CUDA_R_16F: 2,
  CUDA_R_16BF: 14,
  CUDA_R_8F_E4M3: 28,
  CUBLAS_COMPUTE_32F: 68, // "fast" variants beside it would round f32 inputs to TF32 or bf16
  CUBLAS_OP_N: 0,
  CUBLAS_OP_T: 1,

  CUBLASLT_MATMUL_DESC_TRANSA: 3,
  CUBLASLT_MATMUL_DESC_TRANSB: 4,
  CUBLASLT_MATMUL_DESC_EPILOGUE: 7,
  CUBLASLT_MATMUL_DESC_BIAS_POINTER: 8,
  CUBLASLT_MATMUL_DESC_A_SCALE_POINTER: 17,
  CUBLASLT_MATMUL_DESC_B_SCALE_POINTER: 18,
  CUBLASLT_MATMUL_DESC_FAST_ACCUM: 25,
  CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: 26,
  CUBLASLT_MATMUL_DESC_A_SCALE_MODE: 31,
  CUBLASLT_MATMUL_DESC_B_SCALE_MODE: 32,
  CUBLASLT_EPILOGUE_DEFAULT: 1,
  CUBLASLT_EPILOGUE_BIAS: 4,
  CUBLASLT_EPILOGUE_GELU: 32, // its tanh form
  CUBLASLT_EPILOGUE_GELU_BIAS: 36,
  CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F: 3, // from 12.9 on; without a mode a scale is one f32, in all versions

  CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT: 5,
  CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET: 6,

  CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES: 1,
  CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK: 3,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES: 5,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES: 6,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES: 7,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES: 8,
  CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE: 2,

  "sizeof(cublasLtMatmulAlgo_t)": 64,
  "sizeof(cublasLtMatmulHeuristicResult_t)": 96,
  "offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize)": 64,
  "offsetof(cublasLtMatmulHeuristicResult_t, state)": 72,
} as const;

const DATA_TYPES: Partial<Record<DType, number>> = {
  f32: HEADER.CUDA_R_32F,
  f16: HEADER.CUDA_R_16F,
  bf16: HEADER.CUDA_R_16BF,
  f8e4m3: HEADER.CUDA_R_8F_E4M3,
};

/** Scratch that an algorithm may use: what NVIDIA advises for Hopper. */
const WORKSPACE_BYTES = 32 * 2 ** 20;
/** Algorithms that are asked for: some turn out to be refused only when they are called, and the best may not be first. */
const CANDIDATES = 16;
/** Alignments above this make no difference to cuBLASLt. */
const MAX_ALIGNMENT = 256;
/** What sizes and leading dimensions of float8 matrices are multiples of: cuBLASLt reads 16 bytes at a time. */
const FLOAT8_MULTIPLE = 16;
/** Numbers in {@link writeKey}'s key: six per matrix, one per address, two per vector, activation, dtypes. */
const KEY_LENGTH = 3 * 6 + 4 + 3 * 2 + 1 + 1;

/** A matrix in column-major order: element (row, column) of batch entry i at `row + column * ld + i * batchStride`. */
export interface ColumnMajor {
  readonly dtype: DType;
  readonly rows: number;
  readonly columns: number;
  /** Leading dimension: elements from a column to the next. */
  readonly ld: number;
  readonly batchStride: number;
}

/** A product in cuBLASLt's terms: `d = activation(alpha * op(a) @ op(b) + bias)`; op transposes or does nothing. */
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

/** The descriptors of a product; who makes them destroys them. */
export interface GemmDescriptors extends Disposable {
  readonly operation: bigint;
  readonly a: bigint;
  readonly b: bigint;
  readonly d: bigint;
}

/** A product that was prepared, for all plans of the same shapes, strides, dtypes and alignments. */
interface Prepared {
  readonly swapped: boolean;
  readonly descriptors: GemmDescriptors;
  /** What cuBLASLt thinks the fastest first; one that it refuses when called leaves the list. */
  readonly candidates: Algorithm[];
  /** Whether it was decided which of them comes first. */
  chosen: boolean;
}

interface Algorithm {
  /** A `cublasLtMatmulAlgo_t`. */
  readonly algo: Uint8Array<ArrayBuffer>;
  readonly workspaceBytes: number;
}

/**
 * cuBLASLt on one device. Each distinct product is prepared once (descriptors, and the algorithm that the library's
 * heuristics put first); later calls look it up and fill in the addresses.
 */
export class CublasLt implements Disposable {
  /** E.g. `"13.1.0"`. */
  readonly version: string;
  readonly #lib: CublasLtLibrary;
  readonly #handle: bigint;
  readonly #prepared = new NumberMap<Prepared>(KEY_LENGTH);
  readonly #alpha = new Float32Array(1);
  readonly #beta = new Float32Array(1);
  readonly #address = new BigUint64Array(1);

  /**
   * Finds and opens libcublasLt.
   *
   * @throws {FfiError} with the reason: not found (a LibraryNotFoundError), or no handle for this GPU and driver
   */
  constructor(private readonly context: CudaContext) {
    this.#lib = new CublasLtLibrary(context.driver.driverGetVersion()[0]);
    try {
      const { cublasLtGetVersion, cublasLtCreate } = this.#lib.symbols;
      this.version = dottedVersion(Number(cublasLtGetVersion()));
      context.driver.enter();
      this.#handle = this.#lib.created("cublasLtCreate", cublasLtCreate);
    } catch (error) {
      this.#lib[Symbol.dispose]();
      throw error;
    }
  }

  /**
   * Issues a product to the device's stream. `a` and `b` are both f32, both bf16 or both f16, `out` f32 or their dtype,
   * `bias` of `out`'s dtype. Sums are in f32, and f32 inputs are multiplied as they are (no TF32); parts of sums that
   * are made apart are added in f32 too. With `a` and `b` in f8e4m3, `out` is f32 or bf16 and `bias` bf16; their sums
   * stay in the matrix units (with fewer bits than f32 has), which is faster.
   *
   * Any sizes, strides and element-aligned addresses are handed to the library as they are: its heuristics choose
   * kernels with narrower loads for odd ones. What it has no kernel for is refused by name, nothing is emulated.
   *
   * @throws {ShapeError} for operands that do not fit together, a bias with a result whose columns are dense, and
   *   float8 in other layouts and sizes than the matrix units read
   * @throws {FfiError} for what cuBLASLt does not do, and for every other status, with the plan
   */
  matmul(plan: MatmulPlan): void {
    const { a: { pointer: pointerA }, b: { pointer: pointerB }, out: { pointer: pointerOut }, bias } = plan;
    const pointerBias = bias === undefined ? 0n : bias.pointer;
    const prepared = this.#preparedFor(plan, pointerA, pointerB, pointerOut, pointerBias);
    if (prepared === undefined) return;
    const { swapped, descriptors: { operation }, candidates } = prepared;
    if (bias !== undefined) this.#setAddress(operation, "BIAS_POINTER", pointerBias);
    if (plan.scaleA !== undefined) this.#setScales(operation, plan, swapped);
    this.#alpha[0] = plan.alpha ?? 1;
    this.context.driver.enter();
    const [first, second] = swapped ? [pointerB, pointerA] : [pointerA, pointerB];
    if (!prepared.chosen) this.#chooseFirst(plan, prepared, first, second, pointerOut);
    if (candidates.length === 0) throw this.#refusal(plan);
    while (true) {
      const status = this.#issue(prepared, candidates[0], first, second, pointerOut);
      if (status === HEADER.CUBLAS_STATUS_SUCCESS) return;
      if (status !== HEADER.CUBLAS_STATUS_NOT_SUPPORTED || candidates.length === 1) {
        throw this.#lib.failure("cublasLtMatmul", status, describeMatmul(plan));
      }
      candidates.shift();
    }
  }

  /** Whether there is an algorithm for a product. */
  takes(plan: MatmulPlan): boolean {
    const { a, b, out, bias } = plan;
    const prepared = this.#preparedFor(plan, a.pointer, b.pointer, out.pointer, bias?.pointer ?? 0n);
    return prepared === undefined || prepared.candidates.length > 0;
  }

  /** What was prepared for such plans; undefined where the result has no elements. */
  #preparedFor(
    plan: MatmulPlan,
    pointerA: bigint,
    pointerB: bigint,
    pointerOut: bigint,
    pointerBias: bigint,
  ): Prepared | undefined {
    writeKey(this.#prepared.key, plan, pointerA, pointerB, pointerOut, pointerBias);
    const known = this.#prepared.get();
    if (known !== undefined) return known;
    const gemm = columnMajorGemm(plan);
    if (gemm === undefined) return undefined;
    this.context.driver.enter();
    const prepared = this.#prepare(plan, gemm);
    this.#prepared.set(prepared);
    return prepared;
  }

  #refusal(plan: MatmulPlan): FfiError {
    return new FfiError(`cuBLASLt ${this.version} has no algorithm for ${describeMatmul(plan)}`);
  }

  /** Puts the algorithm first that the device chooses. */
  #chooseFirst(plan: MatmulPlan, prepared: Prepared, a: bigint, b: bigint, out: bigint): void {
    const { candidates } = prepared;
    prepared.chosen = true;
    if (candidates.length < 2) return;
    const scaled = plan.scaleA === undefined ? "" : `, ${plan.scaleA.size} scales`;
    const work = `${describeMatmul(plan)}${scaled}, ${plan.activation}, of ${candidates.length}`;
    const index = this.context.choose(
      `cuBLASLt ${this.version} ${work}`,
      () =>
        candidates.map((algorithm) => () =>
          this.#issue(prepared, algorithm, a, b, out) === HEADER.CUBLAS_STATUS_SUCCESS
        ),
    );
    candidates.unshift(...candidates.splice(index, 1));
  }

  /** Returns the library's status. */
  #issue(
    { descriptors }: Prepared,
    { algo, workspaceBytes }: Algorithm,
    a: bigint,
    b: bigint,
    out: bigint,
  ): number {
    return this.#lib.symbols.cublasLtMatmul(
      this.#handle,
      descriptors.operation,
      this.#alpha,
      a,
      descriptors.a,
      b,
      descriptors.b,
      this.#beta,
      out, // C, which beta = 0 leaves unread
      descriptors.d,
      out,
      descriptors.d,
      algo,
      // Always the same size, so that the scratch does not grow and move with each new shape.
      workspaceBytes === 0 ? 0n : this.context.workspace(WORKSPACE_BYTES),
      BigInt(workspaceBytes),
      this.context.stream,
    );
  }

  [Symbol.dispose](): void {
    this.context.driver.enter();
    for (const { descriptors } of this.#prepared.values()) descriptors[Symbol.dispose]();
    this.#prepared.clear();
    this.#lib.check("cublasLtDestroy", this.#lib.symbols.cublasLtDestroy(this.#handle));
    this.#lib[Symbol.dispose]();
  }

  #prepare(plan: MatmulPlan, gemm: Gemm): Prepared {
    const descriptors = this.#lib.describe(gemm);
    try {
      // The heuristics read the alignment of the bias from its address, and whether there are scales from theirs.
      if (plan.bias !== undefined) {
        this.#setAddress(descriptors.operation, "BIAS_POINTER", plan.bias.pointer);
      }
      if (gemm.scaling !== undefined) this.#setScales(descriptors.operation, plan, gemm.swapped);
      const [a, b] = gemm.swapped ? [plan.b, plan.a] : [plan.a, plan.b];
      const alignments = [a, b, plan.out, plan.out].map(({ pointer }) => alignmentOf(pointer));
      using preference = this.#lib.preference(alignments);
      const candidates = this.#candidates(descriptors, preference.handle, plan);
      return { swapped: gemm.swapped, descriptors, candidates, chosen: false };
    } catch (error) {
      descriptors[Symbol.dispose]();
      throw error;
    }
  }

  #candidates(descriptors: GemmDescriptors, preference: bigint, plan: MatmulPlan): Algorithm[] {
    const { operation, a, b, d } = descriptors;
    const stride = HEADER["sizeof(cublasLtMatmulHeuristicResult_t)"];
    const results = new Uint8Array(CANDIDATES * stride);
    const count = new Int32Array(1);
    const status = this.#lib.symbols.cublasLtMatmulAlgoGetHeuristic(
      this.#handle,
      operation,
      a,
      b,
      d,
      d,
      preference,
      CANDIDATES,
      results,
      count,
    );
    // Which sizes it has kernels for with scales for rows, nobody knows beforehand.
    if (status === HEADER.CUBLAS_STATUS_NOT_SUPPORTED && plan.scaleA !== undefined) return [];
    this.#lib.check("cublasLtMatmulAlgoGetHeuristic", status, () => describeMatmul(plan));
    const view = new DataView(results.buffer);
    const candidates: Algorithm[] = [];
    for (let at = 0; at < count[0] * stride; at += stride) {
      const state = view.getInt32(at + HEADER["offsetof(cublasLtMatmulHeuristicResult_t, state)"], true);
      if (state !== HEADER.CUBLAS_STATUS_SUCCESS) continue;
      const workspaceAt = at + HEADER["offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize)"];
      candidates.push({
        algo: results.slice(at, at + HEADER["sizeof(cublasLtMatmulAlgo_t)"]),
        workspaceBytes: Number(view.getBigUint64(workspaceAt, true)),
      });
    }
    if (candidates.length === 0 && plan.scaleA === undefined) throw this.#refusal(plan);
    return candidates;
  }

  #setScales(operation: bigint, { scaleA, scaleB }: MatmulPlan, swapped: boolean): void {
    const [first, second] = swapped ? [scaleB!, scaleA!] : [scaleA!, scaleB!];
    this.#setAddress(operation, "A_SCALE_POINTER", first.pointer);
    this.#setAddress(operation, "B_SCALE_POINTER", second.pointer);
  }

  #setAddress(operation: bigint, attribute: AddressAttribute, pointer: bigint): void {
    this.#address[0] = pointer;
    this.#lib.setOperation(operation, `CUBLASLT_MATMUL_DESC_${attribute}`, this.#address);
  }
}

type AddressAttribute = "BIAS_POINTER" | "A_SCALE_POINTER" | "B_SCALE_POINTER";

type OperationAttribute = Extract<keyof typeof HEADER, `CUBLASLT_MATMUL_DESC_${string}`>;
type LayoutAttribute = Extract<keyof typeof HEADER, `CUBLASLT_MATRIX_LAYOUT_${string}`>;
type PreferenceAttribute = Extract<keyof typeof HEADER, `CUBLASLT_MATMUL_PREF_${string}`>;
type Value = Int8Array<ArrayBuffer> | Int32Array<ArrayBuffer> | BigUint64Array<ArrayBuffer>;

/** The opened library: its functions, its messages, and its descriptors, which need neither a handle nor a GPU. */
export class CublasLtLibrary implements Disposable {
  readonly symbols: OpenedLibrary<typeof CUBLASLT>["symbols"];
  readonly #library: OpenedLibrary<typeof CUBLASLT>;

  /**
   * @param newest the newest major version of CUDA that the driver takes
   * @throws {LibraryNotFoundError}
   */
  constructor(newest: number) {
    this.#library = openLibrary("cuBLASLt", CUBLASLT, {
      sonames: cudaSonames("libcublasLt", newest),
      hint:
        `pip install ${
          newest >= 13 ? "nvidia-cublas" : "nvidia-cublas-cu12"
        }, or install the CUDA toolkit; ` +
        "FLUX_LIB_PATH may name the library's folder",
    });
    this.symbols = this.#library.symbols;
    // It registers kernels with the CUDA runtime, and is not made to be unmapped while the process lives.
    pinLibrary(this.#library.path);
  }

  /** Makes the descriptors of a product: operation with epilogue, and a layout for each matrix. */
  describe(gemm: Gemm): GemmDescriptors {
    const { cublasLtMatmulDescCreate, cublasLtMatmulDescDestroy, cublasLtMatrixLayoutDestroy } = this.symbols;
    using made = new DisposableStack();
    const operation = this.created(
      "cublasLtMatmulDescCreate",
      (out) => cublasLtMatmulDescCreate(out, HEADER.CUBLAS_COMPUTE_32F, HEADER.CUDA_R_32F),
    );
    made.defer(() => this.check("cublasLtMatmulDescDestroy", cublasLtMatmulDescDestroy(operation)));
    this.setOperation(operation, "CUBLASLT_MATMUL_DESC_TRANSA", int32(transpose(gemm.transposeA)));
    this.setOperation(operation, "CUBLASLT_MATMUL_DESC_TRANSB", int32(transpose(gemm.transposeB)));
    this.setOperation(operation, "CUBLASLT_MATMUL_DESC_EPILOGUE", int32(epilogue(gemm)));
    if (gemm.bias !== undefined) {
      this.setOperation(operation, "CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE", int32(dataType(gemm.bias)));
    }
    if (gemm.scaling !== undefined) {
      this.setOperation(operation, "CUBLASLT_MATMUL_DESC_FAST_ACCUM", Int8Array.of(1));
    }
    if (gemm.scaling === "row") {
      const mode = int32(HEADER.CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F);
      this.setOperation(operation, "CUBLASLT_MATMUL_DESC_A_SCALE_MODE", mode);
      this.setOperation(operation, "CUBLASLT_MATMUL_DESC_B_SCALE_MODE", mode);
    }
    const layout = (matrix: ColumnMajor) => {
      const handle = this.#layout(matrix, gemm.batch);
      made.defer(() => this.check("cublasLtMatrixLayoutDestroy", cublasLtMatrixLayoutDestroy(handle)));
      return handle;
    };
    const [a, b, d] = [gemm.a, gemm.b, gemm.d].map(layout);
    const kept = made.move();
    return { operation, a, b, d, [Symbol.dispose]: () => kept.dispose() };
  }

  /** What the heuristics have to keep to: scratch, f32 partial sums, and the alignments of A, B, C and D in bytes. */
  preference(alignments: readonly number[]): { readonly handle: bigint } & Disposable {
    const { cublasLtMatmulPreferenceCreate, cublasLtMatmulPreferenceDestroy } = this.symbols;
    const handle = this.created("cublasLtMatmulPreferenceCreate", cublasLtMatmulPreferenceCreate);
    using made = new DisposableStack();
    made.defer(() => this.check("cublasLtMatmulPreferenceDestroy", cublasLtMatmulPreferenceDestroy(handle)));
    const set = (attribute: PreferenceAttribute, value: Value) => {
      const { cublasLtMatmulPreferenceSetAttribute } = this.symbols;
      const bytes = BigInt(value.byteLength);
      const status = cublasLtMatmulPreferenceSetAttribute(handle, HEADER[attribute], value, bytes);
      this.check("cublasLtMatmulPreferenceSetAttribute", status, () => attribute);
    };
    set("CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES", uint64(WORKSPACE_BYTES));
    set("CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK", int32(HEADER.CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    set("CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES", int32(alignments[0]));
    set("CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES", int32(alignments[1]));
    set("CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES", int32(alignments[2]));
    set("CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES", int32(alignments[3]));
    const kept = made.move();
    return { handle, [Symbol.dispose]: () => kept.dispose() };
  }

  setOperation(operation: bigint, attribute: OperationAttribute, value: Value): void {
    const { cublasLtMatmulDescSetAttribute } = this.symbols;
    const status = cublasLtMatmulDescSetAttribute(
      operation,
      HEADER[attribute],
      value,
      BigInt(value.byteLength),
    );
    if (status !== HEADER.CUBLAS_STATUS_SUCCESS) {
      throw this.failure("cublasLtMatmulDescSetAttribute", status, attribute);
    }
  }

  /** The object that a function of the library creates through its first parameter. */
  created(call: string, create: (out: BigUint64Array<ArrayBuffer>) => number): bigint {
    const out = new BigUint64Array(1);
    this.check(call, create(out));
    return out[0];
  }

  check(call: string, status: number, context?: () => string): void {
    if (status !== HEADER.CUBLAS_STATUS_SUCCESS) throw this.failure(call, status, context?.());
  }

  /** The error for a status, in the library's own words. */
  failure(call: string, status: number, context: string | undefined): FfiError {
    const { cublasLtGetStatusName, cublasLtGetStatusString } = this.symbols;
    const name = cString(cublasLtGetStatusName(status));
    const text = cString(cublasLtGetStatusString(status));
    const where = context === undefined ? "" : ` for ${context}`;
    return new FfiError(`cuBLASLt: ${call} failed${where}: ${name} (${status}), ${text}`);
  }

  [Symbol.dispose](): void {
    this.#library.close();
  }

  #layout(matrix: ColumnMajor, batch: number): bigint {
    const { cublasLtMatrixLayoutCreate, cublasLtMatrixLayoutDestroy } = this.symbols;
    const { dtype, rows, columns, ld, batchStride } = matrix;
    const layout = this.created(
      "cublasLtMatrixLayoutCreate",
      (out) => cublasLtMatrixLayoutCreate(out, dataType(dtype), BigInt(rows), BigInt(columns), BigInt(ld)),
    );
    const set = (attribute: LayoutAttribute, value: Value) => {
      const { cublasLtMatrixLayoutSetAttribute } = this.symbols;
      const bytes = BigInt(value.byteLength);
      const status = cublasLtMatrixLayoutSetAttribute(layout, HEADER[attribute], value, bytes);
      if (status === HEADER.CUBLAS_STATUS_SUCCESS) return;
      cublasLtMatrixLayoutDestroy(layout);
      throw this.failure("cublasLtMatrixLayoutSetAttribute", status, attribute);
    };
    if (batch > 1) {
      set("CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT", int32(batch));
      set("CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET", uint64(batchStride));
    }
    return layout;
  }
}

/**
 * A plan in cuBLASLt's terms, or undefined where the result has no elements.
 *
 * The memory of a row-major matrix is that of its transpose in column-major order. So `out = a @ b^T` with dense rows
 * is `out^T = b @ a^T` there: the plan's `b` comes first, and is to be transposed where its own rows are dense (as a
 * Linear layer's weights are). Where `out` has dense columns instead, `a` comes first.
 *
 * @throws {ShapeError} where the plan's operands do not fit together or are not made for cuBLASLt
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
  for (const { dtype } of [a, b, out]) require(DATA_TYPES[dtype] !== undefined, `no ${dtype} here`);
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

/** Writes all that a prepared product depends on; plans with the same numbers share it. */
function writeKey(
  key: Float64Array,
  { a, b, bias, out, activation, scaleA, scaleB }: MatmulPlan,
  pointerA: bigint,
  pointerB: bigint,
  pointerOut: bigint,
  pointerBias: bigint,
): void {
  writeMatrix(key, 0, a);
  writeMatrix(key, 6, b);
  writeMatrix(key, 12, out);
  key[18] = alignmentOf(pointerA);
  key[19] = alignmentOf(pointerB);
  key[20] = alignmentOf(pointerOut);
  key[21] = bias === undefined ? 0 : alignmentOf(pointerBias);
  writeVector(key, 22, bias);
  writeVector(key, 24, scaleA);
  writeVector(key, 26, scaleB);
  key[28] = activation === undefined ? 0 : 1;
  key[29] = 0;
  for (const tensor of [a, b, out, bias, scaleA, scaleB]) key[29] = key[29] * 32 + dtypeCode(tensor);
}

function writeMatrix(key: Float64Array, at: number, { shape, strides }: Tensor): void {
  const rank = shape.length;
  // -1 keeps rank 2 apart from a batch of one.
  key[at] = rank === 3 ? shape[0] : -1;
  key[at + 1] = rank === 3 ? strides[0] : -rank;
  key[at + 2] = shape[rank - 2];
  key[at + 3] = strides[rank - 2];
  key[at + 4] = shape[rank - 1];
  key[at + 5] = strides[rank - 1];
}

function writeVector(key: Float64Array, at: number, vector: Tensor | undefined): void {
  key[at] = vector === undefined ? -1 : vector.rank === 1 ? vector.shape[0] : -2;
  key[at + 1] = vector === undefined ? 0 : vector.strides[0];
}

function dtypeCode(tensor: Tensor | undefined): number {
  return tensor === undefined ? 31 : DATA_TYPES[tensor.dtype] ?? 30;
}

/** The largest power of two that divides an address, up to {@link MAX_ALIGNMENT}. */
function alignmentOf(pointer: bigint): number {
  const low = Number(BigInt.asUintN(8, pointer));
  return low === 0 ? MAX_ALIGNMENT : low & -low;
}

function epilogue({ bias, activation }: Gemm): number {
  if (activation === undefined) {
    return bias === undefined ? HEADER.CUBLASLT_EPILOGUE_DEFAULT : HEADER.CUBLASLT_EPILOGUE_BIAS;
  }
  return bias === undefined ? HEADER.CUBLASLT_EPILOGUE_GELU : HEADER.CUBLASLT_EPILOGUE_GELU_BIAS;
}

function transpose(wanted: boolean): number {
  return wanted ? HEADER.CUBLAS_OP_T : HEADER.CUBLAS_OP_N;
}

function dataType(dtype: DType): number {
  return DATA_TYPES[dtype]!;
}

function int32(value: number): Int32Array<ArrayBuffer> {
  return Int32Array.of(value);
}

function uint64(value: number): BigUint64Array<ArrayBuffer> {
  return BigUint64Array.of(BigInt(value));
}

function cString(pointer: Deno.PointerValue): string {
  return pointer === null ? "no text" : new Deno.UnsafePointerView(pointer).getCString();
}
