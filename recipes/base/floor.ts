/** What a step would take if all of it ran at the rate of large matrix products, measured on the device at hand. */
import type { Device, MatmulPlan } from "../../ffi/device.ts";
import type { DType } from "../../ffi/dtype.ts";
import { OutOfMemoryError } from "../../ffi/errors.ts";
import { isGpu } from "../../ffi/gpu.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { fillRandom } from "../../kernels/random_fill.ts";
import { quantizeTensor } from "../../kernels/quantize_float8.ts";
import type { Flops } from "./flops.ts";
import { statistics } from "./measure.ts";

/** Dtypes that products are in. */
export type ProductDType = Extract<DType, "f32" | "bf16" | "f8e4m3">;

export interface Floor {
  /** Of a step. */
  readonly milliseconds: number;
  /** 10^12 operations a second, by dtype. */
  readonly rates: Readonly<Partial<Record<ProductDType, number>>>;
}

/** Rows, columns and summed numbers of the product that is timed: large enough to reach the device's best rate. */
const GPU_SIZE = 8192;
const CPU_SIZE = 1024;
const RUNS = 5;
/** Products between two looks at the clock, so that a GPU has its clocks under steady work. */
const GPU_REPEATS = 20;

/**
 * The floor of a step whose Linear layers and attention multiply in these dtypes.
 *
 * @returns undefined where memory does not suffice for the products.
 */
export async function measureFloor(
  device: Device,
  flops: Flops,
  dtypes: { readonly linear: ProductDType; readonly attention: ProductDType },
): Promise<Floor | undefined> {
  const rates: Partial<Record<ProductDType, number>> = {};
  try {
    for (const dtype of new Set([dtypes.linear, dtypes.attention])) {
      rates[dtype] = await productRate(device, dtype);
    }
  } catch (error) {
    if (error instanceof OutOfMemoryError) return undefined;
    throw error;
  }
  const seconds = (flops.linear / rates[dtypes.linear]! + flops.attention / rates[dtypes.attention]!) / 1e12;
  return { milliseconds: 1000 * seconds, rates };
}

/**
 * 10^12 operations a second of a large product of random numbers: the median of {@link RUNS}.
 *
 * @param size rows, columns and summed numbers.
 */
export async function productRate(
  device: Device,
  dtype: ProductDType,
  size = isGpu(device) ? GPU_SIZE : CPU_SIZE,
): Promise<number> {
  const repeats = isGpu(device) ? GPU_REPEATS : 1;
  const owned: Tensor[] = [];
  const own = (tensor: Tensor) => (owned.push(tensor), tensor);
  try {
    const wide: DType = dtype === "f8e4m3" ? "bf16" : dtype;
    const random = (stream: number) => {
      const tensor = own(Tensor.empty(device, [size, size], wide));
      fillRandom(tensor, { seed: 1, stream, kind: "normal", scale: 1, shift: 0 });
      return tensor;
    };
    const [a, b] = [random(0), random(1)];
    const out = own(Tensor.empty(device, [size, size], wide));
    let plan: MatmulPlan = { a, b, out };
    if (dtype === "f8e4m3") {
      const [x, y] = [a, b].map((wide) => quantizeTensor(wide));
      owned.push(x, y);
      plan = { a: x.values, b: y.values, out, scaleA: x.scales, scaleB: y.scales };
    }
    const times: number[] = [];
    for (let run = 0; run <= RUNS; run++) { // the first warms up
      await device.synchronize();
      const start = performance.now();
      for (let i = 0; i < repeats; i++) device.matmul(plan);
      await device.synchronize();
      if (run > 0) times.push((performance.now() - start) / repeats);
    }
    return 2 * size ** 3 / statistics(times).median / 1e9;
  } finally {
    for (const tensor of owned) tensor.dispose();
  }
}
