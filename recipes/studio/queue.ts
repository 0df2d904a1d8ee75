import { UsageError } from "../base/errors.ts";

/** Jobs, one after another. */
export class JobQueue {
  readonly #waiting: Job[] = [];
  #running = false;

  /** @param most jobs that may wait. */
  constructor(private readonly most: number) {}

  /**
   * Runs `work` when its turn has come. A job whose signal aborts before leaves the queue.
   *
   * @param onAhead is told how many jobs come before this one, at once and whenever that changes.
   * @throws UsageError where too many wait; the signal's reason; what `work` throws
   */
  run<T>(work: () => Promise<T>, signal: AbortSignal, onAhead: (ahead: number) => void): Promise<T> {
    if (this.#waiting.length >= this.most) {
      throw new UsageError(`${this.most} pictures are waiting already: try again when some are drawn`);
    }
    const { promise, resolve, reject } = Promise.withResolvers<T>();
    const leave = () => {
      const place = this.#waiting.indexOf(job);
      if (place < 0) return; // it runs, and looks at the signal itself
      this.#waiting.splice(place, 1);
      reject(signal.reason);
      this.#tell();
    };
    const job: Job = {
      onAhead,
      start: () => {
        signal.removeEventListener("abort", leave);
        return work().then(resolve, reject);
      },
    };
    if (signal.aborted) return Promise.reject(signal.reason);
    signal.addEventListener("abort", leave);
    this.#waiting.push(job);
    this.#tell();
    void this.#next();
    return promise;
  }

  async #next(): Promise<void> {
    if (this.#running) return;
    this.#running = true;
    for (let job = this.#waiting.shift(); job !== undefined; job = this.#waiting.shift()) {
      this.#tell();
      await job.start();
    }
    this.#running = false;
  }

  #tell(): void {
    this.#waiting.forEach(({ onAhead }, i) => onAhead(i + (this.#running ? 1 : 0)));
  }
}

interface Job {
  readonly onAhead: (ahead: number) => void;
  readonly start: () => Promise<void>;
}
