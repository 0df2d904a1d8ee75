/** Recipe 06_float8 on the CPU and on the emulated GPU. */
import { openCpu } from "../../ffi/cpu/open.ts";
import { compile } from "../../recipes/02_compile.ts";
import { fuseQkv } from "../../recipes/03_fuse_qkv.ts";
import { float8RecipeSuite, float8TinySuite } from "../support/golden_suite_float8.ts";
import { TEST_GPU } from "../support/gpu_devices.ts";
import { ownDevice } from "../support/test_device.ts";

const CPU = ownDevice("cpu", () => openCpu());

float8RecipeSuite(CPU);
float8RecipeSuite(TEST_GPU);
float8RecipeSuite(TEST_GPU, [compile, fuseQkv]);
float8TinySuite(CPU);
