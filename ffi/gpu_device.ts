import { createHash } from "node:crypto";
import { setImmediate } from "node:timers";
import type { DiskCache } from "./cache.ts";
import type { ConvPlan, DeviceProperties, MatmulPlan, Memory, MemoryPurpose, MemoryUse } from "./device.ts";
import { checkDownload } from "./download.ts";
import { During } from "./during.ts";
import { briefly, FfiError } from "./errors.ts";
import {
  type AttentionPlan,
  type ConvAddPlan,
  type Deposit,
  type Dim3,
  type GpuDevice,
  type GpuEvent,
  type GpuKernel,
  type GpuLimits,
  type GpuProfiler,
  type Graph,
  type KernelArgument,
  type KernelSource,
  type Launch,
  type PowerMeter,
  TensorMap,
} from "./gpu.ts";
import type { RuntimeCompiler } from "./gpu_compiler.ts";
import type { GpuContext } from "./gpu_context.ts";
import { RuntimeEvent } from "./gpu_event.ts";
import { RuntimeGraph } from "./gpu_graph.ts";
import { fastest } from "./gpu_measure.ts";
import { GpuHeap, type GpuMemory, type MemoryPlan } from "./gpu_memory.ts";
import type { GpuRuntime } from "./gpu_runtime.ts";
import { Staging } from "./gpu_staging.ts";
import { streamToDevice } from "./gpu_streamer.ts";
import { ArgumentBuffer } from "./struct.ts";
import type { Tensor } from "./tensor.ts";

/** What a vendor's device knows of a GPU whose context it has taken. */
export interface Hardware {
  readonly kind: GpuDevice["kind"];
  readonly index: number;
  readonly gpuName: string;
  /** Of the vendor's runtime, part of what measurements are kept under. */
  readonly driverVersion: string;
  readonly totalBytes: number;
  readonly limits: GpuLimits;
  readonly mostThreads: number;
  readonly mostGrid: readonly [number, number, number];
  readonly mostBlock: readonly [number, number, number];
  /** The markers in front of a launch's arguments and their size, and behind them. */
  readonly launchMarkers: readonly [pointer: number, size: number, end: number];
  /** What lists the programs that use the GPU. */
  readonly tool: string;
  /** What compiled code is called. */
  readonly code: string;
}

/** What a device does beside launching kernels, by its vendor's libraries. */
interface Products extends Disposable {
  readonly version: string;
  matmul(plan: MatmulPlan): void;
  takes(plan: MatmulPlan): boolean;
}

/** A kernel, loaded. */
export class RuntimeKernel implements GpuKernel {
  constructor(
    readonly device: GpuDevice,
    readonly name: string,
    readonly handle: bigint,
    /** Bytes of shared memory that its code declares. */
    readonly declaredShared: number,
    /** Bytes of dynamic shared memory that it may have now. */
    public dynamicShared: number,
  ) {}
}

/** How many bytes the segments held: the {@link GpuDevice.prepared} entry of this name, as JSON. */
const MEMORY_PLAN = "memory plan";

/** A loaded file and those of its kernels that were asked for. */
interface LoadedModule {
  readonly handle: bigint;
  readonly kernels: Map<string, RuntimeKernel>;
}

/**
 * One GPU, whosever: what CUDA and HIP devices have in common. All work goes to one stream, so that its order is the order
 * of the calls; {@link GpuHeap} says how memory follows from that.
 *
 * Recording captures the stream in the runtimes' "relaxed" mode. The stricter modes forbid, on the thread that records,
 * calls that could wait for other work, and growing a segment or loading a module counts as such. These calls touch
 * neither the stream nor what is recorded, and this device makes no others while it records.
 */
export abstract class RuntimeDevice<Runtime extends GpuRuntime> implements GpuDevice {
  abstract readonly kind: GpuDevice["kind"];
  readonly name: string;
  readonly limits: GpuLimits;
  protected readonly driver: Runtime;
  protected readonly stream: bigint;
  /** What libraries get to see of this device. */
  abstract readonly context: GpuContext<Runtime>;
  protected readonly cache: DiskCache | undefined;
  protected readonly hardware: Hardware;
  readonly #staging: Staging;
  readonly #heap: GpuHeap;
  #closed = false;
  #recording = false;
  readonly #measuring = new During();
  #measured = 0;
  /** The recorded graphs that are in use. */
  readonly #graphs = new Set<RuntimeGraph>();
  /** By the text that was compiled. */
  readonly #modules = new Map<string, LoadedModule>();
  /** Compiled code and choices of this process and what was adopted from an earlier one, by what they were made of. */
  readonly #prepared = new Map<string, Uint8Array<ArrayBuffer>>();

