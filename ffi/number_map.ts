/**
 * A map whose keys are lists of numbers of one length. The caller writes a key into {@link key} and asks: a look-up
 * allocates nothing, which a key of text would.
 */
export class NumberMap<T> {
  /** The key that {@link get} and {@link set} mean. */
  readonly key: Float64Array;
  readonly #chains = new Map<number, { readonly key: Float64Array; readonly value: T }[]>();

  /** @param length numbers in a key */
  constructor(length: number) {
    this.key = new Float64Array(length);
  }

  get(): T | undefined {
    const chain = this.#chains.get(this.#hash());
    if (chain === undefined) return undefined;
    for (let i = 0; i < chain.length; i++) {
      if (this.#isKey(chain[i].key)) return chain[i].value;
    }
    return undefined;
  }

  /** Adds a value under a key that the map does not have. */
  set(value: T): void {
    const hash = this.#hash();
    const entry = { key: this.key.slice(), value };
    const chain = this.#chains.get(hash);
    if (chain === undefined) this.#chains.set(hash, [entry]);
    else chain.push(entry);
  }

  clear(): void {
    this.#chains.clear();
  }

  *values(): Generator<T> {
    for (const chain of this.#chains.values()) for (const { value } of chain) yield value;
  }

  #hash(): number {
    let hash = 0;
    // The multiplier is 2^32 / golden ratio; numbers are cut to 32 bits, which a hash may.
    for (let i = 0; i < this.key.length; i++) {
      hash = Math.imul(hash ^ this.key[i], 0x9e3779b1) ^ (hash >>> 15);
    }
    return hash;
  }

  #isKey(other: Float64Array): boolean {
    for (let i = 0; i < other.length; i++) if (other[i] !== this.key[i]) return false;
    return true;
  }
}
