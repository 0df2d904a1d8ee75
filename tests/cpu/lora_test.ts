/** LoRAs on the CPU and on the emulated GPU. */
import { openCpu } from "../../ffi/cpu/open.ts";
import { TEST_GPU } from "../support/gpu_devices.ts";
import { loraSuite } from "../support/lora_suite.ts";
import { ownDevice } from "../support/test_device.ts";

loraSuite(ownDevice("cpu", () => openCpu()));
loraSuite(TEST_GPU, ["schnell-like"]);
