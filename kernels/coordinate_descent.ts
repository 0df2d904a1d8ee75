import type { GpuDevice } from "../ffi/gpu.ts";
import type { Tensor } from "../ffi/tensor.ts";

/** Rounds over all parameters: in a second one hardly anything changes any more. */
const MOST_ROUNDS = 2;

/**
 * Launch parameters by coordinate descent: inside of {@link GpuDevice.measuring} one parameter after another is tried with
 * all its values while the others keep theirs, until none changes; elsewhere they are what they start with.
 *
 * @param key what the launch depends on beside them. @param start the values without measuring.
 * @param values of each parameter. @param issue does the work with some values.
 */
export function coordinateDescent<P extends Readonly<Record<string, number>>>(
  gpu: GpuDevice,
  key: string,
  start: P,
  values: { readonly [K in keyof P]: readonly number[] },
  issue: (parameters: P) => void,
): P {
  let best = start;
  for (let round = 0; round < MOST_ROUNDS; round++) {
    const before = best;
    for (const name of Object.keys(values)) {
      // The value that it has comes first: it stays where others are no faster.
      const tried = [best[name], ...values[name].filter((value) => value !== best[name])];
      const candidates = tried.map((value) => ({ ...best, [name]: value }));
      const index = gpu.fastest(
        `${key} ${JSON.stringify(best)} ${name} of ${tried}`,
        candidates.map((candidate) => () => issue(candidate)),
      );
      best = candidates[index];
    }
    if (Object.keys(values).every((name) => best[name] === before[name])) break;
  }
  return best;
}

/** Results that are smaller are a launch's latency, however they are shared out. */
const LEAST_BYTES = 4e6;

/** A launch with parameters that change nothing in what it gives. */
export interface TunedLaunch<P> {
  /** What the launch depends on beside them. */
  readonly key: string;
  readonly out: Tensor;
  readonly inputs: readonly Tensor[];
  /** The parameters without measuring. */
  readonly start: P;
  readonly values: { readonly [K in keyof P]: readonly number[] };
  readonly issue: (parameters: P) => void;
}

/** Launches with what {@link coordinateDescent} finds; as it starts where it cannot try, or need not. */
export function launchTuned<P extends Readonly<Record<string, number>>>(
  gpu: GpuDevice,
  { key, out, inputs, start, values, issue }: TunedLaunch<P>,
): void {
  // What reads where it writes gives something else the second time.
  const tries = out.byteLength >= LEAST_BYTES && inputs.every(({ memory }) => memory !== out.memory);
  issue(tries ? coordinateDescent(gpu, key, start, values, issue) : start);
}
