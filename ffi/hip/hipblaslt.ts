/**
 * hipBLASLt by FFI: matrix products on AMD GPUs. What it does and how it is called is in gpu_blaslt.ts, since cuBLASLt is
 * called in the same way. The twin of cuda/cublaslt.ts.
 *
 * Source: `hipblaslt.h`, `hipblas-common.h` and `library_types.h` of ROCm 6.2 and 7.
 */
import { float8FormatOf } from "../float8.ts";
import { BlasLt } from "../gpu_blaslt.ts";
import { type BlasLtHeader, BlasLtLibrary } from "../gpu_blaslt_library.ts";
import type { HipContext } from "./context.ts";
import { hipblasLtVersion, INSTALL_ROCM } from "./versions.ts";

const HIPBLASLT = {
  // hipblasStatus_t hipblasLtGetVersion(hipblasLtHandle_t handle, int *version)
  hipblasLtGetVersion: { parameters: ["u64", "buffer"], result: "i32" },
} as const satisfies Deno.ForeignLibraryInterface;

/** File names of the library, newest first. */
export const HIPBLASLT_SONAMES: readonly string[] = ["libhipblaslt.so.1", "libhipblaslt.so.0"];

/** Values, sizes and offsets of the headers, under the headers' names. */
export const HEADER = {
  HIPBLAS_STATUS_SUCCESS: 0,
  HIPBLAS_STATUS_NOT_SUPPORTED: 7,

  HIP_R_32F: 0,
  HIP_R_16F: 2,
  HIP_R_16BF: 14,
  HIP_R_8F_E4M3: 28,
  HIP_R_8F_E4M3_FNUZ: 1000,
  HIPBLAS_COMPUTE_32F: 2, // "fast" variants beside it would round f32 inputs
  HIPBLAS_OP_N: 111,
  HIPBLAS_OP_T: 112,

  HIPBLASLT_MATMUL_DESC_TRANSA: 0,
  HIPBLASLT_MATMUL_DESC_TRANSB: 1,
  HIPBLASLT_MATMUL_DESC_EPILOGUE: 2,
  HIPBLASLT_MATMUL_DESC_BIAS_POINTER: 3,
  HIPBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: 4,
  HIPBLASLT_MATMUL_DESC_A_SCALE_POINTER: 5,
  HIPBLASLT_MATMUL_DESC_B_SCALE_POINTER: 6,
  HIPBLASLT_MATMUL_DESC_A_SCALE_MODE: 31,
  HIPBLASLT_MATMUL_DESC_B_SCALE_MODE: 32,
  HIPBLASLT_MATMUL_DESC_A_SCALE_POINTER_VEC_EXT: 102, // before 1.0; then another attribute has this number
  HIPBLASLT_MATMUL_DESC_B_SCALE_POINTER_VEC_EXT: 103,
  HIPBLASLT_EPILOGUE_DEFAULT: 1,
  HIPBLASLT_EPILOGUE_BIAS: 4,
  HIPBLASLT_EPILOGUE_GELU: 32, // its tanh form
  HIPBLASLT_EPILOGUE_GELU_BIAS: 36,
  HIPBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F: 3, // from 1.0 on

  HIPBLASLT_MATRIX_LAYOUT_BATCH_COUNT: 0,
  HIPBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET: 1,
  HIPBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES: 1,

  "sizeof(hipblasLtMatmulAlgo_t)": 24,
  "sizeof(hipblasLtMatmulHeuristicResult_t)": 56,
  "offsetof(hipblasLtMatmulHeuristicResult_t, workspaceSize)": 24,
  "offsetof(hipblasLtMatmulHeuristicResult_t, state)": 32,
} as const;

/** Names of hipblasStatus_t: the library has no function for them. */
const STATUSES: readonly string[] = [
  "HIPBLAS_STATUS_SUCCESS",
  "HIPBLAS_STATUS_NOT_INITIALIZED",
  "HIPBLAS_STATUS_ALLOC_FAILED",
  "HIPBLAS_STATUS_INVALID_VALUE",
  "HIPBLAS_STATUS_MAPPING_ERROR",
  "HIPBLAS_STATUS_EXECUTION_FAILED",
  "HIPBLAS_STATUS_INTERNAL_ERROR",
  "HIPBLAS_STATUS_NOT_SUPPORTED",
  "HIPBLAS_STATUS_ARCH_MISMATCH",
  "HIPBLAS_STATUS_HANDLE_IS_NULLPTR",
  "HIPBLAS_STATUS_INVALID_ENUM",
  "HIPBLAS_STATUS_UNKNOWN",
];

/** The first version whose scales for rows are told by a mode. */
const FIRST_WITH_SCALE_MODES = 100_000;

