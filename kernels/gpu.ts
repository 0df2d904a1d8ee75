import { type DType, dtypeBytes } from "../ffi/dtype.ts";
import { ShapeError } from "../ffi/errors.ts";
import {
  type Dim3,
  type GpuDevice,
  type GpuKernel,
  isGpu,
  type KernelArgument,
  type KernelSource,
} from "../ffi/gpu.ts";
import type { Tensor } from "../ffi/tensor.ts";
import ARCHITECTURE_CUH from "./architecture.cuh" with { type: "text" };
import COMMON_CUH from "./common.cuh" with { type: "text" };
import HOPPER from "./hopper.cuh" with { type: "text" };

/** The names of dtypes in common.cuh. */
const C_TYPES: Partial<Record<DType, string>> = {
  f32: "float",
  bf16: "bf16",
  f16: "f16",
  f8e4m3: "f8e4m3",
  f8e5m2: "f8e5m2",
  i32: "int",
  u8: "unsigned char",
};

/** Where a .cu file takes in common.cuh, and, behind it, the types and constants that a launch chooses. */
const INCLUDE = '#include "common.cuh"';
/** Where it takes in hopper.cuh, if it does: in the next line. */
const INCLUDE_HOPPER = '#include "hopper.cuh"';

export interface GpuLaunch {
  readonly entry: string;
  /** Types that the file's text leaves open, e.g. `{ T: "bf16" }`: `using T = bf16;`. */
  readonly types: Readonly<Record<string, DType>>;
  /** Whole numbers that it leaves open, e.g. `{ N: 8 }`: `constexpr int N = 8;`. */
  readonly constants?: Readonly<Record<string, number>>;
  readonly grid: Dim3;
  readonly block: Dim3;
  /** Bytes of dynamic shared memory. */
  readonly shared?: number;
  readonly args: readonly KernelArgument[];
}

/** The GPU that a tensor lies on, or undefined for the CPU. */
export function gpuOf(tensor: Tensor): GpuDevice | undefined {
  return isGpu(tensor.device) ? tensor.device : undefined;
}

const compiled = new WeakMap<GpuDevice, Map<string, GpuKernel>>();
/** Texts that files have got while the program runs, by their names. */
const replacedTexts = new Map<string, string>();

/**
 * Gives a kernel file another text, in this process: its kernels are compiled anew when `gpu` launches them next, those of all
 * files for a header. What was recorded before still has the old ones.
 *
 * @param file its name: `"rms_norm.cu"`, `"common.cuh"`.
 */
export function replaceKernelText(gpu: GpuDevice, file: string, text: string): void {
  replacedTexts.set(file, text);
  const kernels = compiled.get(gpu);
  if (kernels === undefined) return;
  for (const key of [...kernels.keys()]) {
    if (file.endsWith(".cuh") || key.startsWith(`${file}:`)) kernels.delete(key);
  }
}

function textOf(file: string, loaded: string): string {
  return replacedTexts.get(file) ?? loaded;
}

/** common.cuh with what it takes in itself. */
function commonText(): string {
  return withInclude(textOf("common.cuh", COMMON_CUH), "common.cuh", '#include "architecture.cuh"', [
    '#line 1 "architecture.cuh"',
    textOf("architecture.cuh", ARCHITECTURE_CUH),
  ]);
}

/**
 * Compiles (once) and launches a kernel of a .cu file with the types and constants filled in.
 * Throws {@link ShapeError} for a dtype that kernels do not know.
 */
export function launch(gpu: GpuDevice, source: KernelSource, options: GpuLaunch): void {
  const { entry, types, constants = {}, grid, block, shared, args } = options;
  if ([grid].flat().includes(0)) return; // an empty tensor: nothing to do, and no GPU takes such a grid
  let kernels = compiled.get(gpu);
  if (kernels === undefined) compiled.set(gpu, kernels = new Map());
  const key = `${source.name}:${entry} ${Object.values(types)} ${Object.values(constants)}`;
  let kernel = kernels.get(key);
  if (kernel === undefined) {
    kernel = gpu.kernel(specialize(source, types, constants), entry);
    kernels.set(key, kernel);
  }
  gpu.launch(kernel, shared === undefined ? { grid, block } : { grid, block, shared }, args);
}

/**
 * The file's text with common.cuh, types and constants in the place of its include line. Compilers still speak of lines
 * by the numbers that they have in the files.
 */
export function specialize(
  source: KernelSource,
  types: Readonly<Record<string, DType>>,
  constants: Readonly<Record<string, number>>,
): KernelSource {
  const text = textOf(source.name, source.text);
  const lines = ['#line 1 "common.cuh"', commonText()];
  for (const [name, dtype] of Object.entries(types)) {
    const known = C_TYPES[dtype];
    if (known === undefined) throw new ShapeError(`${source.name}: no kernel takes ${dtype}`);
    lines.push(`using ${name} = ${known};`);
  }
  for (const [name, value] of Object.entries(constants)) lines.push(`constexpr int ${name} = ${value};`);
  const both = `${INCLUDE}\n${INCLUDE_HOPPER}`;
  const hopper = text.includes(both);
  if (hopper) lines.push('#line 1 "hopper.cuh"', textOf("hopper.cuh", HOPPER));
  return { name: source.name, text: withInclude(text, source.name, hopper ? both : INCLUDE, lines) };
}

/** A file's text with `lines` in the place of lines that include, and its own lines numbered as before. */
function withInclude(text: string, name: string, include: string, lines: readonly string[]): string {
  const next = text.split(include, 1)[0].split("\n").length + include.split("\n").length;
  return text.replace(include, () => [...lines, `#line ${next} "${name}"`].join("\n"));
}

/**
 * Elements that a kernel may move at a time along a dimension of `length`: 16 bytes of the widest dtype, or 1 where the
 * length, a stride or an address is no multiple of that. The last dimension of each tensor is dense.
 */
export function vectorWidth(length: number, tensors: readonly (Tensor | undefined)[]): number {
  const present = tensors.filter((tensor) => tensor !== undefined);
  const width = 16 / Math.max(...present.map(({ dtype }) => dtypeBytes(dtype)));
  const fits = length % width === 0 &&
    present.every((tensor) =>
      tensor.pointer % BigInt(width * dtypeBytes(tensor.dtype)) === 0n &&
      tensor.strides.every((stride, dim) =>
        dim === tensor.rank - 1 || tensor.shape[dim] === 1 || stride % width === 0
      )
    );
  return fits ? width : 1;
}

/** Threads for a block that walks `items` things: whole warps, at most `most`. */
export function blockSize(gpu: GpuDevice, items: number, most = 256): number {
  const { warpSize } = gpu.limits;
  return Math.min(most, Math.max(1, Math.ceil(items / warpSize)) * warpSize);
}
