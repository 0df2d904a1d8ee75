import type { Memory } from "../device.ts";
import type { Tensor } from "../tensor.ts";

/**
 * Copies of constant tensors in the layout that a kernel reads fastest, made once per weight.
 *
 * An entry belongs to the {@link Memory} object, not to its address: when a weight is freed and another one comes to
 * lie at the same place, that is another object and finds nothing. Within one memory the view's geometry is the key.
 * `release` gives an entry's bytes back: after {@link forget}, {@link clear}, or when the weight was collected.
 */
export class PackedCache<T> {
  readonly #entries = new Map<number, Map<string, { value: T; bytes: number }>>();
  readonly #ids = new WeakMap<Memory, number>();
  readonly #collected = new FinalizationRegistry<number>((id) => this.#drop(id));
  #nextId = 0;
  #bytes = 0;

  constructor(
    /** No more than this is kept; what comes later is packed at each use. */
    private readonly budget: number,
    private readonly release: (value: T) => void,
  ) {}

  /** Bytes that the entries take. */
  get bytes(): number {
    return this.#bytes;
  }

  /**
   * The packed form `kind` of `tensor`, made by `make` at the first call; undefined where its `bytes` do not fit into
   * the budget any more.
   */
  get(tensor: Tensor, kind: string, bytes: number, make: () => T): T | undefined {
    const key = `${kind} ${tensor.dtype} ${tensor.offset} ${tensor.shape} ${tensor.strides}`;
    const known = this.#ids.get(tensor.memory);
    const entry = known === undefined ? undefined : this.#entries.get(known)?.get(key);
    if (entry !== undefined) return entry.value;
    if (this.#bytes + bytes > this.budget) return undefined;
    const value = make();
    const id = known ?? this.#nextId++;
    if (known === undefined) {
      this.#ids.set(tensor.memory, id);
      this.#collected.register(tensor.memory, id);
    }
    let views = this.#entries.get(id);
    if (views === undefined) this.#entries.set(id, views = new Map());
    views.set(key, { value, bytes });
    this.#bytes += bytes;
    return value;
  }

  /** Drops all that was made of `memory`. */
  forget(memory: Memory): void {
    const id = this.#ids.get(memory);
    if (id !== undefined) this.#drop(id);
  }

  clear(): void {
    for (const id of [...this.#entries.keys()]) this.#drop(id);
  }

  #drop(id: number): void {
    const views = this.#entries.get(id);
    if (views === undefined) return;
    this.#entries.delete(id);
    for (const { value, bytes } of views.values()) {
      this.#bytes -= bytes;
      this.release(value);
    }
  }
}
