/** The vendor's profiler, and the trace of a picture, on the CUDA device. */
import { takeInventory } from "../../ffi/inventory.ts";
import { TEST_GPU } from "../support/gpu_devices.ts";
import { profilerSuite } from "../support/profiler_suite.ts";

const missing = takeInventory().libraries.find(({ name }) => name === "CUPTI")!.problem;
profilerSuite({ ...TEST_GPU, skip: TEST_GPU.skip ?? missing });
