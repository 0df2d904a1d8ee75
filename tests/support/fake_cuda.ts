/** fake_cuda.c and fake_cupti.c, compiled and put in the place of the NVIDIA driver, of NVRTC and of CUPTI. */
import { fileURLToPath } from "node:url";
import type { CudaDevice } from "../../ffi/cuda/device.ts";
import { openCuda } from "../../ffi/cuda/open.ts";
import type { Tensor } from "../../ffi/tensor.ts";

const SOURCES = ["fake_cuda.c", "fake_cupti.c"].map((name) => fileURLToPath(new URL(name, import.meta.url)));
const LIBRARY_PATH = "FLUX_LIB_PATH";

const SYMBOLS = {
  // void fake_reset(u64 bytes, int count, int isPatient, int computeCapability)
  fake_reset: { parameters: ["u64", "i32", "i32", "i32"], result: "void" },
  // void fake_fail(const char *name, int status, int after)
  fake_fail: { parameters: ["buffer", "i32", "i32"], result: "void" },
  // int fake_alive(void)
  fake_alive: { parameters: [], result: "i32" },
  // u64 fake_used(void)
  fake_used: { parameters: [], result: "u64" },
  // int fake_launches(void)
  fake_launches: { parameters: [], result: "i32" },
  // int fake_compilations(void)
  fake_compilations: { parameters: [], result: "i32" },
  // int fake_compilations_at_once(void)
  fake_compilations_at_once: { parameters: [], result: "i32" },
  // void fake_last_launch(uint32_t *sizes, unsigned char *arguments)
  fake_last_launch: { parameters: ["buffer", "buffer"], result: "void" },
  // void fake_cupti_reset(uint32_t itsVersion, int threads, int recordsPerBuffer)
  fake_cupti_reset: { parameters: ["u32", "i32", "i32"], result: "void" },
  // void fake_cupti_drop(u64 count)
  fake_cupti_drop: { parameters: ["u64"], result: "void" },
  // void fake_cupti_spoil(void)
  fake_cupti_spoil: { parameters: [], result: "void" },
  // int fake_cupti_buffers(int which)
  fake_cupti_buffers: { parameters: ["i32"], result: "i32" },
  // int fake_cupti_enabled(void)
  fake_cupti_enabled: { parameters: [], result: "i32" },
} as const satisfies Deno.ForeignLibraryInterface;

/** The fake driver knows kernels by their names. */
export const SOURCE = { name: "fake.cu", text: "kernels" };

/** A kernel that writes `value` into all of an i32 tensor. */
export function fill(device: CudaDevice, out: Tensor, value: number): void {
  device.launch(device.kernel(SOURCE, "fill"), { grid: 1, block: 32 }, [out, value, out.size]);
}

/** What a test sees of the fake driver, and can make it do. */
export interface FakeCuda {
  /** The folder with the fake libraries. */
  readonly folder: string;
  /** The next call of this function but `after` returns `status`. */
  fail(call: string, status: number, after?: number): void;
  /** Handles and mappings that are alive. */
  readonly alive: number;
  /** Bytes of the GPU's memory that are taken. */
  readonly used: number;
  readonly launches: number;
  readonly compilations: number;
  /** The most that were compiled at a time; those whose text has the word "slow" take 50 ms. */
  readonly compilationsAtOnce: number;
  lastLaunch(): { grid: number[]; block: number[]; shared: number; args: Uint8Array<ArrayBuffer> };
  readonly profiler: FakeProfiler;
}

/** The same for the fake CUPTI. */
export interface FakeProfiler {
  /** How many kinds of work are recorded. */
  readonly enabled: number;
  /** Buffers that were asked for, and that were given back. */
  readonly requested: number;
  readonly completed: number;
  /** Says of so many records that they had no room. */
  drop(count: number): void;
  /** Makes the current buffer end with what is no record. */
  spoil(): void;
}

export interface FakeOptions {
  /** Bytes of the GPU's memory; 1 GiB when left out. */
  readonly memory?: number;
  readonly devices?: number;
  /** How many queries say that there is work left; none when left out. */
  readonly patience?: number;
  /** 90 when left out: compute capability 9.0. */
  readonly capability?: number;
  readonly profiler?: {
    /** Of CUPTI; CUDA 13.0's when left out. */
    readonly version?: number;
    /** Who calls for its buffers; the thread that issues work when left out. See fake_cupti.c. */
    readonly threads?: (typeof THREADS)[number];
    /** After how many records a buffer is full; as many as fit when left out. */
    readonly recordsPerBuffer?: number;
  };
}

const THREADS = ["same", "waited for", "goes on"] as const;

/** Why C programs cannot be compiled here, or undefined where they can. */
export function missingCompiler(): string | undefined {
  if (Deno.build.os !== "linux") return "written for Linux";
  try {
    return compile(["--version"]).success ? undefined : "g++ does not start";
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return "no g++";
    if (error instanceof Deno.errors.NotCapable) return "this process may not run g++";
    throw error;
  }
}

