/** A GPU that computes nothing: what a real one would be asked for is found out on it, without waiting for anything. */
import { cudnnTakesAttention } from "./cuda/cudnn.ts";
import { flashAttention3TakesPlan } from "./cuda/flash_attn3.ts";
import type { ConvPlan, DeviceProperties, MatmulPlan, Memory, MemoryPurpose, MemoryUse } from "./device.ts";
import { During } from "./during.ts";
import { FfiError } from "./errors.ts";
import {
  type AttentionPlan,
  type ConvAddPlan,
  type Deposit,
  type GpuDevice,
  type GpuEvent,
  type GpuKernel,
  type GpuLimits,
  type GpuProfiler,
  type Graph,
  type KernelArgument,
  type KernelSource,
  type Launch,
  TensorMap,
} from "./gpu.ts";
import { ALIGNMENT } from "./gpu_segment.ts";
import { aiterTakesPlan } from "./hip/aiter.ts";
import { MemoryScopes } from "./scope.ts";
import type { Tensor } from "./tensor.ts";

/** A kernel that was asked for. */
export interface NullKernel extends GpuKernel {
  readonly source: KernelSource;
  readonly entry: string;
}

/**
 * A GPU with any amount of memory, which is neither read nor written: downloads give zeros. It has all libraries, and inside of
 * {@link measuring} it tries all ways to do the same work once, as a real one does; none is faster than the first.
 */
export class NullGpu implements GpuDevice {
  readonly kind: GpuDevice["kind"];
  readonly name: string;
  readonly limits: GpuLimits;
  /** The texts that were to be compiled, in the order of their first use, by themselves. */
  readonly sources = new Map<string, KernelSource>();
  readonly #scopes = new MemoryScopes(() => {});
  readonly #measured = new Set<string>();
  readonly #measuring = new During();
  #free = BigInt(2 ** 40);

  /** @param real what it is to be taken for: answers that kernels depend on are that GPU's. */
  constructor(real: Pick<GpuDevice, "kind" | "limits">) {
    this.kind = real.kind;
    this.limits = real.limits;
    this.name = `${real.kind}:null`;
  }

  properties(): DeviceProperties {
    return { description: "a GPU that computes nothing", providers: {}, nativeBfloat16: true };
  }

  memoryUse(): MemoryUse {
    return { current: 0, peak: 0, reserved: 0, weights: 0 };
  }

  alloc(byteLength: number, _purpose?: MemoryPurpose): Memory {
    const pointer = this.#free;
    this.#free += BigInt((Math.floor(byteLength / ALIGNMENT) + 1) * ALIGNMENT);
    return { device: this, pointer, byteLength };
  }

  free(_memory: Memory): void {}

  scope<T>(body: () => T): T {
    return this.#scopes.run(body);
  }

  deposit(): Deposit {
    return { add: (memory) => this.alloc(memory.byteLength), bring() {}, leave() {} };
  }

  placeAll(parts: readonly Uint8Array[], onBytes?: (bytes: number) => void): Promise<Memory[]> {
    onBytes?.(parts.reduce((sum, { byteLength }) => sum + byteLength, 0));
    return Promise.resolve(parts.map(({ byteLength }) => this.alloc(byteLength)));
  }

  changed(): void {}

  upload(): void {}

  download(
    tensor: Tensor,
    into: Uint8Array<ArrayBuffer> = new Uint8Array(tensor.byteLength),
  ): Promise<Uint8Array<ArrayBuffer>> {
    return Promise.resolve(into);
  }

  kernel(source: KernelSource, entry: string): NullKernel {
    if (!this.sources.has(source.text)) this.sources.set(source.text, source);
    return { name: `${source.name}:${entry}`, source, entry };
  }

  compileAhead(): Promise<void> {
    return Promise.resolve();
  }

  launch(_kernel: GpuKernel, _launch: Launch, _args: readonly KernelArgument[]): void {}

  tensorMap(matrix: Tensor): TensorMap {
    return new TensorMap(matrix, new Uint8Array(128));
  }

  matmul(_plan: MatmulPlan): void {}

  takesMatmul(_plan: MatmulPlan): boolean {
    return true;
  }

  conv(_plan: ConvPlan): void {}

  convAdd({ x }: ConvAddPlan): boolean {
    return this.kind === "cuda" && x.dtype !== "f32";
  }

  attention(plan: AttentionPlan): boolean {
    if (this.kind === "hip") return aiterTakesPlan(plan);
    return plan.library === "fa3" ? flashAttention3TakesPlan(plan) : cudnnTakesAttention(plan);
  }

  powerMeter(): undefined {}

  amongRecordings<T>(body: () => T): T {
    return body();
  }

  measuring<T>(body: () => T): T {
    return this.#measuring.run(body);
  }

  fastest(key: string, ways: readonly (() => void)[]): number {
    if (!this.#measuring.on || this.#measured.has(key)) return 0;
    this.#measured.add(key);
    for (const way of ways) way();
    return 0;
  }

  environment(): Readonly<Record<string, string>> {
    return {};
  }

  prepared(): ReadonlyMap<string, Uint8Array<ArrayBuffer>> {
    return new Map();
  }

  adopt(): void {}

  event(): GpuEvent {
    return { reached: true, since: () => 0, [Symbol.dispose]() {} };
  }

  record(body: () => void): Graph {
    body();
    return { replay() {}, [Symbol.dispose]() {} };
  }

  openProfiler(): Promise<GpuProfiler> {
    return Promise.reject(new FfiError(`${this.name} does nothing that a profiler could see`));
  }

  synchronize(): Promise<void> {
    return Promise.resolve();
  }

  [Symbol.dispose](): void {}
}
