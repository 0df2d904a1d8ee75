/**
 * 07 tuning: the library's algorithms are measured, not guessed.
 *
 * Idea: for each product and convolution cuBLASLt and cuDNN propose several algorithms, best guess first. The guess knows
 * the shape, but not this GPU's clocks, nor that the weights come from memory and not from the cache. Each distinct shape
 * is timed once, on its own operands, with the cache flushed in between; what was found is kept in the cache folder.
 * Changes: which algorithm runs. Exact: yes, up to the order of sums.
 * Measured on an H100: no difference so far, the libraries' first guesses are good.
 *
 *     deno run -A recipes/07_tuning.ts --device cuda --ckpt FLUX.1-schnell --random-weights --verbose
 */
import { isGpu } from "../ffi/gpu.ts";
import type { Plan, Recipe } from "./base/plan.ts";

export const tuning: Recipe = {
  name: "07_tuning",
  exact: true,
  devices: ["cpu", "cuda", "hip"],
  apply: (plan: Plan) => {
    const { device, execute } = plan;
    if (!isGpu(device)) return plan; // oneDNN and WebAssembly have one algorithm each
    return {
      ...plan,
      execute: (running, part, inputs, body) =>
        execute(running, part, inputs, (given) => device.measuring(() => body(given))),
    };
  },
};

if (import.meta.main) void import("./run_rung.ts").then(({ runRung }) => runRung(tuning.name));
