/** Every golden test of the CPU device, on the CUDA device, and the pictures again with the recipes of the ladder. */
import { compile } from "../../recipes/02_compile.ts";
import { fuseQkv } from "../../recipes/03_fuse_qkv.ts";
import { channelsLast } from "../../recipes/04_channels_last.ts";
import { autoencoderSuite, componentSuite, OTHER_ORDER } from "../support/golden_suite_components.ts";
import { float8RecipeSuite, float8TinySuite } from "../support/golden_suite_float8.ts";
import { pipelineSuite } from "../support/golden_suite_pipelines.ts";
import { tinySuite } from "../support/golden_suite_tiny.ts";
import { TEST_GPU } from "../support/gpu_devices.ts";

componentSuite(TEST_GPU, OTHER_ORDER);
autoencoderSuite(TEST_GPU, [channelsLast], OTHER_ORDER);
for (const recipes of [[], [compile], [compile, fuseQkv], [compile, fuseQkv, channelsLast]]) {
  pipelineSuite(TEST_GPU, recipes);
  tinySuite(TEST_GPU, recipes);
}
float8RecipeSuite(TEST_GPU);
float8RecipeSuite(TEST_GPU, [compile, fuseQkv]);
float8TinySuite(TEST_GPU);
