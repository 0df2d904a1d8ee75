/**
 * The shared page on which the main thread posts work and every thread takes jobs from, one at a time.
 *
 * A round is open while {@link ROUND} is not 0. A thread first counts itself in ({@link BUSY}), then looks at the
 * round; the main thread closes the round and waits until nobody is busy before it writes the next one. So a thread
 * that wakes up late sees either a closed round or a complete new one.
 */

/** Words of the board (i32). */
const ROUND = 0; // number of the open round, 0 between rounds, STOP at the end
const NEXT = 1; // first job that nobody has taken
const BUSY = 2; // workers inside a round
const READY = 3; // workers that have started
const JOBS = 4;
const MODULE_START = 5; // where in the module area the bytes of the kernel's module lie
const MODULE_LENGTH = 6;
const EXPORT = 7; // the kernel's place among the module's exports
const ARGUMENTS = 8; // how many arguments follow the job's index
const FAILED = 9; // a worker's kernel trapped
const WORDS = 16;

const STOP = -1;
/** Every argument travels as f64, which holds an i32 and an f32 exactly. */
const MAX_ARGUMENTS = 32;
const ARGUMENTS_BYTE = WORDS * 4;
const MODULES_BYTE = ARGUMENTS_BYTE + MAX_ARGUMENTS * 8;
const MODULES_LENGTH = 256 * 1024;

/** Looks at the board this often before it sleeps: a round often follows another within microseconds. */
const SPINS = 2000;

/** A kernel: an export that takes the job's index and numbers, and returns nothing. */
export type KernelFunction = (job: number, ...args: number[]) => void;

/** What every thread needs to take part: structured-cloneable, handed to a worker as it starts. */
export interface WorkerData {
  readonly board: SharedArrayBuffer;
  readonly memory: WebAssembly.Memory;
  /** Offset of the thread's own scratch bytes in `memory`. */
  readonly scratch: number;
}

/** Where a kernel is to be found by threads that have not met its module. */
export interface KernelAddress {
  readonly moduleStart: number;
  readonly moduleLength: number;
  readonly exportIndex: number;
}

export class JobBoard {
  readonly #words: Int32Array;
  readonly #arguments: Float64Array;
  readonly #modules: Uint8Array;
  #modulesEnd = 0;
  #round = 0;

  constructor(readonly buffer = new SharedArrayBuffer(MODULES_BYTE + MODULES_LENGTH)) {
    this.#words = new Int32Array(buffer, 0, WORDS);
    this.#arguments = new Float64Array(buffer, ARGUMENTS_BYTE, MAX_ARGUMENTS);
    this.#modules = new Uint8Array(buffer, MODULES_BYTE);
  }

  /** Workers that have started so far. */
  get ready(): number {
    return Atomics.load(this.#words, READY);
  }

  /** Copies a module's bytes to where all threads can read them; undefined when the area is full. */
  addModule(bytes: Uint8Array): { start: number; length: number } | undefined {
    const start = this.#modulesEnd;
    if (start + bytes.length > this.#modules.length) return undefined;
    this.#modules.set(bytes, start);
    this.#modulesEnd += bytes.length;
    return { start, length: bytes.length };
  }

  /** Main thread: runs jobs `0 .. jobs - 1` with all the workers that are there, and returns when all are done. */
  run(kernel: KernelFunction, address: KernelAddress, jobs: number, args: readonly number[]): void {
    const words = this.#words;
    if (args.length > MAX_ARGUMENTS) {
      throw new RangeError(`a kernel takes at most ${MAX_ARGUMENTS} arguments`);
    }
    words[JOBS] = jobs;
    words[MODULE_START] = address.moduleStart;
    words[MODULE_LENGTH] = address.moduleLength;
    words[EXPORT] = address.exportIndex;
    words[ARGUMENTS] = args.length;
    words[FAILED] = 0;
    words[NEXT] = 0;
    this.#arguments.set(args);
    this.#round = this.#round % 0x7fffffff + 1;
    Atomics.store(words, ROUND, this.#round);
    Atomics.notify(words, ROUND);
    try {
      takeJobs(words, jobs, kernel, args);
    } finally {
      Atomics.store(words, ROUND, 0);
      for (let spin = 0;;) {
        const busy = Atomics.load(words, BUSY);
        if (busy === 0) break;
        if (spin++ >= SPINS) Atomics.wait(words, BUSY, busy);
      }
    }
    if (words[FAILED] !== 0) {
      throw new WebAssembly.RuntimeError("a WebAssembly kernel trapped in a worker thread");
    }
  }

  /** Main thread: lets the workers end. */
  stop(): void {
    Atomics.store(this.#words, ROUND, STOP);
    Atomics.notify(this.#words, ROUND);
  }

  /** Worker: takes part in every round until {@link stop}. Blocks the thread. */
  serve(
    find: (module: () => Uint8Array<ArrayBuffer>, key: number, exportIndex: number) => KernelFunction,
  ): void {
    const words = this.#words;
    Atomics.add(words, READY, 1);
    for (let last = 0, spin = 0;;) {
      const round = Atomics.load(words, ROUND);
      if (round === STOP) return;
      if (round === 0 || round === last) {
        if (spin++ >= SPINS) Atomics.wait(words, ROUND, round);
        continue;
      }
      spin = 0;
      last = round;
      Atomics.add(words, BUSY, 1);
      try {
        if (Atomics.load(words, ROUND) !== round) continue; // closed before we came in, or another one by now
        const start = words[MODULE_START];
        const bytes = () => this.#modules.slice(start, start + words[MODULE_LENGTH]);
        const args = Array.from(this.#arguments.subarray(0, words[ARGUMENTS]));
        takeJobs(words, words[JOBS], find(bytes, start, words[EXPORT]), args);
      } catch {
        // The main thread reports it; the jobs that this thread has taken are lost, so the result must not be used.
        Atomics.store(words, FAILED, 1);
      } finally {
        if (Atomics.sub(words, BUSY, 1) === 1) Atomics.notify(words, BUSY);
      }
    }
  }
}

function takeJobs(words: Int32Array, jobs: number, kernel: KernelFunction, args: readonly number[]): void {
  for (let job = Atomics.add(words, NEXT, 1); job < jobs; job = Atomics.add(words, NEXT, 1)) {
    kernel(job, ...args);
  }
}
