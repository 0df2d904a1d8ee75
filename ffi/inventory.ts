/** What of the native libraries and GPUs that this project can use is on this machine. Computes nothing. */
import { openDriver } from "./cuda/driver.ts";
import { HEADER } from "./cuda/driver_header.ts";
import { findFlashAttention3, INSTALL_FLASH_ATTENTION3 } from "./cuda/flash_attn3.ts";
import { askNvml } from "./cuda/nvml.ts";
import { cudaSonames, cuptiVersion, dottedVersion, NEWEST_CUDA } from "./cuda/versions.ts";
import { briefly, FfiError } from "./errors.ts";
import { findAiter, INSTALL_AITER } from "./hip/aiter.ts";
import { HIPBLASLT_SONAMES } from "./hip/hipblaslt.ts";
import { HIPRTC_SONAMES } from "./hip/hiprtc.ts";
import { MIOPEN_SONAMES } from "./hip/miopen.ts";
import { openRuntime } from "./hip/runtime.ts";
import { hipVersion, INSTALL_ROCM } from "./hip/versions.ts";
import { LibraryNotFoundError, type OpenedLibrary, openLibrary, pinLibrary } from "./library.ts";

export type LibraryName =
  | "NVIDIA driver"
  | "NVML"
  | "NVRTC"
  | "cuBLASLt"
  | "cuDNN"
  | "CUPTI"
  | "FlashAttention-3"
  | "NCCL"
  | "HIP"
  | "hipRTC"
  | "hipBLASLt"
  | "MIOpen"
  | "AITER"
  | "oneDNN";

/** A library that was looked for. */
export interface FoundLibrary {
  readonly name: LibraryName;
  /** What it is for, in a few words. */
  readonly purpose: string;
  /** The path, or the bare file name where the loader's own search found it; undefined when there is none. */
  readonly path: string | undefined;
  /** E.g. `"9.14.0"`; undefined when there is none, or it does not tell. */
  readonly version: string | undefined;
  /** Why it cannot be used, or undefined when it can. */
  readonly problem: string | undefined;
  /** The command that installs it. */
  readonly install: string;
}

export interface FoundGpu {
  /** As given to openDevice: `"cuda:0"`, `"hip:0"`. */
  readonly device: string;
  readonly description: string;
  readonly memoryBytes: number;
  /** What compilers know it by: `"compute capability 9.0"`, `"gfx942"`. */
  readonly architecture: string;
}

export interface Inventory {
  readonly libraries: readonly FoundLibrary[];
  readonly gpus: readonly FoundGpu[];
  /** Of the NVIDIA driver, e.g. `"580.159.04"`, and the newest CUDA version that it takes. */
  readonly driverVersion: string | undefined;
  readonly cudaVersion: string | undefined;
  /** Of HIP, e.g. `"6.2.41133"`. */
  readonly hipVersion: string | undefined;
}

/** A library that is opened only to ask for its version, or only looked for. */
interface Probe {
  readonly name: LibraryName;
  readonly purpose: string;
  readonly install: string;
  readonly open: () => { readonly path: string; readonly version: string | undefined };
}

/** A probe by the library's version function alone. */
function probe<const S extends Deno.ForeignLibraryInterface>(
  what: Omit<Probe, "open"> & { readonly sonames: readonly string[] },
  symbols: S,
  version: (symbols: OpenedLibrary<S>["symbols"]) => string | undefined,
): Probe {
  const open = () => {
    const library = openLibrary(what.name, symbols, { sonames: what.sonames });
    pinLibrary(library.path); // none of these is made to be unmapped before the process ends
    return { path: library.path, version: version(library.symbols) };
  };
  const { name, purpose, install } = what;
  return { name, purpose, install, open };
}

