import { Worker } from "node:worker_threads";
import { FfiError, messageOf } from "../errors.ts";
import type { Assembler } from "./assembler.ts";
import { JobBoard, type KernelAddress, type KernelFunction, type WorkerData } from "./job_board.ts";

/** Bytes of scratch that each thread has for itself: the import `env.scratch` of a kernel's module is its offset. */
export const SCRATCH_BYTES = 4096;

/** A kernel that {@link WasmRunner.run} can start; see {@link WasmRunner.module}. */
export interface Kernel {
  readonly name: string;
  readonly call: KernelFunction;
  /** Undefined where other threads cannot get at the module. */
  readonly address: KernelAddress | undefined;
}

export interface RunnerOptions {
  /** Threads in all, the main thread among them. */
  readonly threads: number;
  /** Offset of `threads * SCRATCH_BYTES` bytes in `memory` that nothing else uses. */
  readonly scratch: number;
}

/**
 * Runs WebAssembly kernels over one shared memory on the main thread and on workers.
 *
 * A module is written as text (.wat). It imports `env.memory` (shared) and, if it likes, `env.scratch` (i32, the
 * offset of {@link SCRATCH_BYTES} bytes of the running thread); each export is a kernel whose first parameter is the
 * index of the job and whose others are i32 or f32.
 *
 * Workers start at the first {@link run} that can use them and join when they are up (some 50 ms later); they do not
 * keep the process alive. Where they cannot start (no permission to read this folder) the main thread does it all.
 */
export class WasmRunner implements Disposable {
  readonly #board = new JobBoard();
  readonly #modules = new Map<string, Record<string, Kernel>>();
  #workers: Worker[] | undefined;
  #problem: string | undefined;
  #closed = false;

  constructor(
    private readonly memory: WebAssembly.Memory,
    private readonly assembler: Assembler,
    private readonly options: RunnerOptions,
  ) {}

  /** Threads that share the work: those that may run, or 1 once it is known that workers cannot start. */
  get threads(): number {
    return this.#problem === undefined ? this.options.threads : 1;
  }

  /** What the kernels run on, e.g. `"WebAssembly relaxed SIMD, 2 threads"`. */
  get description(): string {
    const simd = this.assembler.relaxed ? "relaxed SIMD" : "SIMD";
    const threads = this.threads === 1 ? "1 thread" : `${this.threads} threads`;
    return `WebAssembly ${simd}, ${threads}`;
  }

  /** Why there are no workers, or one is missing; undefined where all is well. */
  get problem(): string | undefined {
    return this.#problem;
  }

  /**
   * Assembles `text` once and returns its kernels by export name. `name` is for messages and must be unique to the
   * text (a function gives it when it is needed). Throws {@link FfiError} for text that does not assemble or whose module does not fit this engine.
   */
  module(name: string, text: string | (() => string)): Readonly<Record<string, Kernel>> {
    const known = this.#modules.get(name);
    if (known !== undefined) return known;
    const bytes = this.assembler.assemble(name, typeof text === "string" ? text : text());
    const kernels: Record<string, Kernel> = {};
    try {
      const module = new WebAssembly.Module(bytes);
      const { memory } = this;
      const { exports } = new WebAssembly.Instance(module, {
        env: { memory, scratch: this.options.scratch },
      });
      const place = this.#board.addModule(bytes);
      for (const [exportIndex, entry] of WebAssembly.Module.exports(module).entries()) {
        kernels[entry.name] = {
          name: `${name}: ${entry.name}`,
          call: exports[entry.name] as KernelFunction,
          address: place && { moduleStart: place.start, moduleLength: place.length, exportIndex },
        };
      }
    } catch (cause) {
      throw new FfiError(
        `${name} is refused by this engine: ${messageOf(cause)}`,
        {
          cause,
        },
      );
    }
    this.#modules.set(name, kernels);
    return kernels;
  }

  /**
   * Calls `kernel(job, ...args)` for every job from 0 to `jobs - 1`, in any order, on all threads, and returns when
   * all are done. `alone` keeps it on the main thread: right when the whole work takes less than ~20 microseconds.
   * Throws {@link FfiError} when the kernel traps.
   */
  run(kernel: Kernel, jobs: number, args: readonly number[], alone = false): void {
    if (this.#closed) throw new FfiError("cpu: the device was closed");
    try {
      if (jobs > 1 && !alone && kernel.address !== undefined && this.#start()) {
        this.#board.run(kernel.call, kernel.address, jobs, args);
      } else {
        for (let job = 0; job < jobs; job++) kernel.call(job, ...args);
      }
    } catch (cause) {
      throw new FfiError(`${kernel.name} failed: ${messageOf(cause)}`, {
        cause,
      });
    }
  }

  /** Starts the workers at the first call; whether any is ready. */
  #start(): boolean {
    if (this.options.threads === 1) return false;
    if (this.#workers === undefined) {
      this.#workers = [];
      try {
        for (let thread = 1; thread < this.options.threads; thread++) {
          const workerData: WorkerData = {
            board: this.#board.buffer,
            memory: this.memory,
            scratch: this.options.scratch + thread * SCRATCH_BYTES,
          };
          const worker = new Worker(new URL("./wasm_worker.ts", import.meta.url), { workerData });
          // An error inside a worker must not end the process: the others do its share.
          worker.on("error", (error: Error) => this.#problem = `a worker failed: ${error.message}`);
          worker.unref();
          this.#workers.push(worker);
        }
      } catch (error) {
        this.#problem = `no worker threads: ${messageOf(error)}`;
      }
    }
    return this.#board.ready > 0;
  }

  /** Resolves when all workers are up (or 2 seconds have passed): only measurements and tests wait for that. */
  async warm(): Promise<void> {
    this.#start();
    const until = performance.now() + 2000;
    while (this.#board.ready < (this.#workers?.length ?? 0) && performance.now() < until) {
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
  }

  [Symbol.dispose](): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#board.stop();
  }
}
