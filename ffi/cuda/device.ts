import { createHash } from "node:crypto";
import { setImmediate } from "node:timers";
import type { DiskCache } from "../cache.ts";
import { dtypeBytes } from "../dtype.ts";
import type { ConvPlan, DeviceProperties, MatmulPlan, Memory, MemoryPurpose, MemoryUse } from "../device.ts";
import { checkDownload } from "../download.ts";
import { briefly, FfiError, OutOfMemoryError } from "../errors.ts";
import {
  type AttentionPlan,
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
  TensorMap,
} from "../gpu.ts";
import { LibraryNotFoundError } from "../library.ts";
import { MemoryScopes } from "../scope.ts";
import { ArgumentBuffer } from "../struct.ts";
import type { Tensor } from "../tensor.ts";
import type { CudaContext } from "./context.ts";
import { CublasLt } from "./cublaslt.ts";
import { Cudnn } from "./cudnn.ts";
import { Cupti } from "./cupti.ts";
import { type Driver, HEADER } from "./driver.ts";
import { DepositSegment } from "./deposit.ts";
import { CudaEvent } from "./event.ts";
import { FlashAttention3 } from "./flash_attn3.ts";
import { CudaGraph } from "./graph.ts";
import { fastest } from "./measure.ts";
import { askNvml } from "./nvml.ts";
import { architecture, Nvrtc } from "./nvrtc.ts";
import { ALIGNMENT, Segment } from "./segment.ts";
import { Staging } from "./staging.ts";
import { streamToDevice } from "./streamer.ts";

const MIB = 2 ** 20;
/** How much a segment grows at a time: activations come and go, weights come by the gigabyte. */
const ACTIVATION_CHUNK = 64 * MIB;
const WEIGHT_CHUNK = 256 * MIB;

/** GPU memory: a block of one of the device's segments, or of a deposit. */
class CudaMemory implements Memory {
  readonly pointer: bigint;
  /** Whether it was not freed so far. */
  live = true;

  constructor(
    readonly device: CudaDevice,
    readonly byteLength: number,
    readonly segment: Segment | DepositSegment,
    readonly offset: number,
  ) {
    this.pointer = segment.pointer(offset);
  }
}

