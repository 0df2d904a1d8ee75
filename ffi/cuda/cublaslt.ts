/**
 * cuBLASLt by FFI: matrix products on NVIDIA GPUs. What it does and how it is called is in gpu_blaslt.ts, since hipBLASLt
 * is called in the same way.
 *
 * Source: `cublasLt.h`, `cublas_api.h` and `library_types.h` of CUDA 13.0; 12.x has the same functions and values.
 */
import { BlasLt } from "../gpu_blaslt.ts";
import { type BlasLtHeader, BlasLtLibrary } from "../gpu_blaslt_library.ts";
import { textAt } from "../library.ts";
import type { CudaContext } from "./context.ts";
import { cudaSonames, dottedVersion } from "./versions.ts";

const CUBLASLT = {
  // size_t cublasLtGetVersion(void)
  cublasLtGetVersion: { parameters: [], result: "usize" },
  // const char *cublasLtGetStatusName(cublasStatus_t status)
  cublasLtGetStatusName: { parameters: ["i32"], result: "pointer" },
  // const char *cublasLtGetStatusString(cublasStatus_t status)
  cublasLtGetStatusString: { parameters: ["i32"], result: "pointer" },
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

const BLASLT: BlasLtHeader = {
  prefix: "cublasLt",
  success: HEADER.CUBLAS_STATUS_SUCCESS,
  notSupported: HEADER.CUBLAS_STATUS_NOT_SUPPORTED,
  dataTypes: {
    f32: HEADER.CUDA_R_32F,
    f16: HEADER.CUDA_R_16F,
    bf16: HEADER.CUDA_R_16BF,
    f8e4m3: HEADER.CUDA_R_8F_E4M3,
  },
  compute32f: HEADER.CUBLAS_COMPUTE_32F,
  notTransposed: HEADER.CUBLAS_OP_N,
  transposed: HEADER.CUBLAS_OP_T,
  desc: {
    transA: HEADER.CUBLASLT_MATMUL_DESC_TRANSA,
    transB: HEADER.CUBLASLT_MATMUL_DESC_TRANSB,
    epilogue: HEADER.CUBLASLT_MATMUL_DESC_EPILOGUE,
    biasPointer: HEADER.CUBLASLT_MATMUL_DESC_BIAS_POINTER,
    biasDataType: HEADER.CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE,
    scalePointerA: HEADER.CUBLASLT_MATMUL_DESC_A_SCALE_POINTER,
    scalePointerB: HEADER.CUBLASLT_MATMUL_DESC_B_SCALE_POINTER,
  },
  fastAccum: HEADER.CUBLASLT_MATMUL_DESC_FAST_ACCUM,
  rowScales: {
    modeA: HEADER.CUBLASLT_MATMUL_DESC_A_SCALE_MODE,
    modeB: HEADER.CUBLASLT_MATMUL_DESC_B_SCALE_MODE,
    outerVector: HEADER.CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F,
  },
  epilogues: {
    none: HEADER.CUBLASLT_EPILOGUE_DEFAULT,
    bias: HEADER.CUBLASLT_EPILOGUE_BIAS,
    gelu: HEADER.CUBLASLT_EPILOGUE_GELU,
    geluBias: HEADER.CUBLASLT_EPILOGUE_GELU_BIAS,
  },
  layout: {
    batchCount: HEADER.CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
    batchStride: HEADER.CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
  },
  preference: {
    maxWorkspace: HEADER.CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
    reduction: {
      mask: HEADER.CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
      computeType: HEADER.CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE,
    },
    alignments: [
      HEADER.CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
      HEADER.CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
      HEADER.CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
      HEADER.CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
    ],
  },
  algoBytes: HEADER["sizeof(cublasLtMatmulAlgo_t)"],
  resultBytes: HEADER["sizeof(cublasLtMatmulHeuristicResult_t)"],
  workspaceOffset: HEADER["offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize)"],
  stateOffset: HEADER["offsetof(cublasLtMatmulHeuristicResult_t, state)"],
};

/** The opened library. */
export class CublasLtLibrary extends BlasLtLibrary<typeof CUBLASLT> {
  /**
   * @param newest the newest major version of CUDA that the driver takes
   * @throws {LibraryNotFoundError}
   */
  constructor(newest: number) {
    const packages = newest >= 13 ? "nvidia-cublas" : "nvidia-cublas-cu12";
    super("cuBLASLt", BLASLT, CUBLASLT, {
      sonames: cudaSonames("libcublasLt", newest),
      hint:
        `pip install ${packages}, or install the CUDA toolkit; FLUX_LIB_PATH may name the library's folder`,
    }, ({ cublasLtGetStatusName, cublasLtGetStatusString }, status) => {
      const [name, text] = [cublasLtGetStatusName(status), cublasLtGetStatusString(status)].map((given) =>
        textAt(given) ?? "no text"
      );
      return `${name} (${status}), ${text}`;
    });
  }
}

/** Matrix products on one CUDA device. */
export class CublasLt extends BlasLt<typeof CUBLASLT> {
  /**
   * Finds and opens libcublasLt.
   *
   * @throws {FfiError} with the reason: not found (a LibraryNotFoundError), or no handle for this GPU and driver
   */
  constructor(context: CudaContext) {
    const library = new CublasLtLibrary(context.driver.driverGetVersion()[0]);
    super(context, library, () => dottedVersion(Number(library.own.cublasLtGetVersion())));
  }
}
