/** Tuned launches on the emulated GPU. */
import { tuningSuite } from "../support/kernel_suites/tuning.ts";

tuningSuite();