/** A kernel, loaded. */
class CudaKernel implements GpuKernel {
  constructor(
    readonly device: CudaDevice,
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
type MemoryPlan = Record<"activations" | "recorded" | "weights", number>;

/** A loaded cubin and those of its kernels that were asked for. */
interface LoadedModule {
  readonly handle: bigint;
  readonly kernels: Map<string, CudaKernel>;
}

/**
 * One NVIDIA GPU. All work goes to one stream, so that its order is the order of the calls.
 *
 * Memory is planned by that order. Activations, weights and recordings have a {@link Segment} each; the book-keeping is
 * done on the host, best fit first, and a freed block is handed out again at once: work that still uses it was issued before the
 * work that gets it next, and the stream keeps them apart. Nothing depends on timing, so the same sequence of requests
 * gets the same addresses each time: a step that is repeated needs no memory beyond its first run. A recorded step needs
 * no care from the others, since what it allocates is in nobody else's way. The addresses of the segments never move, as growing only puts memory behind further ones.
 *
 * Recording captures the stream in the driver's "relaxed" mode. The stricter modes forbid, on the thread that records,
 * calls that could wait for other work, and growing a segment or loading a module counts as such. These calls touch
 * neither the stream nor what is recorded, and this device makes no others while it records.
 */
export class CudaDevice implements GpuDevice {
  readonly kind = "cuda";
  readonly name: string;
  readonly limits: GpuLimits;
  /** What libraries get to see of this device. */
  readonly context: CudaContext;
  readonly #driver: Driver;
  readonly #cache: DiskCache | undefined;
  readonly #gpuName: string;
  readonly #totalBytes: number;
  readonly #capability: readonly [major: number, minor: number];
  readonly #mostThreads: number;
  readonly #mostGrid: readonly [number, number, number];
  readonly #mostBlock: readonly [number, number, number];
  readonly #stream: bigint;
  readonly #staging: Staging;
  #closed = false;

  readonly #activations: Segment;
  readonly #weights: Segment;
  /** What recorded work allocates while it is recorded: the same for all recordings, and used by nothing else. */
  readonly #recorded: Segment;
  /** With what frees a deposit's memory when nothing refers to it any more. */
  readonly #deposits = new Map<DepositSegment, FinalizationRegistry<number>>();
  readonly #scopes = new MemoryScopes((memory) => this.free(memory));
  readonly #collected = new FinalizationRegistry<number>((offset) => this.#weights.free(offset));
  /** The libraries' scratch, and smaller ones before it that graphs still use. They lie among the weights. */
  readonly #workspaces: CudaMemory[] = [];
  #workspaceBytes = 0;
  #peak = 0;
  #recording = false;
  #measuring = false;
  #measured = 0;
  /** The recorded graphs that are in use. */
  readonly #graphs = new Set<CudaGraph>();

  #nvrtc: Nvrtc | undefined;
  #cublasLt: CublasLt | undefined;
  #cudnn: Cudnn | undefined;
  readonly #flashAttention3: FlashAttention3;
  #cupti: Cupti | undefined;
  /** By the text that was compiled. */
  readonly #modules = new Map<string, LoadedModule>();
  /** Cubins and choices of this process and what was adopted from an earlier one, by what they were made of. */
  readonly #prepared = new Map<string, Uint8Array<ArrayBuffer>>();

  // One launch's sizes and arguments. They are written again by the next, so that launching allocates next to nothing.
  readonly #grid: [number, number, number] = [1, 1, 1];
  readonly #block: [number, number, number] = [1, 1, 1];
  readonly #arguments = new ArgumentBuffer();
  // Buffers made first: V8 may move what a small typed array makes for itself, and `#extra` has addresses.
  readonly #argumentBytes = new BigUint64Array(new ArrayBuffer(8));
  readonly #extra = new BigUint64Array(new ArrayBuffer(5 * 8));

  /**
   * Takes the GPU with this index; the device owns the driver from here on.
   *
   * @param cache keeps compiled kernels from run to run.
   * @throws {FfiError} for a GPU that cannot be used
   */
  constructor(
    driver: Driver,
    index: number,
    cache?: DiskCache,
    private readonly onMeasured: (count: number) => void = () => {},
  ) {
    this.name = `cuda:${index}`;
    this.#driver = driver;
    this.#cache = cache;
    const handle = driver.deviceGet(index);
    const attribute = (which: number) => driver.deviceGetAttribute(which, handle);
    this.#gpuName = driver.deviceGetName(handle);
    this.#totalBytes = driver.deviceTotalMem(handle);
    this.#capability = [
      attribute(HEADER.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
      attribute(HEADER.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
    ];
    this.limits = {
      architecture: architecture(this.#capability),
      multiprocessors: attribute(HEADER.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
      warpSize: attribute(HEADER.CU_DEVICE_ATTRIBUTE_WARP_SIZE),
      sharedBytesPerBlock: attribute(HEADER.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
    };
    this.#mostThreads = attribute(HEADER.CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK);
    this.#mostGrid = [
      attribute(HEADER.CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X),
      attribute(HEADER.CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y),
      attribute(HEADER.CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z),
    ];
    this.#mostBlock = [
      attribute(HEADER.CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X),
      attribute(HEADER.CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y),
      attribute(HEADER.CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z),
    ];
    if (attribute(HEADER.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED) !== 1) {
      throw new FfiError(`${this.name}: ${this.#gpuName} has no virtual memory management here`, {
        hint: "Pascal and newer GPUs have it; a virtual machine's driver may hide it",
      });
    }
    driver.retainContext(handle);
    this.#stream = driver.streamCreate();
    this.#activations = new Segment(driver, this.#totalBytes, ACTIVATION_CHUNK);
    this.#weights = new Segment(driver, this.#totalBytes, WEIGHT_CHUNK);
    this.#recorded = new Segment(driver, this.#totalBytes, ACTIVATION_CHUNK);
    this.#staging = new Staging(driver, this.#stream);
    this.context = {
      driver,
      index,
      stream: this.#stream,
      capability: this.#capability,
      isRecording: () => this.#recording,
      workspace: (bytes) => this.#workspace(bytes),
      choose: (key, ways) => this.#choose(key, ways),
      prepared: (key) => this.#prepared.get(key),
    };
    this.#flashAttention3 = new FlashAttention3(this.context);
    this.#extra.set([
      BigInt(HEADER.CU_LAUNCH_PARAM_BUFFER_POINTER_AS_INT),
      this.#arguments.address,
      BigInt(HEADER.CU_LAUNCH_PARAM_BUFFER_SIZE_AS_INT),
      Deno.UnsafePointer.value(Deno.UnsafePointer.of(this.#argumentBytes)),
      BigInt(HEADER.CU_LAUNCH_PARAM_END_AS_INT),
    ]);
  }

  /** Opens the libraries that it names, to ask for their versions; FlashAttention-3 is in it where it was opened before. */
  properties(): DeviceProperties {
    this.#checkOpen();
    const [major, minor] = this.#capability;
    // What was adopted needs no compiler, which is not opened just to be named.
    const compiler = this.#nvrtc === undefined && this.#prepared.size > 0
      ? "an earlier process"
      : versionOr(() => `NVRTC ${this.#compiler.version.join(".")} for ${this.limits.architecture}`);
    const { version: fa3 } = this.#flashAttention3;
    return {
      description: `${this.#gpuName}, ${gibibytes(this.#totalBytes)}, compute capability ${major}.${minor}`,
      providers: {
        matmul: versionOr(() => `cuBLASLt ${this.#matmuls.version}`),
        "convolution, attention": versionOr(() => `cuDNN ${this.#convolutions.version}`),
        ...(fa3 === undefined ? {} : { "FlashAttention-3": fa3 }),
        other: `CUDA kernels, compiled by ${compiler}`,
        driver: `for CUDA ${this.#driver.driverGetVersion().join(".")}, ${this.#driver.path}`,
      },
      nativeBfloat16: major >= 8,
    };
  }

  memoryUse(): MemoryUse {
    return {
      current: this.#activations.used,
      peak: this.#peak,
      reserved: this.#activations.mapped + this.#recorded.mapped + this.#workspaceBytes,
      weights: this.#weights.used - this.#workspaceBytes + this.#depositedBytes,
    };
  }

  // -- memory --

  alloc(byteLength: number, purpose: MemoryPurpose = "activations"): CudaMemory {
    this.#checkOpen();
    if (purpose === "weights") {
      const memory = this.#take(this.#weights, byteLength, "weights");
      this.#collected.register(memory, memory.offset, memory);
      return memory;
    }
    const segment = this.#recording ? this.#recorded : this.#activations;
    const memory = this.#take(segment, byteLength, "activations");
    this.#scopes.add(memory);
    return memory;
  }

  free(memory: Memory): void {
    const mine = this.#own(memory);
    if (!mine.live) throw new FfiError(`${this.name}: memory was freed twice`);
    mine.live = false;
    if (mine.segment === this.#weights) this.#collected.unregister(mine);
    else if (mine.segment instanceof DepositSegment) this.#deposits.get(mine.segment)?.unregister(mine);
    else this.#scopes.remove(mine);
    mine.segment.free(mine.offset);
  }

  scope<T>(body: () => T): T {
    return this.#scopes.run(body);
  }

  deposit(): Deposit {
    this.#checkOpen();
    const segment = new DepositSegment(this.#driver, this.#stream, this.#totalBytes);
    const collected = new FinalizationRegistry<number>((offset) => segment.free(offset));
    this.#deposits.set(segment, collected);
    return {
      add: (memory) => {
        this.#checkOpen();
        this.#refuseRecording("offloading");
        const { pointer, byteLength } = this.#own(memory);
        if (segment.mapped > 0) {
          throw new FfiError(`${this.name}: weights are added to a deposit that is on the GPU`);
        }
        const moved = new CudaMemory(this, byteLength, segment, segment.add(pointer, byteLength));
        collected.register(moved, moved.offset, moved);
        this.free(memory);
        return moved;
      },
      bring: () => {
        this.#checkOpen();
        this.#refuseRecording("bringing weights");
        if (!segment.bring() && !(this.#trim() && segment.bring())) {
          throw this.#outOfMemory(segment.end, "weights that were offloaded");
        }
      },
      leave: () => {
        this.#checkOpen();
        this.#refuseRecording("offloading");
        segment.leave();
      },
    };
  }

  async placeAll(parts: readonly Uint8Array[], onBytes?: (bytes: number) => void): Promise<Memory[]> {
    this.#refuseRecording("streaming weights");
    const memories: CudaMemory[] = [];
    try {
      for (const bytes of parts) memories.push(this.alloc(bytes.byteLength, "weights"));
      const transfers = parts.map((bytes, i) => ({ bytes, target: memories[i].pointer }));
      await streamToDevice(this.#driver, this.#stream, transfers, onBytes);
      return memories;
    } catch (error) {
      for (const memory of memories) this.free(memory);
      throw error;
    }
  }

  changed(): void {} // libraries keep nothing that they have made of weights

  /** Returns at once; the host's bytes may change afterwards. */
  upload(bytes: Uint8Array, memory: Memory): void {
    this.#checkOpen();
    this.#refuseRecording("an upload"); // it would read the staging memory again at each replay
    this.#own(memory);
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
    this.#checkOpen();
    this.#refuseRecording("a download");
    if (tensor.device !== this) throw new FfiError(`${this.name}: ${tensor} lies on ${tensor.device.name}`);
    checkDownload(this.name, tensor, into);
    this.#staging.download(tensor.pointer, into);
    return Promise.resolve(into);
  }

  // -- work --

  matmul(plan: MatmulPlan): void {
    this.#checkOpen();
    this.#matmuls.matmul(plan);
  }

  takesMatmul(plan: MatmulPlan): boolean {
    this.#checkOpen();
    return this.#matmuls.takes(plan);
  }

  conv(plan: ConvPlan): void {
    this.#checkOpen();
    this.#convolutions.conv(plan);
  }

  attention(plan: AttentionPlan): boolean {
    this.#checkOpen();
    if (plan.library === "fa3") return this.#flashAttention3.attention(plan);
    // cuDNN has none in float32: who computes in it needs no cuDNN for attention.
    if (plan.q.dtype === "f32") return false;
    return this.#convolutions.attention(plan);
  }

  kernel(source: KernelSource, entry: string): CudaKernel {
    this.#checkOpen();
    let module = this.#modules.get(source.text);
    if (module === undefined) {
      const cubin = this.#cubin(source);
      module = { handle: this.#driver.moduleLoadData(cubin, source.name), kernels: new Map() };
      this.#modules.set(source.text, module);
    }
    let kernel = module.kernels.get(entry);
    if (kernel === undefined) {
      const name = `${source.name}:${entry}`;
      const handle = this.#driver.moduleGetFunction(module.handle, entry, source.name);
      kernel = new CudaKernel(
        this,
        name,
        handle,
        this.#driver.funcGetAttribute(HEADER.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, handle),
        this.#driver.funcGetAttribute(HEADER.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, handle),
      );
      module.kernels.set(entry, kernel);
    }
    return kernel;
  }

  launch(kernel: GpuKernel, launch: Launch, args: readonly KernelArgument[]): void {
    this.#checkOpen();
    const { name } = kernel;
    if (!(kernel instanceof CudaKernel) || kernel.device !== this) {
      throw new FfiError(`${name}: this kernel was not loaded by ${this.name}`);
    }
    const { grid, block, shared = 0 } = launch;
    writeDim3(this.#grid, grid, this.#mostGrid, name, "grid");
    writeDim3(this.#block, block, this.#mostBlock, name, "block");
    const threads = this.#block[0] * this.#block[1] * this.#block[2];
    if (threads > this.#mostThreads) {
      throw new FfiError(`${name}: a block of ${threads} threads, ${this.name} takes ${this.#mostThreads}`);
    }
    if (shared > kernel.dynamicShared) this.#raiseShared(kernel, shared);
    const bytes = this.#arguments.pack(args, name, this);
    this.#argumentBytes[0] = BigInt(bytes);
    // Of a kernel with a parameter at a multiple of 64 the driver (580) takes the arguments' addresses only: all of them as
    // one buffer arrive as zeros.
    const mapped = args.some((arg) => arg instanceof TensorMap);
    const { address, starts } = this.#arguments;
    const parameters = mapped ? BigUint64Array.from(starts, (start) => address + BigInt(start)) : null;
    const extra = mapped || bytes === 0 ? null : this.#extra;
    this.#driver.launchKernel(
      kernel.handle,
      this.#grid,
      this.#block,
      shared,
      this.#stream,
      parameters,
      extra,
      name,
    );
  }

  tensorMap(matrix: Tensor, rows: number): TensorMap {
    this.#checkOpen();
    const bytes = dtypeBytes(matrix.dtype);
    const [count, length] = matrix.shape;
    const stride = count === 1 ? length : matrix.strides[0];
    const map = this.#driver.tensorMapEncode(
      matrix.pointer,
      count,
      length * bytes,
      stride * bytes,
      rows,
      `${matrix}`,
    );
    return new TensorMap(matrix, map);
  }

  measuring<T>(body: () => T): T {
    const before = this.#measuring;
    this.#measuring = true;
    try {
      return body();
    } finally {
      this.#measuring = before;
    }
  }

  fastest(key: string, ways: readonly (() => void)[]): number {
    return this.#choose(key, () => ways.map((way) => () => (way(), true)));
  }

  /** Opens the libraries that it names. Without NVML the driver counts as the newest version of CUDA that it takes. */
  environment(): Readonly<Record<string, string>> {
    this.#checkOpen();
    return {
      GPU: this.#gpuName,
      architecture: this.limits.architecture,
      multiprocessors: String(this.limits.multiprocessors),
      driver: driverVersion() ?? `for CUDA ${this.#driver.driverGetVersion().join(".")}`,
      cuBLASLt: versionOr(() => this.#matmuls.version),
      cuDNN: versionOr(() => this.#convolutions.version),
    };
  }

  prepared(): ReadonlyMap<string, Uint8Array<ArrayBuffer>> {
    this.#checkOpen();
    const memory: MemoryPlan = {
      activations: this.#activations.mapped,
      recorded: this.#recorded.mapped,
      weights: this.#weights.used, // of a model that was larger before it was quantized, less than is mapped
    };
    return new Map([
      ...this.#prepared,
      ...this.#cudnn?.serialized() ?? [],
      [MEMORY_PLAN, new TextEncoder().encode(JSON.stringify(memory))],
    ]);
  }

  adopt(prepared: ReadonlyMap<string, Uint8Array<ArrayBuffer>>): void {
    this.#checkOpen();
    for (const [key, bytes] of prepared) this.#prepared.set(key, bytes);
    const memory = prepared.get(MEMORY_PLAN);
    if (memory === undefined) return;
    const { activations, recorded, weights }: MemoryPlan = JSON.parse(new TextDecoder().decode(memory));
    this.#weights.reserve(weights);
    this.#activations.reserve(activations);
    this.#recorded.reserve(recorded);
  }

  event(): GpuEvent {
    this.#checkOpen();
    this.#refuseRecording("an event");
    const event = this.#driver.eventCreate(true);
    this.#driver.eventRecord(event, this.#stream);
    return new CudaEvent(this.#driver, event);
  }

  /**
   * Throws what `body` throws, and {@link FfiError} where the driver cannot record what it did; then nothing stays
   * recorded.
   */
  record(body: () => void): Graph {
    this.#checkOpen();
    this.#refuseRecording("a recording");
    const [driver, stream] = [this.#driver, this.#stream];
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
      const graph: CudaGraph = new CudaGraph(driver, stream, executable, () => {
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

  async openProfiler(): Promise<GpuProfiler> {
    this.#checkOpen();
    this.#refuseRecording("opening a profiler");
    this.#cupti ??= new Cupti(this.#driver.driverGetVersion()[0]);
    const driver = this.#driver;
    return await this.#cupti.openProfiler({
      get isLost() {
        return driver.isLost;
      },
      enter: () => driver.enter(),
      synchronize: () => this.synchronize(),
    });
  }

  async synchronize(): Promise<void> {
    this.#checkOpen();
    this.#refuseRecording("waiting");
    // Timers, signals and other requests go on meanwhile; a timer of its own would wake up a millisecond late.
    while (!this.#driver.streamQuery(this.#stream)) await new Promise((resolve) => setImmediate(resolve));
  }

  /** Waits for the work and gives all back. Throws what went wrong in that work, where nobody has seen it yet. */
  [Symbol.dispose](): void {
    if (this.#closed) return;
    this.#closed = true;
    const lostBefore = this.#driver.isLost;
    const failures: unknown[] = [];
    const attempt = (work: () => void) => {
      try {
        work();
      } catch (error) {
        failures.push(error);
      }
    };
    attempt(() => this.#driver.streamSynchronize(this.#stream));
    for (const graph of this.#graphs) attempt(() => graph[Symbol.dispose]());
    attempt(() => this.#cupti?.[Symbol.dispose]());
    attempt(() => this.#flashAttention3[Symbol.dispose]());
    attempt(() => this.#cudnn?.[Symbol.dispose]());
    attempt(() => this.#cublasLt?.[Symbol.dispose]());
    for (const { handle } of this.#modules.values()) attempt(() => this.#driver.moduleUnload(handle));
    attempt(() => this.#nvrtc?.[Symbol.dispose]());
    attempt(() => this.#staging[Symbol.dispose]());
    attempt(() => this.#activations[Symbol.dispose]());
    attempt(() => this.#weights[Symbol.dispose]());
    attempt(() => this.#recorded[Symbol.dispose]());
    for (const segment of this.#deposits.keys()) attempt(() => segment[Symbol.dispose]());
    attempt(() => this.#driver.streamDestroy(this.#stream));
    attempt(() => this.#driver[Symbol.dispose]());
    // With a lost context every step fails, and somebody was told already.
    if (failures.length > 0 && !lostBefore) throw failures[0];
  }

  // -- helpers --

  /** Of all deposits that are on the GPU now. */
  get #depositedBytes(): number {
    return this.#deposits.keys().reduce((sum, { mapped }) => sum + mapped, 0);
  }

  get #compiler(): Nvrtc {
    return this.#nvrtc ??= new Nvrtc(this.#driver.driverGetVersion()[0]);
  }

  get #matmuls(): CublasLt {
    return this.#cublasLt ??= new CublasLt(this.context);
  }

  get #convolutions(): Cudnn {
    return this.#cudnn ??= new Cudnn(this.context);
  }

  #own(memory: Memory): CudaMemory {
    if (memory instanceof CudaMemory && memory.device === this) return memory;
    throw new FfiError(`${this.name}: memory of ${memory.device.name} is not mine`);
  }

  #checkOpen(): void {
    if (this.#closed) throw new FfiError(`${this.name}: the device was closed`);
    this.#driver.checkAlive();
  }

  #refuseRecording(what: string): void {
    if (this.#recording) throw new FfiError(`${this.name}: ${what} cannot be part of a recording`);
  }

  #take(segment: Segment, byteLength: number, what: string): CudaMemory {
    let offset = segment.alloc(byteLength);
    if (offset === undefined && this.#trim()) offset = segment.alloc(byteLength);
    if (offset === undefined) throw this.#outOfMemory(byteLength, what);
    this.#notePeak();
    return new CudaMemory(this, byteLength, segment, offset);
  }

  /** Gives unused memory at the ends of all segments back to the GPU; false where there is none to give. */
  #trim(): boolean {
    // Waiting would break a recording, and recorded work may use what is free outside of it.
    if (this.#recording || this.#graphs.size > 0) return false;
    this.#driver.streamSynchronize(this.#stream);
    return this.#activations.trim() + this.#weights.trim() + this.#recorded.trim() > 0;
  }

  #outOfMemory(byteLength: number, what: string): OutOfMemoryError {
    const { current, weights } = this.memoryUse();
    const { free, total } = this.#driver.memGetInfo();
    return new OutOfMemoryError(
      `${this.name}: out of memory: asked for ${mebibytes(byteLength)} for ${what}; ` +
        `${mebibytes(weights)} are used by weights, ${mebibytes(current)} by activations and ` +
        `${mebibytes(this.#workspaceBytes)} by libraries, ` +
        `${mebibytes(free)} of ${mebibytes(total)} are free on the GPU`,
      {
        hint: "A smaller --height and --width, fewer pictures at a time, bfloat16 instead of float32 (no " +
          "--disable_bf16), or closing other programs that use the GPU (nvidia-smi lists them) leave more.",
      },
    );
  }

  #cubin(source: KernelSource): Uint8Array<ArrayBuffer> {
    const { architecture } = this.limits;
    const hash = createHash("sha256").update(`${architecture}\n${source.text}`).digest("hex");
    const key = `cubin of ${source.name} ${hash}`;
    let cubin = this.#prepared.get(key);
    if (cubin === undefined) {
      cubin = this.#compiler.compile(source, architecture, this.#cache);
      this.#prepared.set(key, cubin);
    }
    return cubin;
  }

  /** See {@link CudaContext.choose}. */
  #choose(work: string, ways: () => readonly (() => boolean)[]): number {
    if (!this.#measuring) return 0;
    const key = `choice for ${work}`;
    let choice = this.#prepared.get(key);
    if (choice === undefined) {
      if (this.#recording) return 0;
      const measure = () => {
        const found = Uint8Array.of(fastest(this.context, ways()));
        this.onMeasured(++this.#measured);
        return found;
      };
      const driver = this.#driver.driverGetVersion().join(".");
      choice = this.#cache?.get(["choice", this.#gpuName, driver, work], measure) ?? measure();
      this.#prepared.set(key, choice);
    }
    return choice[0];
  }

  /** See {@link CudaContext.workspace}. Recorded work keeps the piece that it was recorded with. */
  #workspace(bytes: number): bigint {
    const last = this.#workspaces.at(-1);
    if (last !== undefined && last.byteLength >= bytes) return last.pointer;
    if (!this.#recording && this.#graphs.size === 0) this.#freeOldWorkspaces(0);
    const memory = this.#take(this.#weights, Math.ceil(bytes / ALIGNMENT) * ALIGNMENT, "a library's scratch");
    this.#workspaces.push(memory);
    this.#countWorkspaces();
    return memory.pointer;
  }

  /** Where no graph is in use, gives back what libraries have kept for graphs. */
  #freeWhatGraphsUsed(): void {
    if (this.#graphs.size > 0 || this.#closed) return;
    this.#freeOldWorkspaces();
    this.#flashAttention3.freeRecorded();
  }

  /** Frees all but the last `keep` pieces. */
  #freeOldWorkspaces(keep = 1): void {
    for (const memory of this.#workspaces.splice(0, this.#workspaces.length - keep)) this.free(memory);
    this.#countWorkspaces();
  }

  #countWorkspaces(): void {
    this.#workspaceBytes = this.#workspaces.reduce((sum, { byteLength }) => sum + byteLength, 0);
    this.#notePeak();
  }

  #notePeak(): void {
    const recorded = this.#recorded.mapped; // whether in use at the moment or not
    this.#peak = Math.max(this.#peak, this.#activations.used + recorded + this.#workspaceBytes);
  }

  /** More dynamic shared memory than a kernel has without asking must be asked for, once. */
  #raiseShared(kernel: CudaKernel, bytes: number): void {
    const { sharedBytesPerBlock } = this.limits;
    if (kernel.declaredShared + bytes > sharedBytesPerBlock) {
      throw new FfiError(
        `${kernel.name}: ${kernel.declaredShared} + ${bytes} bytes of shared memory, ${this.name} has ` +
          `${sharedBytesPerBlock} for a block`,
      );
    }
    this.#driver.funcSetAttribute(
      kernel.handle,
      HEADER.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
      bytes,
    );
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

/** The driver's version, e.g. `"580.159.04"`; undefined without NVML. */
function driverVersion(): string | undefined {
  try {
    return askNvml().driverVersion;
  } catch (error) {
    if (!(error instanceof LibraryNotFoundError)) throw error;
    return undefined;
  }
}

/** A library's version, or why it does not open: in one line, without the list of places. */
function versionOr(version: () => string): string {
  try {
    return version();
  } catch (error) {
    if (!(error instanceof FfiError)) throw error;
    return `${briefly(error)}${error.hint === undefined ? "" : `; ${error.hint}`}`;
  }
}

function mebibytes(bytes: number): string {
  return `${(bytes / MIB).toFixed(1)} MiB`;
}

function gibibytes(bytes: number): string {
  return `${(bytes / 2 ** 30).toFixed(1)} GiB`;
}
