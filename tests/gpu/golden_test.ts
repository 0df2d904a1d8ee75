/** Every golden test of the CPU device, on the CUDA device, and the pictures again with the recipes of the ladder. */
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { compile } from "../../recipes/02_compile.ts";
import { fuseQkv } from "../../recipes/03_fuse_qkv.ts";
import { channelsLast } from "../../recipes/04_channels_last.ts";
import { flashAttention } from "../../recipes/05_flash_attention.ts";
import { float8 } from "../../recipes/06_float8.ts";
import { tuning } from "../../recipes/07_tuning.ts";
import { autoencoderSuite, componentSuite, OTHER_ORDER } from "../support/golden_suite_components.ts";
import { float8RecipeSuite, float8TinySuite } from "../support/golden_suite_float8.ts";
import { firstBlockCacheSuite } from "../support/first_block_cache_suite.ts";
import { float8TextEncoderSuite } from "../support/float8_text_encoder_suite.ts";
import { kontextRecipesSuite, kontextSuite } from "../support/golden_suite_kontext.ts";
import { pipelineSuite } from "../support/golden_suite_pipelines.ts";
import { tinySuite } from "../support/golden_suite_tiny.ts";
import { TEST_GPU } from "../support/gpu_devices.ts";

componentSuite(TEST_GPU, OTHER_ORDER);
autoencoderSuite(TEST_GPU, [channelsLast], OTHER_ORDER);
for (const recipes of [[], [compile], [compile, fuseQkv], [compile, fuseQkv, channelsLast]]) {
  pipelineSuite(TEST_GPU, recipes);
  tinySuite(TEST_GPU, recipes);
  kontextSuite(TEST_GPU, recipes);
}
kontextRecipesSuite(
  TEST_GPU,
  [bfloat16, compile, fuseQkv, channelsLast, flashAttention(), float8(), tuning],
  40, // 41.1 dB, of which modulations in float8 are 1
);
firstBlockCacheSuite(TEST_GPU);
firstBlockCacheSuite(TEST_GPU, [compile, fuseQkv]);
float8TextEncoderSuite(TEST_GPU);
float8TextEncoderSuite(TEST_GPU, [compile, fuseQkv, float8()]);
float8RecipeSuite(TEST_GPU);
float8RecipeSuite(TEST_GPU, [compile, fuseQkv]);
float8TinySuite(TEST_GPU);
