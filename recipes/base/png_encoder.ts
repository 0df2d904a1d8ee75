import { Worker } from "node:worker_threads";
import { FluxError } from "../../ffi/errors.ts";
import type { encodePng } from "./image.ts";
import type { PngAnswer, PngJob } from "./png_worker.ts";

/**
 * {@link encodePng} in a thread of its own: 0.13 s for a million pixels, in which the next picture is drawn. One at a time;
 * who has several waits for each.
 */
export class PngEncoder implements Disposable {
  readonly #worker = new Worker(new URL("./png_worker.ts", import.meta.url));

  readonly encode: typeof encodePng = (rgb, width, height, metadata = {}) => {
    const worker = this.#worker;
    const { promise, resolve, reject } = Promise.withResolvers<Uint8Array<ArrayBuffer>>();
    const answered = (answer: PngAnswer) => {
      if ("png" in answer) resolve(answer.png);
      else reject(new FluxError(`encoding a picture failed: ${answer.problem}`));
    };
    const failed = (error: Error) => reject(new FluxError(`encoding a picture failed: ${error.message}`));
    worker.once("message", answered).once("error", failed);
    const job: PngJob = { rgb: new Uint8Array(rgb), width, height, metadata };
    worker.postMessage(job);
    return promise.finally(() => worker.off("message", answered).off("error", failed));
  };

  [Symbol.dispose](): void {
    void this.#worker.terminate();
  }
}
