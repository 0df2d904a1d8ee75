import type { Memory } from "./device.ts";
import { Tensor } from "./tensor.ts";

/**
 * Book-keeping behind {@link Device.scope}: which memory each open scope has allocated. All devices share it, so
 * that the model code frees its activations in the same way everywhere.
 */
export class MemoryScopes {
  readonly #open: Set<Memory>[] = [];

  constructor(private readonly free: (memory: Memory) => void) {}

  /** Notes memory that was just allocated in the innermost scope; outside any scope the caller owns it. */
  add(memory: Memory): void {
    this.#open.at(-1)?.add(memory);
  }

  /** Forgets memory that was freed by hand. */
  remove(memory: Memory): void {
    for (const scope of this.#open) scope.delete(memory);
  }

  /** Runs `body` in a new scope; see {@link Device.scope}. */
  run<T>(body: () => T): T {
    const scope = new Set<Memory>();
    this.#open.push(scope);
    let kept: Set<Memory> = new Set();
    try {
      const result = body();
      if (result instanceof Promise) throw new TypeError("a memory scope takes a synchronous function");
      kept = memoriesOf(result);
      return result;
    } finally {
      this.#open.pop();
      for (const memory of scope) {
        if (kept.has(memory)) this.add(memory);
        else this.free(memory);
      }
    }
  }
}

/** Memories of the tensors in a tensor, an array or a plain object (nested). */
function memoriesOf(value: unknown, found = new Set<Memory>()): Set<Memory> {
  if (value instanceof Tensor) found.add(value.memory);
  else if (Array.isArray(value)) { for (const item of value) memoriesOf(item, found); }
  else if (typeof value === "object" && value !== null && Object.getPrototypeOf(value) === Object.prototype) {
    for (const item of Object.values(value)) memoriesOf(item, found);
  }
  return found;
}