/**
 * Runs the compiler, as one for C where nothing else is said. It gets no LD_LIBRARY_PATH: Deno starts a program with one only
 * where all programs may be started.
 */
export function compile(
  args: readonly string[],
  language: "c" | "c++" = "c",
): { success: boolean; text: string } {
  const env = { PATH: Deno.env.get("PATH") ?? "/usr/bin:/bin" };
  const command = new Deno.Command("g++", {
    args: ["-x", language, ...args],
    env,
    clearEnv: true,
    stdout: "null",
  });
  const { success, stderr } = command.outputSync();
  return { success, text: new TextDecoder().decode(stderr) };
}

let folder: string | undefined;

/** The folder with the fake libraries, made at the first call and removed when the process ends. */
function libraries(): string {
  if (folder !== undefined) return folder;
  const made = folder = Deno.makeTempDirSync();
  addEventListener("unload", () => Deno.removeSync(made, { recursive: true }));
  const flags = ["-O1", "-shared", "-fPIC", "-pthread", "-o", `${made}/libcuda.so.1`];
  // g++ takes all files but the first after "-x c" for C++.
  const { success, text } = compile([...flags, ...SOURCES.flatMap((source) => ["-x", "c", source])]);
  if (!success) throw new Error(text);
  for (const name of ["libnvrtc.so.13", "libcupti.so.13"]) {
    Deno.symlinkSync(`${made}/libcuda.so.1`, `${made}/${name}`);
  }
  return made;
}

/** Runs `body` on a machine with the fake driver, fresh. */
export async function withFakeCuda(
  options: FakeOptions,
  body: (fake: FakeCuda) => void | Promise<void>,
): Promise<void> {
  const { memory = 2 ** 30, devices = 1, patience = 0, capability = 90, profiler = {} } = options;
  const folder = libraries();
  const library = Deno.dlopen(`${folder}/libcuda.so.1`, SYMBOLS);
  const { symbols } = library;
  const before = Deno.env.get(LIBRARY_PATH);
  Deno.env.set(LIBRARY_PATH, folder);
  try {
    symbols.fake_reset(BigInt(memory), devices, patience, capability);
    const { version = 130000, threads = "same", recordsPerBuffer = 0 } = profiler;
    symbols.fake_cupti_reset(version, THREADS.indexOf(threads), recordsPerBuffer);
    await body({
      folder,
      fail: (call, status, after = 0) =>
        symbols.fake_fail(new TextEncoder().encode(`${call}\0`), status, after),
      get alive() {
        return symbols.fake_alive();
      },
      get used() {
        return Number(symbols.fake_used());
      },
      get launches() {
        return symbols.fake_launches();
      },
      get compilations() {
        return symbols.fake_compilations();
      },
      get compilationsAtOnce() {
        return symbols.fake_compilations_at_once();
      },
      lastLaunch() {
        const sizes = new Uint32Array(8);
        const args = new Uint8Array(4096);
        symbols.fake_last_launch(sizes, args);
        const [x, y, z, bx, by, bz, shared, bytes] = sizes;
        return { grid: [x, y, z], block: [bx, by, bz], shared, args: args.slice(0, bytes) };
      },
      profiler: {
        get enabled() {
          return symbols.fake_cupti_enabled();
        },
        get requested() {
          return symbols.fake_cupti_buffers(0);
        },
        get completed() {
          return symbols.fake_cupti_buffers(1);
        },
        drop: (count) => symbols.fake_cupti_drop(BigInt(count)),
        spoil: () => symbols.fake_cupti_spoil(),
      },
    });
  } finally {
    if (before === undefined) Deno.env.delete(LIBRARY_PATH);
    else Deno.env.set(LIBRARY_PATH, before);
    library.close();
  }
}

/** Defines a test on the fake driver; skipped, with a word, where it cannot be compiled. */
export function testFakeCuda(
  title: string,
  options: FakeOptions,
  body: (fake: FakeCuda) => void | Promise<void>,
): void {
  const skip = missingCompiler();
  Deno.test({
    name: `${title}${skip === undefined ? "" : ` (skipped: ${skip})`}`,
    ignore: skip !== undefined,
    fn: () => withFakeCuda(options, body),
  });
}

/** The same, with its first GPU open; afterwards nothing of it may be left. */
export function testFakeDevice(
  title: string,
  options: FakeOptions,
  body: (device: CudaDevice, fake: FakeCuda) => void | Promise<void>,
): void {
  testFakeCuda(title, options, async (fake) => {
    {
      using device = openCuda(0);
      await body(device, fake);
    }
    if (fake.alive !== 0) throw new Error(`${fake.alive} handles are left`);
  });
}
