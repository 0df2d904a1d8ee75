/** Every golden test of the CPU device, on the CUDA device. */
import { componentSuite, OTHER_ORDER } from "../support/golden_suite_components.ts";
import { float8RecipeSuite, float8TinySuite } from "../support/golden_suite_float8.ts";
import { pipelineSuite } from "../support/golden_suite_pipelines.ts";
import { tinySuite } from "../support/golden_suite_tiny.ts";
import { TEST_GPU } from "../support/gpu_devices.ts";

componentSuite(TEST_GPU, OTHER_ORDER);
pipelineSuite(TEST_GPU);
tinySuite(TEST_GPU);
float8RecipeSuite(TEST_GPU);
float8TinySuite(TEST_GPU);
