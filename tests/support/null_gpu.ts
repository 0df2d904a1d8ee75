import type { ConvPlan } from "../../ffi/device.ts";
import type { ConvAddPlan, Dim3, GpuDevice, KernelArgument } from "../../ffi/gpu.ts";
import { NullGpu, type NullKernel } from "../../ffi/null_gpu.ts";
import { watchLaunches } from "./watch_launches.ts";

/** A launch of a kernel, with the constants that it was compiled for. */
export interface Launched {
  readonly entry: string;
  readonly constants: Readonly<Record<string, number>>;
  readonly blocks: number;
  readonly threads: number;
  readonly args: readonly KernelArgument[];
}

/** A GPU that computes nothing, and what it was told to do. */
export interface WatchedGpu {
  readonly gpu: NullGpu;
  readonly launches: readonly Launched[];
  /** With a residual where that was to be added. */
  readonly convs: readonly (ConvPlan & Partial<Pick<ConvAddPlan, "residual">>)[];
}

/** An H100, or a GPU like it of another architecture, which may be one that no kernel is made for. */
export function likeH100(architecture = "sm_90a"): Pick<GpuDevice, "kind" | "limits"> {
  return {
    kind: "cuda",
    limits: { architecture, multiprocessors: 132, warpSize: 32, sharedBytesPerBlock: 232448 },
  };
}

/** Opens what {@link likeH100} describes, with a library that takes any attention. */
export function openNullGpu(architecture = ""): WatchedGpu {
  const launches: Launched[] = [];
  const convs: WatchedGpu["convs"][number][] = [];
  const gpu = new NullGpu(likeH100(architecture));
  watchLaunches(gpu, (kernel, { grid, block }, args) => {
    const { source, entry } = kernel as NullKernel;
    const constants = [...source.text.matchAll(/^constexpr int (\w+) = (\d+);$/gm)].map(([, key, value]) =>
      [key, Number(value)] as const
    );
    launches.push({
      entry,
      constants: Object.fromEntries(constants),
      blocks: count(grid),
      threads: count(block),
      args,
    });
  });
  gpu.attention = () => true;
  gpu.conv = (plan) => void convs.push(plan);
  gpu.convAdd = (plan) => {
    const takes = NullGpu.prototype.convAdd.call(gpu, plan);
    if (takes) convs.push(plan);
    return takes;
  };
  return { gpu, launches, convs };
}

const count = (size: Dim3) => typeof size === "number" ? size : size.reduce<number>((a, b) => a * b, 1);
