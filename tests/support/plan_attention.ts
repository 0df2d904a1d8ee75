/**
 * A program of its own for cudnn_test.ts: plans attention with the real cuDNN for an H100 that is not there, and prints
 * the plans as JSON. cuDNN compiles such kernels with NVRTC and hands them to libcuda.so.1; the first argument is a
 * stand-in for it, which must not stay in the tests' own process.
 */
import { CudnnBackend } from "../../ffi/cuda/cudnn_backend.ts";
import { CudnnPlanner, type Layout } from "../../ffi/cuda/cudnn_plan.ts";
import { contiguousStrides } from "../../ffi/tensor.ts";
import { H100 } from "./h100.ts";

/** What is planned: dtype, tokens of q, tokens of k and v, heads, head size. */
export const ATTENTION_CASES = [
  ["bf16", 4352, 4352, 24, 128],
  ["f16", 77, 77, 12, 64],
  ["bf16", 100, 50, 3, 8],
  ["bf16", 64, 64, 2, 100],
] as const;

if (import.meta.main) {
  Deno.dlopen(Deno.args[0], {}); // found by its soname from now on
  using backend = new CudnnBackend();
  using planner = new CudnnPlanner(backend, { deviceProperties: H100 });
  for (const [dtype, queries, keys, heads, headDim] of ATTENTION_CASES) {
    const layout = (tokens: number): Layout => {
      const shape = [2, tokens, heads, headDim];
      return { dtype, shape, strides: contiguousStrides(shape), alignment: 16 };
    };
    const [q, k, v, out] = [queries, keys, keys, queries].map(layout);
    try {
      using plan = planner.attention({ q, k, v, out });
      console.log(JSON.stringify({ workspaceBytes: plan.workspaceBytes, notes: plan.numericalNotes }));
    } catch (error) {
      console.log(JSON.stringify({ error: String(error) }));
    }
  }
}