  // One launch's sizes and arguments. They are written again by the next, so that launching allocates next to nothing.
  readonly #grid: [number, number, number] = [1, 1, 1];
  readonly #block: [number, number, number] = [1, 1, 1];
  readonly #arguments = new ArgumentBuffer();
  // Buffers made first: V8 may move what a small typed array makes for itself, and `#extra` has addresses.
  readonly #argumentBytes = new BigUint64Array(new ArrayBuffer(8));
  readonly #extra = new BigUint64Array(new ArrayBuffer(5 * 8));

  /**
   * @param driver whose context is that GPU's; the device owns it from here on.
   * @param cache keeps compiled kernels from run to run.
   */
  constructor(
    driver: Runtime,
    hardware: Hardware,
    cache: DiskCache | undefined,
    private readonly onMeasured: (count: number) => void,
  ) {
    this.name = `${hardware.kind}:${hardware.index}`;
    this.driver = driver;
    this.hardware = hardware;
    this.limits = hardware.limits;
    this.cache = cache;
    this.stream = driver.streamCreate();
    this.#heap = new GpuHeap({
      device: this,
      driver,
      totalBytes: hardware.totalBytes,
      tool: hardware.tool,
      isRecording: () => this.#recording,
      hasGraphs: () => this.#graphs.size > 0,
      wait: () => driver.streamSynchronize(this.stream),
    });
    this.#staging = new Staging(driver, this.stream);
    const [pointer, size, end] = hardware.launchMarkers;
    this.#extra.set([
      BigInt(pointer),
      this.#arguments.address,
      BigInt(size),
      Deno.UnsafePointer.value(Deno.UnsafePointer.of(this.#argumentBytes)),
      BigInt(end),
    ]);
  }

  abstract properties(): DeviceProperties;
  abstract environment(): Readonly<Record<string, string>>;
  abstract conv(plan: ConvPlan): void;
  abstract convAdd(plan: ConvAddPlan): boolean;
  abstract attention(plan: AttentionPlan): boolean;
  abstract powerMeter(): PowerMeter | undefined;
  abstract tensorMap(matrix: Tensor, rows: number): TensorMap;
  abstract openProfiler(): Promise<GpuProfiler>;

  /** The library for matrix products, opened at its first use. */
  protected abstract readonly matmuls: Products;
  /** The compiler of kernels, opened at its first use. */
  protected abstract readonly compiler: RuntimeCompiler;
  /** A loaded kernel with what its vendor tells of its shared memory. */
  protected abstract loaded(handle: bigint, name: string): RuntimeKernel;
  /** Asks for so much dynamic shared memory for a kernel, where its vendor wants to be asked. */
  protected raiseShared(_kernel: RuntimeKernel, _bytes: number): void {}
  /** What its libraries give back when the device is closed, in that order. */
  protected abstract libraries(): readonly (Disposable | undefined)[];
  /** What the libraries add to {@link prepared}. */
  protected preparedByLibraries(): Iterable<readonly [key: string, bytes: Uint8Array<ArrayBuffer>]> {
    return [];
  }
  /** Called where no graph is in use any more. */
  protected freeRecorded(): void {}

  /** What each vendor's context has. */
  protected baseContext(): GpuContext<Runtime> {
    return {
      driver: this.driver,
      index: this.hardware.index,
      stream: this.stream,
      isRecording: () => this.#recording,
      workspace: (bytes) => this.#heap.workspace(bytes),
      choose: (key, ways) => this.#choose(key, ways),
      prepared: (key) => this.#prepared.get(key),
    };
  }

  /** Whether an earlier process has left what is {@link prepared}. */
  protected get hasPrepared(): boolean {
    return this.#prepared.size > 0;
  }

  memoryUse(): MemoryUse {
    return this.#heap.use();
  }

  // -- memory --

  alloc(byteLength: number, purpose: MemoryPurpose = "activations"): GpuMemory {
    this.checkOpen();
    return this.#heap.alloc(byteLength, purpose);
  }

  free(memory: Memory): void {
    this.#heap.free(memory);
  }

  scope<T>(body: () => T): T {
    return this.#heap.scope(body);
  }

  deposit(): Deposit {
    this.checkOpen();
    return this.#heap.deposit(this.stream, (what) => {
      this.checkOpen();
      this.refuseRecording(what);
    });
  }

  async placeAll(parts: readonly Uint8Array[], onBytes?: (bytes: number) => void): Promise<Memory[]> {
    this.refuseRecording("streaming weights");
    const memories: GpuMemory[] = [];
    try {
      for (const bytes of parts) memories.push(this.alloc(bytes.byteLength, "weights"));
      const transfers = parts.map((bytes, i) => ({ bytes, target: memories[i].pointer }));
      await streamToDevice(this.driver, this.stream, transfers, onBytes);
      return memories;
    } catch (error) {
      for (const memory of memories) this.free(memory);
      throw error;
    }
  }

  changed(): void {} // libraries keep nothing that they have made of weights

  /** Returns at once; the host's bytes may change afterwards. */
  upload(bytes: Uint8Array, memory: Memory): void {
    this.checkOpen();
    this.refuseRecording("an upload"); // it would read the staging memory again at each replay
    this.#heap.own(memory);
    if (bytes.byteLength > memory.byteLength) {
      throw new FfiError(
        `${this.name}: ${bytes.byteLength} bytes do not fit into ${memory.byteLength} of memory`,
      );
    }
    this.#staging.upload(bytes, memory.pointer);
  }

  /** The copy is made before it returns, so that the tensor's memory may be freed at once. */
  download(
    tensor: Tensor,
    into: Uint8Array<ArrayBuffer> = new Uint8Array(tensor.byteLength),
  ): Promise<Uint8Array<ArrayBuffer>> {
    this.checkOpen();
    this.refuseRecording("a download");
    if (tensor.device !== this) throw new FfiError(`${this.name}: ${tensor} lies on ${tensor.device.name}`);
    checkDownload(this.name, tensor, into);
    this.#staging.download(tensor.pointer, into);
    return Promise.resolve(into);
  }

  // -- work --

  matmul(plan: MatmulPlan): void {
    this.checkOpen();
    this.matmuls.matmul(plan);
  }

  takesMatmul(plan: MatmulPlan): boolean {
    this.checkOpen();
    return this.matmuls.takes(plan);
  }

  kernel(source: KernelSource, entry: string): RuntimeKernel {
    this.checkOpen();
    let module = this.#modules.get(source.text);
    if (module === undefined) {
      module = { handle: this.driver.moduleLoadData(this.#code(source), source.name), kernels: new Map() };
      this.#modules.set(source.text, module);
    }
    let kernel = module.kernels.get(entry);
    if (kernel === undefined) {
      const handle = this.driver.moduleGetFunction(module.handle, entry, source.name);
      kernel = this.loaded(handle, `${source.name}:${entry}`);
      module.kernels.set(entry, kernel);
    }
    return kernel;
  }

  async compileAhead(sources: readonly KernelSource[], signal?: AbortSignal): Promise<void> {
    this.checkOpen();
    const missing = new Map(sources.map((source) => [this.#keyOf(source), source] as const));
    for (const key of this.#prepared.keys()) missing.delete(key);
    const compiler = this.#compilerIfNeeded(missing.size);
    if (compiler === undefined) return;
    // What takes the longest comes first, which is mostly what is the longest: else all would wait for it in the end.
    const entries = [...missing].sort(([, a], [, b]) => b.text.length - a.text.length).values();
    const compileOnes = async () => {
      for (const [key, source] of entries) {
        if (this.#closed || signal?.aborted) return;
        if (this.#prepared.has(key)) continue; // somebody needed it meanwhile
        try {
          const code = await compiler.compileAside(source, this.limits.architecture, this.cache);
          if (!this.#prepared.has(key)) this.#prepared.set(key, code);
        } catch (error) {
          if (!(error instanceof FfiError)) throw error; // else `kernel` will say it, if it comes to that
        }
      }
    };
    await Promise.all(Array.from({ length: navigator.hardwareConcurrency }, compileOnes));
  }

  launch(kernel: GpuKernel, launch: Launch, args: readonly KernelArgument[]): void {
    this.checkOpen();
    const { name } = kernel;
    if (!(kernel instanceof RuntimeKernel) || kernel.device !== this) {
      throw new FfiError(`${name}: this kernel was not loaded by ${this.name}`);
    }
    const { grid, block, shared = 0 } = launch;
    const { mostGrid, mostBlock, mostThreads } = this.hardware;
    writeDim3(this.#grid, grid, mostGrid, name, "grid");
    writeDim3(this.#block, block, mostBlock, name, "block");
    const threads = this.#block[0] * this.#block[1] * this.#block[2];
    if (threads > mostThreads) {
      throw new FfiError(`${name}: a block of ${threads} threads, ${this.name} takes ${mostThreads}`);
    }
    if (shared > kernel.dynamicShared) this.#raiseShared(kernel, shared);
    const bytes = this.#arguments.pack(args, name, this);
    this.#argumentBytes[0] = BigInt(bytes);
    // Of a kernel with a parameter at a multiple of 64 NVIDIA's driver (580) takes the arguments' addresses only: all of them
    // as one buffer arrive as zeros.
    const mapped = args.some((arg) => arg instanceof TensorMap);
    const { address, starts } = this.#arguments;
    const parameters = mapped ? BigUint64Array.from(starts, (start) => address + BigInt(start)) : null;
    const extra = mapped || bytes === 0 ? null : this.#extra;
    this.driver.launchKernel(
      kernel.handle,
      this.#grid,
      this.#block,
      shared,
      this.stream,
      parameters,
      extra,
      name,
    );
  }

  measuring<T>(body: () => T): T {
    return this.#measuring.run(body);
  }

  fastest(key: string, ways: readonly (() => void)[]): number {
    return this.#choose(key, () => ways.map((way) => () => (way(), true)));
  }

  prepared(): ReadonlyMap<string, Uint8Array<ArrayBuffer>> {
    this.checkOpen();
    return new Map([
      ...this.#prepared,
      ...this.preparedByLibraries(),
      [MEMORY_PLAN, new TextEncoder().encode(JSON.stringify(this.#heap.plan()))],
    ]);
  }

  adopt(prepared: ReadonlyMap<string, Uint8Array<ArrayBuffer>>): void {
    this.checkOpen();
    for (const [key, bytes] of prepared) this.#prepared.set(key, bytes);
    const memory = prepared.get(MEMORY_PLAN);
    if (memory === undefined) return;
    this.#heap.reserve(JSON.parse(new TextDecoder().decode(memory)) as MemoryPlan);
  }

  event(): GpuEvent {
    this.checkOpen();
    this.refuseRecording("an event");
    const event = this.driver.eventCreate(true);
    this.driver.eventRecord(event, this.stream);
    return new RuntimeEvent(this.driver, event);
  }

  /**
   * Throws what `body` throws, and {@link FfiError} where the driver cannot record what it did; then nothing stays
   * recorded.
   */
  record(body: () => void): Graph {
    this.checkOpen();
    this.refuseRecording("a recording");
    const [driver, stream] = [this.driver, this.stream];
    driver.streamBeginCapture(stream);
    this.#recording = true;
    try {
      if ((body() as unknown) instanceof Promise) throw new TypeError("record takes a synchronous function");
    } catch (error) {
      try {
        driver.graphDestroy(driver.streamEndCapture(stream));
      } catch {
        // A call that failed has made the recording invalid; the end says so once more.
      }
      this.#freeWhatGraphsUsed();
      throw error;
    } finally {
      this.#recording = false;
    }
    const captured = driver.streamEndCapture(stream);
    try {
      const executable = driver.graphInstantiate(captured);
      const graph: RuntimeGraph = new RuntimeGraph(driver, stream, executable, () => {
        this.#graphs.delete(graph);
        this.#freeWhatGraphsUsed();
      });
      this.#graphs.add(graph);
      return graph;
    } finally {
      driver.graphDestroy(captured);
      this.#freeWhatGraphsUsed(); // where it did not become one
    }
  }

  amongRecordings<T>(body: () => T): T {
    this.refuseRecording("work among recordings");
    return this.#heap.amongRecordings(body);
  }

  async synchronize(): Promise<void> {
    this.checkOpen();
    this.refuseRecording("waiting");
    // Timers, signals and other requests go on meanwhile; a timer of its own would wake up a millisecond late.
    while (!this.driver.streamQuery(this.stream)) await new Promise((resolve) => setImmediate(resolve));
  }

  /** Waits for the work and gives all back. Throws what went wrong in that work, where nobody has seen it yet. */
  [Symbol.dispose](): void {
    if (this.#closed) return;
    this.#closed = true;
    const lostBefore = this.driver.isLost;
    const failures: unknown[] = [];
    const attempt = (work: () => void) => {
      try {
        work();
      } catch (error) {
        failures.push(error);
      }
    };
    attempt(() => this.driver.streamSynchronize(this.stream));
    for (const graph of this.#graphs) attempt(() => graph[Symbol.dispose]());
    for (const library of this.libraries()) attempt(() => library?.[Symbol.dispose]());
    for (const { handle } of this.#modules.values()) attempt(() => this.driver.moduleUnload(handle));
    attempt(() => this.#staging[Symbol.dispose]());
    for (const segment of this.#heap.segments) attempt(() => segment[Symbol.dispose]());
    attempt(() => this.driver.streamDestroy(this.stream));
    attempt(() => this.driver[Symbol.dispose]());
    // With a lost context every step fails, and somebody was told already.
    if (failures.length > 0 && !lostBefore) throw failures[0];
  }

  // -- helpers --

  protected checkOpen(): void {
    if (this.#closed) throw new FfiError(`${this.name}: the device was closed`);
    this.driver.checkAlive();
  }

  protected refuseRecording(what: string): void {
    if (this.#recording) throw new FfiError(`${this.name}: ${what} cannot be part of a recording`);
  }

  #code(source: KernelSource): Uint8Array<ArrayBuffer> {
    const key = this.#keyOf(source);
    let code = this.#prepared.get(key);
    if (code === undefined) {
      code = this.compiler.compile(source, this.limits.architecture, this.cache);
      this.#prepared.set(key, code);
    }
    return code;
  }

  /** What a file's code is {@link #prepared} under. */
  #keyOf({ name, text }: KernelSource): string {
    const hash = createHash("sha256").update(`${this.limits.architecture}\n${text}`).digest("hex");
    return `${this.hardware.code} of ${name} ${hash}`;
  }

  /** Undefined where there is nothing to compile, or nothing to compile with. */
  #compilerIfNeeded(count: number): RuntimeCompiler | undefined {
    if (count === 0) return undefined;
    try {
      return this.compiler;
    } catch (error) {
      if (!(error instanceof FfiError)) throw error;
      return undefined;
    }
  }

  /** See {@link GpuContext.choose}. */
  #choose(work: string, ways: () => readonly (() => boolean)[]): number {
    if (!this.#measuring.on) return 0;
    const key = `choice for ${work}`;
    let choice = this.#prepared.get(key);
    if (choice === undefined) {
      if (this.#recording) return 0;
      const measure = () => {
        const found = Uint8Array.of(fastest(this.context, ways()));
        this.onMeasured(++this.#measured);
        return found;
      };
      const { gpuName, driverVersion } = this.hardware;
      choice = this.cache?.get(["choice", gpuName, driverVersion, work], measure) ?? measure();
      this.#prepared.set(key, choice);
    }
    return choice[0];
  }

  /** Where no graph is in use, gives back what libraries have kept for graphs. */
  #freeWhatGraphsUsed(): void {
    if (this.#graphs.size > 0 || this.#closed) return;
    this.#heap.freeOldWorkspaces();
    this.freeRecorded();
  }

  /** More dynamic shared memory than a kernel has without asking must be asked for, once. */
  #raiseShared(kernel: RuntimeKernel, bytes: number): void {
    const { sharedBytesPerBlock } = this.limits;
    if (kernel.declaredShared + bytes > sharedBytesPerBlock) {
      throw new FfiError(
        `${kernel.name}: ${kernel.declaredShared} + ${bytes} bytes of shared memory, ${this.name} has ` +
          `${sharedBytesPerBlock} for a block`,
      );
    }
    this.raiseShared(kernel, bytes);
    kernel.dynamicShared = bytes;
  }
}

/** Fills in the sizes that were left out. Throws {@link FfiError} for one that the GPU does not take. */
function writeDim3(
  out: [number, number, number],
  value: Dim3,
  most: readonly [number, number, number],
  kernel: string,
  what: string,
): void {
  if (typeof value === "number") {
    out[0] = value;
    out[1] = out[2] = 1;
  } else {
    out[0] = value[0];
    out[1] = value[1];
    out[2] = value.length === 3 ? value[2] : 1;
  }
  for (let i = 0; i < 3; i++) {
    if (!(Number.isInteger(out[i]) && out[i] >= 1 && out[i] <= most[i])) {
      throw new FfiError(`${kernel}: ${what} [${out.join(", ")}], sizes are from 1 to [${most.join(", ")}]`);
    }
  }
}

/** What is wrong and what to do, without the list of places. */
export function inOneLine(error: FfiError): string {
  return `${briefly(error)}${error.hint === undefined ? "" : `; ${error.hint}`}`;
}

/** A library's version, or why it does not open, in one line. */
export function versionOr(version: () => string): string {
  try {
    return version();
  } catch (error) {
    if (!(error instanceof FfiError)) throw error;
    return inOneLine(error);
  }
}

/** Bytes in words. */
export function gibibytes(bytes: number): string {
  return `${(bytes / 2 ** 30).toFixed(1)} GiB`;
}
