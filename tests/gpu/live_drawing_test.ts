/** Hot reload of kernels on a GPU: from the changed file to the picture in less than two seconds. */
import { liveDrawingSuite } from "../support/live_drawing_suite.ts";
import { TEST_GPU } from "../support/gpu_devices.ts";

liveDrawingSuite(TEST_GPU, 2);
