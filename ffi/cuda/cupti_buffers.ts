import { Worker } from "node:worker_threads";
import { FfiError, messageOf } from "../errors.ts";

/** Of one buffer; CUPTI's guide says 1 to 10 MB. A kernel's record has 208 to 248 bytes. */
export const BUFFER_BYTES = 4 * 2 ** 20;

/** Addresses of the two functions for `cuptiActivityRegisterCallbacks`. */
export interface CallbackAddresses {
  readonly requested: bigint;
  readonly completed: bigint;
}

/**
 * The memory that CUPTI writes its records into.
 *
 * CUPTI asks for buffers and gives them back by calling two functions, from whatever thread it likes: the one that makes
 * a call of CUDA, or a thread of its own, with its locks held. JavaScript that runs on the main thread cannot answer there:
 * the main thread may be inside a call of CUDA just then, waiting for the same lock, and both wait forever. So the
 * functions belong to a worker, whose thread does nothing else and never calls CUDA: it answers at once, whoever asks, while
 * the caller waits.
 *
 * CUPTI keeps the two functions, and buffers that it has not given back, until the process ends; so the worker stays. It
 * does not keep the process alive.
 */
export class ActivityBuffers {
  readonly #worker: Worker;

  private constructor(worker: Worker, readonly callbacks: CallbackAddresses) {
    this.#worker = worker;
  }

  /** The process's only ones. Throws {@link FfiError} where the worker does not start. */
  static async start(): Promise<ActivityBuffers> {
    started ??= ActivityBuffers.#start();
    try {
      return await started;
    } catch (error) {
      started = undefined;
      throw error;
    }
  }

  static async #start(): Promise<ActivityBuffers> {
    try {
      const worker = new Worker(new URL("./cupti_worker.ts", import.meta.url));
      return new ActivityBuffers(worker, await answer<CallbackAddresses>(worker));
    } catch (cause) {
      throw new FfiError(`cupti: the thread for its records does not start: ${messageOf(cause)}`, {
        cause,
        hint: "run deno with --allow-read for the program's folder and --allow-ffi",
      });
    }
  }

  /** The buffers that CUPTI has given back since the last call, each cut behind its last valid byte. */
  take(): Promise<Uint8Array<ArrayBuffer>[]> {
    const buffers = answer<Uint8Array<ArrayBuffer>[]>(this.#worker);
    this.#worker.postMessage("take");
    return buffers;
  }
}

let started: Promise<ActivityBuffers> | undefined;

/** The worker's next message. It keeps the process alive only as long as somebody waits for one. */
function answer<T>(worker: Worker): Promise<T> {
  return new Promise<T>((resolve, reject) => {
    const settle = (how: () => void) => {
      worker.off("message", onMessage);
      worker.off("error", onError);
      worker.unref();
      how();
    };
    const onMessage = (message: T) => settle(() => resolve(message));
    const onError = (error: Error) => settle(() => reject(error));
    worker.on("message", onMessage);
    worker.on("error", onError);
    worker.ref();
  });
}
