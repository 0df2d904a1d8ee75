import { CpuDevice } from "../ffi/cpu/device.ts";
import { wasmAddress } from "../ffi/cpu/convert.ts";
import type { Kernel, WasmRunner } from "../ffi/cpu/runner.ts";
import { readVector } from "../ffi/cpu/vector.ts";
import { dtypeBytes } from "../ffi/dtype.ts";
import { Tensor } from "../ffi/tensor.ts";
import MATH_WAT from "./math.wat" with { type: "text" };

/** Elements that make a job: some 20 microseconds of work, enough to wake a thread for. */
const SHARE = 16384;

/** Kernels of a .wat file for the device that `out` lies on, and how to start them. */
export interface WasmKernels {
  readonly kernels: Readonly<Record<string, Kernel>>;
  readonly runner: WasmRunner;
  readonly device: CpuDevice;
}

/**
 * The WebAssembly kernels of `text` where they can compute `out` from `inputs`: all of them dense, f32 or bf16 and in
 * WebAssembly memory, on a device that has a runner. Otherwise undefined: the reference does the work then.
 *
 * In `text` the line `;; include math.wat` stands for the functions of math.wat.
 */
export function wasmKernels(
  name: string,
  text: string,
  out: Tensor,
  inputs: readonly Tensor[],
): WasmKernels | undefined {
  const { device } = out;
  if (!(device instanceof CpuDevice) || device.runner === undefined) return undefined;
  for (const tensor of [out, ...inputs]) {
    if (tensor.dtype !== "f32" && tensor.dtype !== "bf16") return undefined;
    if (!tensor.isContiguous || wasmAddress(tensor) === undefined) return undefined;
  }
  const { runner } = device;
  const kernels = runner.module(name, () => text.replace(";; include math.wat", MATH_WAT));
  return { kernels, runner, device };
}

/** Where a tensor that {@link wasmKernels} has accepted starts. */
export function address(tensor: Tensor): number {
  return wasmAddress(tensor)!;
}

/** 4 for f32, 2 for bf16: how kernels are told the dtype. */
export function elementSize(tensor: Tensor): number {
  return dtypeBytes(tensor.dtype);
}

/** Address of a small vector (a norm's weight) as f32; a copy in the scope around where it is not that already. */
export function vectorAddress(vector: Tensor): number {
  const found = wasmAddress(vector);
  if (found !== undefined && vector.dtype === "f32" && vector.isContiguous) return found;
  const values = readVector(vector);
  return wasmAddress(Tensor.fromFloat32(vector.device, values, vector.shape))!;
}

/** How many of `count` things of `elements` elements each make one job, and how many jobs that gives. */
export function share(count: number, elements: number): { perJob: number; jobs: number } {
  const perJob = Math.max(1, Math.floor(SHARE / elements));
  return { perJob, jobs: Math.ceil(count / perJob) };
}
