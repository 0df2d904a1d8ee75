/** Weights that are on the GPU only while they are used. */
import type { Memory } from "../../ffi/device.ts";
import { OutOfMemoryError } from "../../ffi/errors.ts";
import type { Deposit } from "../../ffi/gpu.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { type Weights, weightsFrom } from "./weights.ts";

const deposits = new WeakMap<Memory, Deposit>();

/**
 * Moves weights into a deposit, each memory once; `weights` is consumed.
 *
 * @param deposit that they are added to. @returns the same weights, which can be read while the deposit is on the GPU.
 */
export function depositWeights(weights: Weights, deposit: Deposit): Weights {
  const tensors = weights.names.map((name) => [name, weights.get(name)] as const);
  const moved = new Map<Memory, Memory>();
  const made = new Map<Tensor, Tensor>();
  for (const [, tensor] of tensors) {
    if (made.has(tensor)) continue;
    let memory = moved.get(tensor.memory);
    if (memory === undefined) {
      moved.set(tensor.memory, memory = deposit.add(tensor.memory));
      deposits.set(memory, deposit);
    }
    made.set(tensor, new Tensor(memory, tensor.dtype, tensor.shape, tensor.strides, tensor.offset));
  }
  return weightsFrom(new Map(tensors.map(([name, tensor]) => [name, made.get(tensor)!])));
}

/** The deposit that all of these weights lie in, or undefined where some lie elsewhere. */
export function depositOf(weights: Weights): Deposit | undefined {
  const [first, ...others] = new Set(weights.names.map((name) => deposits.get(weights.get(name).memory)));
  return others.length === 0 ? first : undefined;
}

/**
 * Runs `body` while the deposit is on the GPU; without one, as it is.
 *
 * @param makeRoom is called where the GPU has not enough memory for it, once.
 */
export function whilePresent<T>(deposit: Deposit | undefined, makeRoom: () => void, body: () => T): T {
  if (deposit === undefined) return body();
  try {
    deposit.bring();
  } catch (error) {
    if (!(error instanceof OutOfMemoryError)) throw error;
    makeRoom();
    deposit.bring();
  }
  try {
    return body();
  } finally {
    deposit.leave();
  }
}