const PROBES: readonly Probe[] = [
  {
    name: "NVML",
    purpose: "the driver's version",
    install: "it comes with the NVIDIA driver",
    open: () => {
      const { path, driverVersion } = askNvml();
      return { path, version: driverVersion };
    },
  },
  probe(
    {
      name: "NVRTC",
      purpose: "compiles kernels",
      sonames: cudaSonames("libnvrtc", NEWEST_CUDA),
      install: "pip install nvidia-cuda-nvrtc",
    },
    // nvrtcResult nvrtcVersion(int *major, int *minor)
    { nvrtcVersion: { parameters: ["buffer", "buffer"], result: "i32" } },
    ({ nvrtcVersion }) => majorMinor(nvrtcVersion),
  ),
  probe(
    {
      name: "cuBLASLt",
      purpose: "matrix products",
      sonames: cudaSonames("libcublasLt", NEWEST_CUDA),
      install: "pip install nvidia-cublas",
    },
    // size_t cublasLtGetVersion(void)
    { cublasLtGetVersion: { parameters: [], result: "usize" } },
    (cublas) => dottedVersion(Number(cublas.cublasLtGetVersion())),
  ),
  probe(
    {
      name: "cuDNN",
      purpose: "convolutions, attention",
      sonames: ["libcudnn.so.9"],
      install: "pip install nvidia-cudnn-cu13",
    },
    // size_t cudnnGetVersion(void)
    { cudnnGetVersion: { parameters: [], result: "usize" } },
    (cudnn) => dottedVersion(Number(cudnn.cudnnGetVersion())),
  ),
  probe(
    {
      name: "CUPTI",
      purpose: "traces of kernels",
      sonames: cudaSonames("libcupti", NEWEST_CUDA),
      install: "pip install nvidia-cuda-cupti",
    },
    // CUptiResult cuptiGetVersion(uint32_t *version)
    { cuptiGetVersion: { parameters: ["buffer"], result: "i32" } },
    (cupti) => {
      const version = new Uint32Array(1);
      return cupti.cuptiGetVersion(version) === 0 ? cuptiVersion(version[0]) : undefined;
    },
  ),
  {
    name: "FlashAttention-3",
    purpose: "attention by --attention fa3",
    install: `${INSTALL_FLASH_ATTENTION3}  # brings PyTorch; only for --attention fa3`,
    open: findFlashAttention3,
  },
  probe(
    {
      name: "NCCL",
      purpose: "several GPUs",
      sonames: ["libnccl.so.2"],
      install: "pip install nvidia-nccl-cu13",
    },
    // ncclResult_t ncclGetVersion(int *version)
    { ncclGetVersion: { parameters: ["buffer"], result: "i32" } },
    (nccl) => {
      const version = new Int32Array(1);
      return nccl.ncclGetVersion(version) === 0 ? dottedVersion(version[0]) : undefined;
    },
  ),
  probe(
    {
      name: "hipRTC",
      purpose: "compiles kernels (AMD)",
      sonames: HIPRTC_SONAMES,
      install: `apt-get install hip-dev, or ${INSTALL_ROCM}`,
    },
    // hiprtcResult hiprtcVersion(int *major, int *minor)
    { hiprtcVersion: { parameters: ["buffer", "buffer"], result: "i32" } },
    ({ hiprtcVersion }) => majorMinor(hiprtcVersion),
  ),
  probe(
    {
      name: "hipBLASLt",
      purpose: "matrix products (AMD)",
      sonames: HIPBLASLT_SONAMES,
      install: `apt-get install hipblaslt, or ${INSTALL_ROCM}`,
    },
    {}, // its version takes a handle, and so a GPU
    () => undefined,
  ),
  probe(
    {
      name: "MIOpen",
      purpose: "convolutions (AMD)",
      sonames: MIOPEN_SONAMES,
      install: `apt-get install miopen-hip, or ${INSTALL_ROCM}`,
    },
    // miopenStatus_t miopenGetVersion(size_t *major, size_t *minor, size_t *patch)
    { miopenGetVersion: { parameters: ["buffer", "buffer", "buffer"], result: "i32" } },
    (miopen) => {
      const numbers = [0, 0, 0].map(() => new BigUint64Array(1));
      const [major, minor, patch] = numbers;
      return miopen.miopenGetVersion(major, minor, patch) === 0
        ? numbers.map(([number]) => number).join(".")
        : undefined;
    },
  ),
  {
    name: "AITER",
    purpose: "attention (AMD)",
    install: INSTALL_AITER,
    open: () => findAiter("gfx942"), // its package has the files of all GPUs
  },
  probe(
    {
      name: "oneDNN",
      purpose: "the CPU's matrix products and convolutions",
      sonames: ["libdnnl.so.2"],
      install: "apt-get install libdnnl2",
    },
    // const dnnl_version_t *dnnl_version(void): starts with int major, minor, patch
    { dnnl_version: { parameters: [], result: "pointer" } },
    (dnnl) => {
      const pointer = dnnl.dnnl_version();
      if (pointer === null) return undefined;
      const view = new Deno.UnsafePointerView(pointer);
      return [0, 4, 8].map((offset) => view.getInt32(offset)).join(".");
    },
  ),
];

