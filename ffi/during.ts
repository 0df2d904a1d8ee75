/** Something that is so while a body runs: book-keeping behind {@link GpuDevice.measuring} and the like. */
export class During {
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
