/** LoRAs on the CUDA device. */
import { TEST_GPU } from "../support/gpu_devices.ts";
import { loraSuite } from "../support/lora_suite.ts";

loraSuite(TEST_GPU);
