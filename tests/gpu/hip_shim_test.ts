/**
 * The HIP device's own sequence of calls on an NVIDIA GPU, by the shim (tests/support/hip_shim.cpp): every kernel against its
 * reference, every golden test, and the pictures again with the recipes of the ladder. It says that these calls belong
 * together, and nothing about AMD's libraries, its compiler or its speed. `bash tests/gpu/hip_shim.sh` runs it.
 */
import { compile } from "../../recipes/02_compile.ts";
import { fuseQkv } from "../../recipes/03_fuse_qkv.ts";
import { channelsLast } from "../../recipes/04_channels_last.ts";
import { float8 } from "../../recipes/06_float8.ts";
import { firstBlockCacheSuite } from "../support/first_block_cache_suite.ts";
import { float8TextEncoderSuite } from "../support/float8_text_encoder_suite.ts";
import {
  autoencoderSuite,
  BF16_FACTOR,
  componentSuite,
  OTHER_ORDER,
} from "../support/golden_suite_components.ts";
import { float8RecipeSuite, float8TinySuite } from "../support/golden_suite_float8.ts";
import { kontextSuite } from "../support/golden_suite_kontext.ts";
import { pipelineSuite } from "../support/golden_suite_pipelines.ts";
import { tinySuite } from "../support/golden_suite_tiny.ts";
import { TEST_GPU } from "../support/gpu_devices.ts";
import { checksumSuite } from "../support/kernel_suites/checksum.ts";
import { convolutionSuite } from "../support/kernel_suites/convolutions.ts";
import { copySuite } from "../support/kernel_suites/copies.ts";
import { elementwiseSuite } from "../support/kernel_suites/elementwise.ts";
import { float8Suite } from "../support/kernel_suites/float8.ts";
import { float8FusedSuite } from "../support/kernel_suites/float8_fused.ts";
import { fusedSuite } from "../support/kernel_suites/fused.ts";
import { normsSuite } from "../support/kernel_suites/norms.ts";
import { parallelBranchesSuite } from "../support/kernel_suites/parallel_branches.ts";
import { portableAttentionSuite } from "../support/kernel_suites/portable_attention.ts";
import { randomSuite } from "../support/kernel_suites/random.ts";
import { linearFewRowsSuite } from "../support/kernel_suites/linear_few_rows.ts";
import { relativeChangeSuite } from "../support/kernel_suites/relative_change.ts";
import { offloadSuite } from "../support/offload_suite.ts";

checksumSuite();
convolutionSuite();
elementwiseSuite();
copySuite();
normsSuite();
randomSuite();
float8Suite();
float8FusedSuite();
fusedSuite();
parallelBranchesSuite();
linearFewRowsSuite();
relativeChangeSuite();
portableAttentionSuite();
// Other algorithms than CUDA's device gets, since the shim cannot tell cuBLASLt how addresses are aligned.
componentSuite(TEST_GPU, OTHER_ORDER, BF16_FACTOR);
autoencoderSuite(TEST_GPU, [channelsLast], OTHER_ORDER);
for (const recipes of [[], [compile, fuseQkv, channelsLast]]) {
  pipelineSuite(TEST_GPU, recipes);
  tinySuite(TEST_GPU, recipes);
  kontextSuite(TEST_GPU, recipes);
}
float8RecipeSuite(TEST_GPU);
float8RecipeSuite(TEST_GPU, [compile, fuseQkv]);
float8TinySuite(TEST_GPU);
firstBlockCacheSuite(TEST_GPU);
firstBlockCacheSuite(TEST_GPU, [compile, fuseQkv]);
float8TextEncoderSuite(TEST_GPU);
float8TextEncoderSuite(TEST_GPU, [compile, fuseQkv, float8()]);
offloadSuite(TEST_GPU);
