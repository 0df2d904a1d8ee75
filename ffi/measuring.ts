/** Book-keeping behind {@link GpuDevice.measuring}, for all devices that measure. */
export class Measuring {
  #on = false;

  /** Whether a body of {@link run} is running. */
  get on(): boolean {
    return this.#on;
  }

  run<T>(body: () => T): T {
    const before = this.#on;
    this.#on = true;
    try {
      return body();
    } finally {
      this.#on = before;
    }
  }
}
