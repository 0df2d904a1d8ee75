/** Recipe 08_export on the emulated GPU. */
import { exportSuite } from "../support/export_suite.ts";
import { TEST_GPU } from "../support/gpu_devices.ts";

exportSuite(TEST_GPU);
