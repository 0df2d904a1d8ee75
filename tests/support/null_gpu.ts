import type { ConvPlan, Memory } from "../../ffi/device.ts";
import {
  type ConvAddPlan,
  type Dim3,
  type GpuDevice,
  type KernelArgument,
  type KernelSource,
  type Launch,
  TensorMap,
} from "../../ffi/gpu.ts";
import { MemoryScopes } from "../../ffi/scope.ts";
import type { Tensor } from "../../ffi/tensor.ts";

/** A launch of a kernel, with the constants that it was compiled for. */
export interface Launched {
  readonly entry: string;
  readonly constants: Readonly<Record<string, number>>;
  readonly blocks: number;
  readonly threads: number;
  readonly args: readonly KernelArgument[];
}

/** A GPU that has any amount of memory and computes nothing, and what it was told to do. */
export interface NullGpu {
  readonly gpu: GpuDevice;
  readonly launches: readonly Launched[];
  /** With a residual where that was to be added. */
  readonly convs: readonly (ConvPlan & Partial<Pick<ConvAddPlan, "residual">>)[];
}

/** @param architecture e.g. "sm_90a", for kernels that are made for one. */
export function openNullGpu(architecture = ""): NullGpu {
  const launches: Launched[] = [];
  const convs: NullGpu["convs"][number][] = [];
  const scopes = new MemoryScopes(() => {});
  const gpu = {
    kind: "cuda",
    name: "null GPU",
    limits: { architecture, multiprocessors: 132, warpSize: 32, sharedBytesPerBlock: 232448 },
    alloc: (byteLength: number): Memory => ({ device: gpu, pointer: 1n << 40n, byteLength }),
    free: () => {},
    scope: <T>(inner: () => T): T => scopes.run(inner),
    kernel: ({ text }: KernelSource, entry: string) => ({ name: entry, text }),
    launch: (
      { name, text }: { name: string; text: string },
      { grid, block }: Launch,
      args: readonly KernelArgument[],
    ) => {
      const constants = [...text.matchAll(/^constexpr int (\w+) = (\d+);$/gm)].map(([, key, value]) =>
        [key, Number(value)] as const
      );
      launches.push({
        entry: name,
        constants: Object.fromEntries(constants),
        blocks: count(grid),
        threads: count(block),
        args,
      });
    },
    conv: (plan: ConvPlan) => void convs.push(plan),
    upload: () => {},
    convAdd: (plan: ConvAddPlan) => {
      const takes = plan.x.dtype !== "f32";
      if (takes) convs.push(plan);
      return takes;
    },
    matmul: () => {},
    tensorMap: (matrix: Tensor) => new TensorMap(matrix, new Uint8Array(128)),
    attention: () => true,
    fastest: () => 0,
  } as unknown as GpuDevice;
  return { gpu, launches, convs };
}

const count = (size: Dim3) => typeof size === "number" ? size : size.reduce<number>((a, b) => a * b, 1);