const HIP = { name: "HIP", purpose: "the GPU (AMD)", install: INSTALL_ROCM } as const;

const DRIVER = {
  name: "NVIDIA driver",
  purpose: "the GPU",
  install: "install NVIDIA's driver, e.g. apt-get install nvidia-driver-580-server",
} as const;

/**
 * Looks for all libraries and GPUs. What is missing is in the result, not an error.
 *
 * @throws {FfiError} when this process may not use FFI
 */
export function takeInventory(): Inventory {
  const { driver, gpus, cudaVersion } = findGpus();
  const amd = findAmdGpus();
  const libraries = PROBES.map(({ name, purpose, install, open }): FoundLibrary => {
    try {
      const { path, version } = open();
      return { name, purpose, install, path, version, problem: undefined };
    } catch (error) {
      if (!(error instanceof LibraryNotFoundError)) throw error;
      return { name, purpose, install, path: undefined, version: undefined, problem: briefly(error) };
    }
  });
  const driverVersion = libraries.find(({ name }) => name === "NVML")!.version;
  const at = libraries.findIndex(({ name }) => name === "hipRTC"); // HIP's runtime stands before its libraries
  return {
    libraries: [driver, ...libraries.slice(0, at), amd.hip, ...libraries.slice(at)],
    gpus: [...gpus, ...amd.gpus],
    driverVersion,
    cudaVersion,
    hipVersion: amd.hip.version,
  };
}

/** A version that is given as two numbers. */
function majorMinor(
  ask: (major: Int32Array<ArrayBuffer>, minor: Int32Array<ArrayBuffer>) => number,
): string | undefined {
  const [major, minor] = [new Int32Array(1), new Int32Array(1)];
  return ask(major, minor) === 0 ? `${major[0]}.${minor[0]}` : undefined;
}

function findAmdGpus(): { hip: FoundLibrary; gpus: FoundGpu[] } {
  try {
    using runtime = openRuntime();
    const gpus = Array.from({ length: runtime.getDeviceCount() }, (_, index): FoundGpu => ({
      device: `hip:${index}`,
      description: runtime.deviceGetName(index),
      memoryBytes: runtime.deviceTotalMem(index),
      architecture: runtime.deviceArchitecture(index),
    }));
    const found = {
      path: runtime.path,
      version: hipVersion(runtime.runtimeGetVersion()),
      problem: undefined,
    };
    return { hip: { ...HIP, ...found }, gpus };
  } catch (error) {
    if (!(error instanceof FfiError)) throw error;
    return { hip: { ...HIP, path: undefined, version: undefined, problem: briefly(error) }, gpus: [] };
  }
}

function findGpus(): { driver: FoundLibrary; gpus: FoundGpu[]; cudaVersion: string | undefined } {
  try {
    using driver = openDriver();
    const version = driver.driverGetVersion().join(".");
    const gpus = Array.from({ length: driver.deviceGetCount() }, (_, index): FoundGpu => {
      const device = driver.deviceGet(index);
      const attribute = (name: keyof typeof HEADER) => driver.deviceGetAttribute(HEADER[name], device);
      const major = attribute("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR");
      const minor = attribute("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR");
      return {
        device: `cuda:${index}`,
        description: driver.deviceGetName(device),
        memoryBytes: driver.deviceTotalMem(device),
        architecture: `compute capability ${major}.${minor}`,
      };
    });
    const found = { path: driver.path, version: `CUDA ${version}`, problem: undefined };
    return { driver: { ...DRIVER, ...found }, gpus, cudaVersion: version };
  } catch (error) {
    if (!(error instanceof FfiError)) throw error;
    const missing = { path: undefined, version: undefined, problem: briefly(error) };
    return { driver: { ...DRIVER, ...missing }, gpus: [], cudaVersion: undefined };
  }
}
