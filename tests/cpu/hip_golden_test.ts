/**
 * The golden tests with the HIP device, by the shim over stand-ins for CUDA on the CPU: models and pictures by HIP's own
 * sequence of calls, eagerly and by all recipes' graphs.
 */
import { compile } from "../../recipes/02_compile.ts";
import { fuseQkv } from "../../recipes/03_fuse_qkv.ts";
import { channelsLast } from "../../recipes/04_channels_last.ts";
import { float8 } from "../../recipes/06_float8.ts";
import { openHip } from "../../ffi/hip/open.ts";
import { missingCompiler } from "../support/fake_cuda.ts";
import { firstBlockCacheSuite } from "../support/first_block_cache_suite.ts";
import { float8TextEncoderSuite } from "../support/float8_text_encoder_suite.ts";
import { componentSuite, OTHER_ORDER } from "../support/golden_suite_components.ts";
import { kontextSuite } from "../support/golden_suite_kontext.ts";
import { pipelineSuite } from "../support/golden_suite_pipelines.ts";
import { hipOnCpu } from "../support/hip_shim.ts";
import { ownDevice } from "../support/test_device.ts";

const skip = missingCompiler();
const cuda = skip === undefined ? hipOnCpu() : undefined;
const HIP = ownDevice("hip by the shim, on the CPU", () => {
  cuda!.reset();
  return openHip(0);
}, skip);

componentSuite(HIP, OTHER_ORDER);
pipelineSuite(HIP, [compile, fuseQkv, channelsLast]);
kontextSuite(HIP, [compile, fuseQkv, channelsLast], false);
firstBlockCacheSuite(HIP, [compile, fuseQkv]);
float8TextEncoderSuite(HIP, [compile, fuseQkv, float8()]);
