/** Kernels of the emulated GPU: libraries that g++ made, and their launches. */
import { FfiError } from "../../ffi/errors.ts";
import type { Dim3, GpuActivity, GpuKernel, KernelArgument, Launch } from "../../ffi/gpu.ts";
import type { OpenedLibrary } from "../../ffi/library.ts";
import { addressOf, packArguments } from "./emulated_arguments.ts";
import { openCompiled } from "./emulated_compiler.ts";

export interface EmulatedKernel extends GpuKernel {
  readonly library: OpenedLibrary<typeof KERNEL>;
  readonly parameters: Int32Array;
  readonly staticSharedBytes: number;
}

/** Opens the library that {@link compiledKernel} made. */
export function loadKernel(path: string, name: string): EmulatedKernel {
  const library = openCompiled(path, KERNEL);
  const parameters = new Int32Array(MOST_PARAMETERS);
  const count = library.symbols.simtParameters(parameters);
  return {
    name,
    library,
    parameters: parameters.slice(0, count),
    staticSharedBytes: library.symbols.simtSharedBytes(),
  };
}

/** A launch that was checked: what to call, and what a profiler is told of it. */
export interface PreparedLaunch {
  readonly details: GpuActivity["details"];
  readonly work: () => void;
}

/**
 * Fails for sizes that no GPU launches, and for arguments that are not the kernel's.
 *
 * @param sharedLimit bytes of shared memory that a block may have.
 */
export function prepareLaunch(
  { name, library, parameters, staticSharedBytes }: EmulatedKernel,
  launch: Launch,
  args: readonly KernelArgument[],
  sharedLimit: number,
): PreparedLaunch {
  const [grid, block] = [dim3(launch.grid), dim3(launch.block)];
  const shared = launch.shared ?? 0;
  checkSizes(name, grid, block);
  checkShared(name, shared, staticSharedBytes, sharedLimit);
  const packed = packArguments(name, args, parameters);
  const header = new DataView(new ArrayBuffer(40));
  [...grid, ...block, shared].forEach((value, i) => header.setInt32(4 * i, value, true));
  header.setBigUint64(32, addressOf(packed.pointers), true);
  const details = { grid: grid.join("x"), block: block.join("x"), "dynamic shared memory": shared };
  const work = () => {
    const fault = new Int32Array(7);
    library.symbols.simtLaunch(header.buffer, fault);
    const [code, bx, by, bz, tx, ty, tz] = fault;
    if (code !== 0) {
      throw new FfiError(
        `${name}: ${FAULTS[code]} (block ${bx}, ${by}, ${bz}; thread ${tx}, ${ty}, ${tz})`,
      );
    }
    void packed; // the header points at it
  };
  return { details, work };
}

function checkSizes(name: string, grid: Sizes, block: Sizes): void {
  const threads = block[0] * block[1] * block[2];
  const sizes = [...grid, ...block];
  const fits = sizes.every((size) => Number.isInteger(size) && size > 0) &&
    grid[0] < 2 ** 31 && grid[1] < 65536 && grid[2] < 65536 && threads <= 1024 && block[2] <= 64;
  if (!fits) {
    throw new FfiError(`${name}: no GPU launches grid ${grid.join(" x ")}, block ${block.join(" x ")}`);
  }
}

function checkShared(name: string, shared: number, staticShared: number, limit: number): void {
  // Without being asked for more, a block gets 48 KiB of static shared memory.
  if (!Number.isInteger(shared) || shared < 0 || shared + staticShared > limit || staticShared > 49152) {
    throw new FfiError(
      `${name}: ${shared} bytes of dynamic and ${staticShared} of static shared memory, a block has ${limit}`,
    );
  }
}

const KERNEL = {
  // int simtParameters(int *codes)
  simtParameters: { parameters: ["buffer"], result: "i32" },
  // int simtSharedBytes(void)
  simtSharedBytes: { parameters: [], result: "i32" },
  // void simtLaunch(const SimtLaunch *launch, SimtFault *fault)
  simtLaunch: { parameters: ["buffer", "buffer"], result: "void" },
} as const satisfies Deno.ForeignLibraryInterface;

/** What {@link KERNEL}'s simtParameters has room for. */
const MOST_PARAMETERS = 64;

/** What a launch may end with, by simt_runtime.cpp's enum Fault. */
const FAULTS: readonly string[] = [
  "",
  "only a part of the block reaches a barrier",
  "only a part of the warp takes part in a shuffle, a vote or a warp barrier",
  "wrote beyond the dynamic shared memory that the launch asked for",
  "accessed memory that is not there",
  "misaligned access, index outside of an array, overflow of a signed integer, or division by zero",
];

type Sizes = readonly [number, number, number];

function dim3(size: Dim3): Sizes {
  if (typeof size === "number") return [size, 1, 1];
  return [size[0], size[1], size[2] ?? 1];
}
