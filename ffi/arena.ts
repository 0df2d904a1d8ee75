import { FfiError } from "./errors.ts";

/**
 * Hands out ranges of one long piece of memory: best fit among the free ranges, which lie sorted by address and merge
 * with their neighbours. What is freed at the end is given back, so that the end is always that of a block in use.
 *
 * Free ranges are searched one after another: a model has a few dozen of them at a time.
 */
export class Arena {
  /** Free ranges below {@link end}, ascending; no two touch. */
  readonly #starts: number[] = [];
  readonly #sizes: number[] = [];
  /** Sizes of the blocks in use, by start. */
  readonly #used = new Map<number, number>();
  #end: number;

  /** `start`, the first offset to hand out, and `limit`, the end of all, are multiples of `alignment`. */
  constructor(start: number, readonly limit: number, private readonly alignment: number) {
    this.#end = start;
  }

  /** End of the last block in use. */
  get end(): number {
    return this.#end;
  }

  /** What a request of `byteLength` takes. */
  blockSize(byteLength: number): number {
    return Math.max(1, Math.ceil(byteLength / this.alignment)) * this.alignment;
  }

  /** The start of a block, or undefined where no free range is large enough. */
  alloc(byteLength: number): number | undefined {
    const size = this.blockSize(byteLength);
    const sizes = this.#sizes;
    let best = -1;
    for (let i = 0; i < sizes.length; i++) {
      if (sizes[i] >= size && (best < 0 || sizes[i] < sizes[best])) best = i;
    }
    let start: number;
    if (best >= 0) {
      start = this.#starts[best];
      if (sizes[best] === size) this.#remove(best);
      else {
        this.#starts[best] += size;
        sizes[best] -= size;
      }
    } else {
      if (this.#end + size > this.limit) return undefined;
      start = this.#end;
      this.#end += size;
    }
    this.#used.set(start, size);
    return start;
  }

  /** Gives a block back and returns its size. Throws {@link FfiError} where no block in use starts. */
  free(start: number): number {
    const size = this.#used.get(start);
    if (size === undefined) throw new FfiError(`memory: no block in use starts at ${start}`);
    this.#used.delete(start);
    const [starts, sizes] = [this.#starts, this.#sizes];
    let at = firstAfter(starts, start);
    const touchesBefore = at > 0 && starts[at - 1] + sizes[at - 1] === start;
    if (touchesBefore) {
      at--;
      sizes[at] += size;
    } else {
      starts.splice(at, 0, start);
      sizes.splice(at, 0, size);
    }
    const end = starts[at] + sizes[at];
    if (end === this.#end) {
      this.#end = starts[at];
      this.#remove(at);
    } else if (end === starts[at + 1]) {
      sizes[at] += sizes[at + 1];
      this.#remove(at + 1);
    }
    return size;
  }

  #remove(index: number): void {
    this.#starts.splice(index, 1);
    this.#sizes.splice(index, 1);
  }
}

/** Index of the first of the ascending `values` that is larger than `value`. */
function firstAfter(values: readonly number[], value: number): number {
  let [low, high] = [0, values.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] > value) high = middle;
    else low = middle + 1;
  }
  return low;
}