/** What the header says to {@link BlasLt}, for a GPU with float8 in this format. */
function headerFor(float8: "ocp" | "fnuz"): BlasLtHeader {
  return {
    prefix: "hipblasLt",
    success: HEADER.HIPBLAS_STATUS_SUCCESS,
    notSupported: HEADER.HIPBLAS_STATUS_NOT_SUPPORTED,
    dataTypes: {
      f32: HEADER.HIP_R_32F,
      f16: HEADER.HIP_R_16F,
      bf16: HEADER.HIP_R_16BF,
      f8e4m3: float8 === "fnuz" ? HEADER.HIP_R_8F_E4M3_FNUZ : HEADER.HIP_R_8F_E4M3,
    },
    compute32f: HEADER.HIPBLAS_COMPUTE_32F,
    notTransposed: HEADER.HIPBLAS_OP_N,
    transposed: HEADER.HIPBLAS_OP_T,
    desc: {
      transA: HEADER.HIPBLASLT_MATMUL_DESC_TRANSA,
      transB: HEADER.HIPBLASLT_MATMUL_DESC_TRANSB,
      epilogue: HEADER.HIPBLASLT_MATMUL_DESC_EPILOGUE,
      biasPointer: HEADER.HIPBLASLT_MATMUL_DESC_BIAS_POINTER,
      biasDataType: HEADER.HIPBLASLT_MATMUL_DESC_BIAS_DATA_TYPE,
      scalePointerA: HEADER.HIPBLASLT_MATMUL_DESC_A_SCALE_POINTER,
      scalePointerB: HEADER.HIPBLASLT_MATMUL_DESC_B_SCALE_POINTER,
    },
    rowScales: {
      modeA: HEADER.HIPBLASLT_MATMUL_DESC_A_SCALE_MODE,
      modeB: HEADER.HIPBLASLT_MATMUL_DESC_B_SCALE_MODE,
      outerVector: HEADER.HIPBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F,
    },
    epilogues: {
      none: HEADER.HIPBLASLT_EPILOGUE_DEFAULT,
      bias: HEADER.HIPBLASLT_EPILOGUE_BIAS,
      gelu: HEADER.HIPBLASLT_EPILOGUE_GELU,
      geluBias: HEADER.HIPBLASLT_EPILOGUE_GELU_BIAS,
    },
    layout: {
      batchCount: HEADER.HIPBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
      batchStride: HEADER.HIPBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
    },
    preference: { maxWorkspace: HEADER.HIPBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES },
    algoBytes: HEADER["sizeof(hipblasLtMatmulAlgo_t)"],
    resultBytes: HEADER["sizeof(hipblasLtMatmulHeuristicResult_t)"],
    workspaceOffset: HEADER["offsetof(hipblasLtMatmulHeuristicResult_t, workspaceSize)"],
    stateOffset: HEADER["offsetof(hipblasLtMatmulHeuristicResult_t, state)"],
  };
}

/** The opened library. */
export class HipblasLtLibrary extends BlasLtLibrary<typeof HIPBLASLT> {
  /** @param architecture of the GPU, e.g. `"gfx942"`. @throws {LibraryNotFoundError} */
  constructor(architecture: string) {
    super(
      "hipBLASLt",
      headerFor(float8FormatOf(architecture)),
      HIPBLASLT,
      { sonames: HIPBLASLT_SONAMES, hint: `apt-get install hipblaslt, or ${INSTALL_ROCM}` },
      (_, status) => `${STATUSES[status] ?? "unknown status"} (${status})`,
    );
  }

  /** The version, with which goes how scales for rows are told. */
  versionOf(handle: bigint): string {
    const version = new Int32Array(1);
    this.check("GetVersion", this.own.hipblasLtGetVersion(handle, version));
    if (version[0] < FIRST_WITH_SCALE_MODES) {
      this.header = {
        ...this.header,
        rowScales: {
          pointerA: HEADER.HIPBLASLT_MATMUL_DESC_A_SCALE_POINTER_VEC_EXT,
          pointerB: HEADER.HIPBLASLT_MATMUL_DESC_B_SCALE_POINTER_VEC_EXT,
        },
      };
    }
    return hipblasLtVersion(version[0]);
  }
}

/** Matrix products on one HIP device. */
export class HipblasLt extends BlasLt<typeof HIPBLASLT> {
  /**
   * Finds and opens libhipblaslt.
   *
   * @throws {FfiError} with the reason: not found (a LibraryNotFoundError), or no handle for this GPU
   */
  constructor(context: HipContext) {
    const library = new HipblasLtLibrary(context.architecture);
    super(context, library, (handle) => library.versionOf(handle));
  }
}
