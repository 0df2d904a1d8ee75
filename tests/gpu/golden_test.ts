/** Every golden test of the CPU device, on the CUDA device. */
import { channelsLast } from "../../recipes/04_channels_last.ts";
import { autoencoderSuite, componentSuite, OTHER_ORDER } from "../support/golden_suite_components.ts";
import { pipelineSuite } from "../support/golden_suite_pipelines.ts";
import { tinySuite } from "../support/golden_suite_tiny.ts";
import { TEST_GPU } from "../support/gpu_devices.ts";

componentSuite(TEST_GPU, OTHER_ORDER);
autoencoderSuite(TEST_GPU, [channelsLast], OTHER_ORDER);
pipelineSuite(TEST_GPU);
tinySuite(TEST_GPU);
