/**
 * 07 tuning: algorithms and launch parameters are measured, not guessed.
 *
 * Idea: for each product and convolution cuBLASLt and cuDNN propose several algorithms, best guess first. The guess knows
 * the shape, but not this GPU's clocks, nor that the weights come from memory and not from the cache. Each distinct shape
 * is timed once, on its own operands, with the cache flushed in between and the GPU busy all the time; what was found is
 * kept in the cache folder. In the same way it is measured whether GELU belongs into a product's epilogue
 * (kernels/parallel_branches.ts), whose attention is faster (kernels/joint_attention.ts), and, by coordinate descent, how
 * memory-bound kernels share out their work (kernels/coordinate_descent.ts).
 * Changes: which algorithm runs, and in which launch shapes. Exact: yes, up to the order of sums.
 * Measured on an H100: a step in float8 73.5 to 73.1 ms, in bfloat16 118.5 to 117.5.
 *
 *     deno run -A recipes/07_tuning.ts --device cuda --ckpt FLUX.1-schnell --random-weights --verbose
 */
import { isGpu } from "../ffi/gpu.ts";
import type { Plan, Recipe } from "./base/plan.ts";

/** 07: algorithms and launch shapes by measurement. Exact up to the order of sums. */
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
