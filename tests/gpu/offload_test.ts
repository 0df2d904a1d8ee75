/** Recipe 12_offload on a GPU. */
import { TEST_GPU } from "../support/gpu_devices.ts";
import { offloadSuite } from "../support/offload_suite.ts";

offloadSuite(TEST_GPU);
