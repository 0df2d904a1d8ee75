import { Tensor } from "../../ffi/tensor.ts";

/** The same structure with every tensor replaced: of a tensor, or an array or a plain object of tensors (nested). */
export function mapTensors<O>(value: O, change: (tensor: Tensor) => Tensor): O {
  const map = (item: unknown): unknown => {
    if (item instanceof Tensor) return change(item);
    if (Array.isArray(item)) return item.map(map);
    if (typeof item === "object" && item !== null && Object.getPrototypeOf(item) === Object.prototype) {
      return Object.fromEntries(Object.entries(item).map(([key, part]) => [key, map(part)]));
    }
    return item;
  };
  return map(value) as O;
}
